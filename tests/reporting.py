"""Small trained runs for the tests of reports."""

from __future__ import annotations

from pathlib import Path

from featcache.sources.video import Video
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.training.train import train
from tests.synthetic import DiscSource, make_store

FEATURES = ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "model.slots=5")
PIXELS = (
    "model.resolution=16", "model.broadcast=4", "model.slots=4", "model.slot_dim=16", "model.encoder_channels=8",
    "model.decoder_channels=8", "model.slot_mlp_hidden=16",
)  # fmt: skip
SHORT = ("optim.batch_size=4", "optim.warmup_steps=2", "log_every=1")
LENGTHS = {"train": (4, 4, 3, 4, 2), "validation": (4, 6, 4, 5)}


class NoMasks(DiscSource):
    """Videos that nobody has annotated."""

    masks = False

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        return Video(video.id, video.frames, None, ())


def disc_store(path: Path) -> FeatureStore:
    return make_store(path, DiscSource(LENGTHS))


def make_run(
    run: Path, store: FeatureStore, preset: str = "dinosaur", seed: int = 0, steps: int = 6, train_split: str = "train"
) -> Path:
    """Train for a moment."""
    small = PIXELS if preset == "pixel" else FEATURES
    chosen = {"seed": seed, "optim__steps": steps, "data__train_split": train_split}
    train(load_config(preset, None, [*SHORT, *small], **chosen), store, run)
    return run
