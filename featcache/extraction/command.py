"""The command that makes a store, as one would type it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from featcache.sources import SAMPLE
from featcache.sources.video import Size


def extract_command(
    *,
    backbone: str,
    taps: Iterable[str],
    input_size: Size,
    source: str,
    out: Path,
    split: str = "",
    weights: str = "",
    fit: str = "",
    frame_size: str = "",
    dtype: str = "float16",
) -> str:
    """``slotlab extract`` with these options; ``source`` is a value of ``--data``, or that of the embedded sample."""
    options = {
        "--backbone": backbone,
        "--data": source if source != SAMPLE else "",
        "--split": split,
        "--weights": weights,
        "--input-size": "x".join(map(str, input_size)),
        "--fit": fit,
        "--frame-size": frame_size,
        "--dtype": dtype if dtype != "float16" else "",
        "--out": str(out),
    }
    words = [word for tap in taps for word in ("--tap", tap)]
    words += [word for option, value in options.items() if value for word in (option, value)]
    return shlex.join(["slotlab", "extract", *words])
