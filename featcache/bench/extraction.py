"""Measures the rate of extraction beside the bare model's."""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featcache.machine import alternate, paired_ratio, timed

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.extraction.plan import ExtractOptions
    from featcache.sources.video import Source
from featcache.bench.stream import BARE_MODEL


@dataclass(frozen=True)
class ExtractionRate:
    """Frames a second from the source to a finished, synced store, beside those of the backbone alone."""

    name: str
    frames_per_s: float
    limit_frames_per_s: float
    ratio: float  # median over rounds of the ratio within a round
    limit: str
    frames: int  # in one round
    batch_size: int
    precision: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_extract(source: Source, backbone: Backbone, options: ExtractOptions, rounds: int = 5) -> ExtractionRate:
    """The rate of extracting one split into a temporary folder, beside the same batches on the bare model.

    ``options`` name the split and the number of its videos; batch size and precision, if not given, are chosen as for
    an extraction, once for both.
    """
    from featcache.backbones.inference import autocast
    from featcache.extraction.extract import extract
    from featcache.extraction.plan import plan

    (split,) = options.splits
    with tempfile.TemporaryDirectory() as folder:
        spec = plan(Path(folder) / "plan.zarr", source, backbone, options).spec
        options = replace(options, batch_size=spec.batch_size, precision=spec.precision)
        videos = range(len(source.lengths(split)))[: options.max_videos]
        batches = [
            batch
            for index in videos
            for batch in torch.split(
                backbone.preprocess(torch.from_numpy(source.read(split, index).frames[:: options.frame_stride])),
                spec.batch_size,
            )
        ]
        frames = sum(len(batch) for batch in batches)
        stores = (Path(folder) / f"{count}.zarr" for count in itertools.count())

        def bare() -> int:
            with autocast(backbone.device, spec.precision):
                for batch in batches:
                    tokens = backbone(batch)[backbone.taps[0]]
            tokens.sum().item()  # waits for the device
            return frames

        def whole() -> int:
            store = next(stores)
            done = extract(plan(store, source, backbone, options), source, backbone)[split].frames
            shutil.rmtree(store)
            return done

        bare()
        rates = alternate({"extract": lambda: timed(whole), "bare": lambda: timed(bare)}, rounds)
    return ExtractionRate(
        name=f"extract {backbone.spec.name}",
        frames_per_s=round(statistics.median(rates["extract"]), 2),
        limit_frames_per_s=round(statistics.median(rates["bare"]), 2),
        ratio=round(paired_ratio(rates, "extract", "bare"), 3),
        limit=BARE_MODEL,
        frames=frames,
        batch_size=spec.batch_size,
        precision=spec.precision,
    )
