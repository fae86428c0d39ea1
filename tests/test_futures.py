"""Rows of benchmarks.futures: the model's slots at other places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.futures import TRIED, main, placed
from slotlab.dynamics.rollout import features_at, load_dynamics
from slotlab.dynamics.rows import Clip, rollout, velocity_masks
from slotlab.models.dynamics.state import PLACE
from slotlab.runs.loaded import LoadedRun


@pytest.fixture(scope="module")
def loaded(predicting: Path) -> LoadedRun:
    return load_dynamics(predicting)


@pytest.fixture(scope="module")
def clip(loaded: LoadedRun) -> Clip:
    split, features = loaded.store["validation"], features_at(loaded.store)["validation"]
    tokens = features.tokens(loaded.inputs.features, 0).float()
    return Clip.of(loaded.model, loaded.inputs.read(split, 0), tokens)


def test_at_its_own_places_it_is_the_model(clip: Clip) -> None:
    own, same = rollout(clip), placed(lambda clip, model, constant: model)(clip)
    for one, other in ((own.features, same.features), (own.masks, same.masks), (own.places, same.places)):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_each_slot_goes_to_the_nearer_place_or_half_way(clip: Clip) -> None:
    model, constant = rollout(clip).places, velocity_masks(clip).places
    nearest, middle, steady = (TRIED[key][1](clip).places for key in ("nearer", "half", "steady"))
    assert model is not None and constant is not None and nearest is not None and middle is not None
    true = clip.vectors[clip.burn_in :, :, PLACE]
    off = torch.stack([(of - true).norm(dim=-1) for of in (model, constant)])
    torch.testing.assert_close((nearest - true).norm(dim=-1), off.amin(0))
    assert len(set(off.argmin(0).flatten().tolist())) == 2, "each is the nearer one somewhere"
    torch.testing.assert_close(middle - model, constant - middle)
    torch.testing.assert_close(steady, constant)


def test_a_row_for_each(predicting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["futures", str(predicting)])
    main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| at 1, 2, 4, 8 | mse | mbo |") and len(rows) == len(TRIED)
    assert rows[0].split("|")[2] != rows[1].split("|")[2]
