"""Figures of matplotlib as the bytes of a file."""

from __future__ import annotations

import io
import warnings
from typing import Any

from matplotlib.figure import Figure


def painted(figure: Figure, kind: str, **how: Any) -> bytes:
    """A file of a kind that matplotlib draws: png, svg, pdf ... ``ValueError`` for another kind."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may hold any character: boxes stand for some
        figure.savefig(buffer, format=kind, **how)
    return buffer.getvalue()
