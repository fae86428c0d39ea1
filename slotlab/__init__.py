"""slotlab: train, evaluate and compare slot models on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from featcache import __version__

if TYPE_CHECKING:  # imported when called for: `import slotlab` and `slotlab --help` stay fast
    import torch

    from slotlab.segment import Segmenter

__all__ = ["__version__", "load"]


def load(run: str | Path, *, device: str | torch.device = "auto", weights: str | None = None) -> Segmenter:
    """A segmenter of your own pictures from a run folder; see :func:`slotlab.segment.load`."""
    from slotlab.segment import load as open_run

    return open_run(run, device=device, weights=weights)
