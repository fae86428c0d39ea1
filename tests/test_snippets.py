"""The code of docs/python.md, run as it is printed, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import featcache
from featcache.store.reading import FeatureStore
from tests.synthetic import DIM, GRID, make_store

PAGE = Path(__file__).parent.parent / "docs/python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
TAPS = ("block12", "block12.key")
CLIPS = (3, 4, GRID[0] * GRID[1], DIM)  # three of the five videos have four frames


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
    """What is defined after all blocks."""
    make_store(tmp_path / "cache/dinov2.zarr", taps=TAPS)
    monkeypatch.chdir(tmp_path)
    defined: dict[str, Any] = {"model": Theirs()}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), defined)
    return defined


def test_the_page_runs_as_it_is_printed(printed: dict[str, Any]) -> None:
    store, model = FeatureStore.open(Path("cache/dinov2.zarr")), printed["model"]
    whole = [video for video in store["train"].videos if store["train"].spec.lengths[video] == 4]
    assert len(BLOCKS) == 3 and len(whole) == CLIPS[0] and isinstance(printed["cache"], featcache.Cache)
    right = {tap: torch.stack([store["train"].tokens(tap, video) for video in whole]).float() for tap in TAPS}
    for name, tap in (("video", TAPS[0]), ("keys", TAPS[1])):
        found = model.given[name]
        assert found.shape == CLIPS and found.dtype == torch.float32
        order = [int((found[:, 0, 0, 0] == clip[0, 0, 0]).nonzero()) for clip in right[tap]]
        assert torch.equal(found[order], right[tap]), "of the tap that the page names, shuffled"
    (batch,) = printed["data"]
    assert batch["video"].shape == CLIPS and isinstance(printed["data"], DataLoader)
