"""The code of pages, run as it is printed, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import featcache
import slotlab
from featcache.store.reading import FeatureStore
from slotlab.dynamics.actions import Actions
from slotlab.dynamics.tracks import make_tracks
from slotlab.runs.loaded import load_run
from slotlab.segment import Future
from slotlab.training.train import train
from tests.media import ENCODERS, save_movie
from tests.synthetic import DIM, GRID, make_store
from tests.training import of_frames, small, tracks_of

TAPS = ("block12", "block12.key")
CLIPS = (3, 4, GRID[0] * GRID[1], DIM)  # three of the five videos have four frames


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", (Path(__file__).parent.parent / page).read_text(), re.M | re.S)


def run_all(printed: list[str], defined: dict[str, Any]) -> dict[str, Any]:
    """What is defined after these blocks."""
    for block in printed:
        exec(compile(block, "<page>", "exec"), defined)
    return defined


# -- docs/python.md ----------------------------------------------------------------------------------------


class Theirs(nn.Module):
    """Stands where a user has a model: it notes what it is given, the keys beside the outputs of its encoder, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.module = nn.Module()
        self.encoder.module.backbone = nn.Linear(3, DIM)
        self.expected_input_dims = 5
        self.given: dict[str, Tensor] = {}

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert batch["video"].ndim == self.expected_input_dims
        self.given = {"video": self.encoder.module.backbone(batch["video"])}
        return batch

    def compute_loss(self, outputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        self.given["keys"] = outputs["encoder"]["vit_block_keys12"]
        return self.given["video"].mean(), {}


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    make_store(tmp_path / "cache/dinov2.zarr", taps=TAPS)
    monkeypatch.chdir(tmp_path)
    return run_all(blocks("docs/python.md"), {"model": Theirs()})


def test_the_page_runs_as_it_is_printed(printed: dict[str, Any]) -> None:
    store, model = FeatureStore.open(Path("cache/dinov2.zarr")), printed["model"]
    whole = [video for video in store["train"].videos if store["train"].spec.lengths[video] == 4]
    assert len(whole) == CLIPS[0] and isinstance(printed["cache"], featcache.Cache)
    right = {tap: torch.stack([store["train"].tokens(tap, video) for video in whole]).float() for tap in TAPS}
    for name, tap in (("video", TAPS[0]), ("keys", TAPS[1])):
        found = model.given[name]
        assert found.shape == CLIPS and found.dtype == torch.float32
        order = [int((found[:, 0, 0, 0] == clip[0, 0, 0]).nonzero()) for clip in right[tap]]
        assert torch.equal(found[order], right[tap]), "of the tap that the page names, shuffled"
    (batch,) = printed["data"]
    assert batch["video"].shape == CLIPS and isinstance(printed["data"], DataLoader)


# -- world models ------------------------------------------------------------------------------------------


SHAPES = [(8, 4, 2), (8, 4, 32, 32), (8, 16, 256)]  # four slots, frames of 32 pixels, 4 x 4 tokens of 256


@pytest.mark.slow
def test_futures_are_what_the_pages_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, world = Path("runs/mine"), Path("runs/mine-dynamics-0")
    store = of_frames(run)
    frames = store["validation"].video(0)
    save_movie(Path("video.mp4"), *ENCODERS["h264"][:1], frames)
    (in_readme,) = (block for block in blocks("README.md") if "rollout" in block)
    alone, acting = blocks("docs/dynamics.md")
    train(small(preset="dynamics", optim__steps=2), tracks_of(run), world)
    for block in (in_readme, alone):
        assert shapes(run_all([block], {"slotlab": slotlab})["future"]) == SHAPES

    drawn = {
        name: {video: torch.randn(length, 3) for video, length in enumerate(store[name].spec.lengths)}
        for name in store.splits
    }
    tracks = make_tracks(load_run(run), Path("pushed.zarr"), actions=Actions(3, drawn))
    train(small(preset="dynamics", optim__steps=2), tracks, Path("runs/acting"))
    given = {"frames": frames, "tried": torch.randn(len(frames) + 8 - 1, 3)}
    assert shapes(run_all([acting], given | {"world": slotlab.load("runs/acting")})["future"]) == SHAPES


def shapes(future: Future) -> list[tuple[int, ...]]:
    return [tuple(values.shape) for values in (future.places, future.masks, future.features)]
