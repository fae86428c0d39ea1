"""The training loop as a GPU meets it: between logged steps nothing waits for it, and a step is compiled once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slotlab.config.load import load_config, presets
from slotlab.config.model import RecurrentConfig
from tests.synthetic import fitted, make_store
from tests.training import tracked, tracks_of

pytestmark = pytest.mark.slow

VARIANTS = [
    ["default", "optim.accumulate=2"],
    ["dinosaur", "optim.ema=0.9", "model.decoder.recompute=true"],
    ["dinosaur", "model.decoder.patches=5", "model.decoder.masks=gumbel"],
    ["dinosaur", "model.initializer=kmeans++", "model.gradient=bilevel", "model.decoder.masks=straight_through"],
    ["dinosaur-ar", "model.decoder.permuted=true"],
    ["log-2026", "model.decoder.recompute=true", "loss.layer_norm_mse=1.0"],
    ["savi-dinosaur", "model.fewest_slots=2"],
    ["mix", "model.decoder.patches=5", "loss.cosine=1.0", "loss.diversity=0.1", "loss.sharpness=0.1"],
]
ON_HOST = [[preset] for preset in presets() if load_config(preset).model.on_host]
CASES = [[preset] for preset in presets() if [preset] not in ON_HOST] + VARIANTS


def shortened(preset: str) -> list[str]:
    """Overrides under which a step says the same in less time: what is repeated, is repeated once."""
    model = load_config(preset).model
    if not isinstance(model, RecurrentConfig):
        return []
    predictor = ["model.predictor.first_iterations=2"] if model.predictor is not None else []
    rounds = ["model.kmeans_rounds=2"] if model.initializer == "kmeans" else []
    return ["model.iterations=2", *predictor, *rounds]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What :mod:`tests.steps` finds: name of the finding -> case -> finding."""
    folder = tmp_path_factory.mktemp("step")
    store, tracks = make_store(folder / "store.zarr"), tracks_of(tracked(folder))
    done = subprocess.run(
        [sys.executable, "-m", "tests.steps", str(store.path), str(tracks.path)],
        input=json.dumps([[case[0], *fitted(case[0]), *shortened(case[0]), *case[1:]] for case in CASES + ON_HOST]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = list(map(str, CASES + ON_HOST))
    return {name: dict(zip(names, of_cases, strict=True)) for name, of_cases in json.loads(done.stdout).items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loop_waits_for_the_gpu_at_logged_steps_alone(case: list[str], found: dict[str, dict[str, Any]]) -> None:
    """Nor does it mix devices. A row is read there, by the loop and nothing below it."""
    first, between, last = found["waits"][str(case)]
    assert between == []
    for logged in (first, last):
        assert logged and all(" at train.py:" in wait or " at step.py:" in wait for wait in logged), logged
        assert not any("randomness" in wait or "models" in wait for wait in logged)


def test_a_wait_would_be_seen(found: dict[str, dict[str, Any]]) -> None:
    waiting = {case[0] for case in CASES if found["careless"][str(case)][1]}
    # which draw nothing in a pass
    idle = {"default", "image", "slotcontrast", "slotcurri", "savi-dinosaur", "dynamics-dense"}
    assert waiting == {case[0] for case in CASES} - idle


@pytest.mark.parametrize("case", ON_HOST, ids=str)
def test_what_computes_on_the_host_is_not_one_graph(case: list[str], found: dict[str, dict[str, Any]]) -> None:
    """Else it need not be left out above."""
    assert found["pieces"][str(case)] > 1


@pytest.mark.parametrize("case", CASES + ON_HOST, ids=str)
def test_a_step_is_compiled_once(case: list[str], found: dict[str, dict[str, Any]]) -> None:
    """Whatever is drawn: a number that torch.compile builds in serves no other, and after eight of them it gives up."""
    assert found["recompiled"][str(case)] == ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_compiled_as_one_graph(case: list[str], found: dict[str, dict[str, Any]]) -> None:
    """So that a GPU gets its kernels in one launch."""
    assert found["pieces"][str(case)] == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_cuda_everything_has_a_kernel_and_slots_and_losses_are_float32(
    case: list[str], found: dict[str, dict[str, Any]]
) -> None:
    """In bfloat16 too; nor are devices mixed, which is an error of the pass."""
    for precision, of in found["on_cuda"][str(case)].items():
        assert of["error"] == "" and of["coarse"] == [], precision
        assert of["missing"] == [] or torch.version.cuda is None, precision


def test_the_page_says_whose_steps_can_be_one_graph(found: dict[str, dict[str, Any]]) -> None:
    """Nothing in it may wait for the device, and it must be compiled as a whole; else the page says why it is not."""
    page = (Path(__file__).parent.parent / "docs/gpu.md").read_text()
    said = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no)(?: \||: \w+ .* on the host)", page, re.M))
    can = {case[0]: found["pieces"][str(case)] == 1 for case in CASES + ON_HOST if len(case) == 1}
    assert said == {preset: "yes" if can[preset] else "no" for preset in presets()}
