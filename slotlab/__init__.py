"""slotlab: train, evaluate and compare slot models on cached features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache import __version__

if TYPE_CHECKING:  # imported when called for: `import slotlab` and `slotlab --help` stay fast
    import torch

    from slotlab.segment import RunSegmenter, TrainingFreeSegmenter

__all__ = ["__version__", "load", "training_free"]


def load(
    run: str | Path,
    *,
    input_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "auto",
    weights: str | None = None,
) -> RunSegmenter:
    """A segmenter of your own pictures from a run folder, which also predicts if the run is a world model; see
    :func:`slotlab.forecast.load`."""
    from slotlab.forecast import load as open_run

    return open_run(run, input_size=input_size, device=device, weights=weights)


def training_free(own: Sequence[Any] = (), **options: Any) -> TrainingFreeSegmenter:
    """A segmenter of your own pictures without any training; see :func:`slotlab.segment.training_free`."""
    from slotlab.segment import training_free as without_run

    return without_run(own, **options)
