"""A training step as a GPU meets it: nothing in it waits for the device, and it is compiled once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from slotlab.config.load import presets
from tests.synthetic import fitted, make_store

VARIANTS = [
    ["default", "optim.accumulate=2"],
    ["dinosaur", "optim.ema=0.9", "model.decoder.recompute=true"],
    ["dinosaur", "model.decoder.patches=5", "model.decoder.masks=gumbel"],
    ["dinosaur", "model.initializer=kmeans++", "model.gradient=bilevel", "model.decoder.masks=straight_through"],
    ["dinosaur-ar", "model.decoder.permuted=true"],
    ["savi-dinosaur", "model.fewest_slots=2"],
    ["mix", "model.decoder.patches=5", "loss.cosine=1.0", "loss.diversity=0.1", "loss.sharpness=0.1"],
]
CASES = [[preset] for preset in presets()] + VARIANTS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What :mod:`tests.steps` finds: name of the finding -> case -> finding."""
    store = make_store(tmp_path_factory.mktemp("step") / "store.zarr")
    done = subprocess.run(
        [sys.executable, "-m", "tests.steps", str(store.path)],
        input=json.dumps([[case[0], *fitted(case[0]), *case[1:]] for case in CASES]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: dict(zip(map(str, CASES), of_cases, strict=True)) for name, of_cases in json.loads(done.stdout).items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_waits_for_the_gpu_nowhere(case: list[str], found: dict[str, dict[str, Any]]) -> None:
    """Nor does it mix devices."""
    assert found["waits"][str(case)] == []


def test_a_wait_would_be_seen(found: dict[str, dict[str, Any]]) -> None:
    waiting = {case[0] for case in CASES if found["careless"][str(case)]}
    assert waiting == set(presets()) - {"image", "slotcontrast"}, "which draw nothing"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_compiled_once(case: list[str], found: dict[str, dict[str, Any]]) -> None:
    """Whatever is drawn: a number that torch.compile builds in serves no other, and after eight of them it gives up."""
    assert found["recompiled"][str(case)] == ""
