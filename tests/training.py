"""Small trained runs: configurations for the synthetic store (12 channels, a 4x4 grid), and what a run has logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featcache.backbones.backbone import load_backbone
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.dynamics.tracks import make_tracks
from slotlab.runs.folder import tracks_path
from slotlab.runs.loaded import load_run
from slotlab.training.train import train
from tests.synthetic import DiscSource, make_store

SMALL = {
    "dinosaur": ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "optim.learning_rate=1e-3"),
    "default": ("model.slot_dim=6", "model.hidden=16", "data.normalize=slow=8"),
    "objects": ("model.slot_dim=6", "model.hidden=16", "data.normalize=whiten=8"),
    "dynamics": ("data.clip=5", "model.burn_in=3", "model.width=16", "model.heads=2"),
    "videosaur": (
        "data.clip=2",
        "model.slot_dim=8",
        "model.projection_hidden=16",
        "model.decoder.hidden=16",
        "model.predictor.hidden=16",
        "loss.feature_mse=1.0",
        "loss.slot_contrast=0.1",
    ),
}
PARTS = (  # of models that draw in ways of their own
    ("model.decoder.kind=mix", "model.initializer=kmeans"),
    ("model.initializer=gaussian",),
    ("model.initializer=gaussian", "model.fewest_slots=2"),
)
CLOCKS = ("samples_per_second", "wait_share", "seconds")  # no two runs have the same


def small(*overrides: str, preset: str = "dinosaur", **shorthands: Any) -> Config:
    defaults = {"optim__steps": 12, "optim__batch_size": 4, "model__slots": 4}
    common = ("log_every=1", "optim.warmup_steps=3")
    return load_config(preset, None, [*common, *SMALL[preset], *overrides], **(defaults | shorthands))


def tracked(folder: Path) -> Path:
    """A run of twelve steps whose model follows objects through videos of six frames."""
    source = DiscSource({"train": (6, 6, 5, 6), "validation": (6, 6, 6)})
    return train(small(preset="default"), make_store(folder / "synthetic.zarr", source), folder / "run")


def of_frames(run: Path) -> FeatureStore:
    """The store of a run that reads pictures: features of a backbone whose weights are random."""
    source = DiscSource({"train": (6, 6, 5, 6), "validation": (6, 6)})
    backbone = load_backbone("resnet18", "random", input_size=64)
    options = ExtractOptions(batch_size=4, precision="float32")
    store = extract(plan(run.with_suffix(".zarr"), source, backbone, options), source, backbone)
    train(small(preset="default", optim__steps=2), store, run)
    return store


def tracks_of(run: Path) -> FeatureStore:
    """The tracks of a run."""
    return make_tracks(load_run(run), tracks_path(run))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, but for the clocks."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


class Interrupted(Exception):
    pass


def stopping(step: int) -> Callable[[dict[str, Any]], None]:
    """A report that interrupts the run when this step is logged."""

    def report(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Interrupted

    return report
