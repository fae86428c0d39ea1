"""What a step costs, counted on fake tensors: by hand where that can be done, and against the allocator."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from featcache.stream.staging import Format
from slotlab.config.load import load_config, presets
from slotlab.config.schema import Config
from slotlab.models.build import empty_model
from slotlab.models.inputs import Features, Frames, ModelInput, Tracks
from slotlab.models.randomness import Draws, Request, Share, Undrawn
from slotlab.training.cost import Cost, Tally, Work, count_step
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep, freeze_unreached
from slotlab.training.train import batch_samples
from tests.synthetic import fitted
from tests.test_step import CASES, ON_HOST, shortened

CPU = torch.device("cpu")


def inputs_of(config: Config, side: int = 8, dim: int = 96) -> tuple[ModelInput, Format]:
    """A model's input, and its batch of features of that grid and width, or of frames of twice its resolution."""
    if config.model.kind == "pixel":
        pixels = config.model.resolution
        shape = (*batch_samples(config), 2 * pixels, 2 * pixels, 3)
        return Frames("video", (pixels, pixels), 3), Format(shape, torch.uint8)
    if config.model.kind == "dynamics":
        shape = (*batch_samples(config), 4, dim + side**2 + 2)
        return Tracks("tracks", (side, side), dim, "block1", 4, refined=True), Format(shape, torch.float16)
    return Features("block1", (side, side), dim), Format((*batch_samples(config), side**2, dim), torch.float16)


def counted(config: Config, *, on_gpu: bool = False) -> Cost:
    inputs, batch = inputs_of(config)
    return count_step(config, inputs, batch, on_gpu=on_gpu)


def allocated(work: Callable[[], object]) -> int:
    """The highest sum of bytes that torch's allocator gives out while ``work`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


# -- operations --------------------------------------------------------------------------------------------


def test_a_linear_layer_is_three_products() -> None:
    """Forward, the gradient of the inputs and that of the weight, each of 2 B I O FLOPs; a bias' gradient is a sum."""
    rows, wide, narrow = 32, 48, 16
    tally = Tally()
    with FakeTensorMode(), tally:
        layer, x = nn.Linear(wide, narrow), torch.empty(rows, wide, requires_grad=True)
        tally.restart()
        out = layer(x)
        assert dict(tally.work) == {
            Work(2 * rows * wide * narrow, 4 * (rows * wide + wide * narrow + narrow + rows * narrow), torch.float32): 1
        }
        tally.restart()
        out.backward(torch.empty_like(out))
    cost = Cost(tally.work, 0, 0, 0)
    assert cost.flops == 2 * 2 * rows * wide * narrow
    assert cost.operations == 3


def test_views_cost_nothing_and_memory_is_given_back() -> None:
    tally = Tally()
    with FakeTensorMode(), tally:
        x = torch.empty(1000, dtype=torch.float64)
        assert (tally.live, tally.peak, dict(tally.work)) == (8000, 8000, {})
        view = x.view(10, 100)[:5].transpose(0, 1)
        assert (tally.live, dict(tally.work)) == (8000, {})
        doubled = x * 2
        assert tally.live == 16000 and dict(tally.work) == {Work(0, 16000, None): 1}
        del doubled
        x.add_(1.0)
        spread = torch.empty(1, dtype=torch.float64).expand(1000) + x  # one value is read
        assert tally.work[Work(0, 8 + 16000, None)] == 1
        del spread, x
        assert tally.live == 8000, "the view holds it"
        del view
    assert (tally.live, tally.peak) == (0, 16008)


def test_attention_and_depthwise_convolutions_are_counted() -> None:
    tally = Tally()
    with FakeTensorMode(), tally:
        q, k, v = (torch.empty(2, 4, 10, 8, requires_grad=True) for _ in range(3))
        nn.functional.scaled_dot_product_attention(q, k, v)
        assert Cost(tally.work, 0, 0, 0).flops == 2 * 2 * 2 * 4 * 10 * 10 * 8
        tally.restart()
        nn.functional.conv2d(torch.empty(2, 6, 5, 5), torch.empty(6, 1, 3, 3), groups=6)
        assert Cost(tally.work, 0, 0, 0).flops == 2 * 2 * 6 * 9 * 3 * 3


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 2, 1), (2, 1, 1), (1, 4, 2), (3, 0, 1)])
def test_a_convolution_is_counted_where_it_meets_values(stride: int, padding: int, dilation: int) -> None:
    """A window of ones on ones sums to the number of products."""
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    sizes = (2, 3, 9, 7), (4, 3, 5, 3)
    products = 2 * float(nn.functional.conv2d(*(torch.ones(size) for size in sizes), **options).sum())
    tally = Tally()
    with FakeTensorMode(), tally:
        features, weight = (torch.empty(size, requires_grad=True) for size in sizes)
        out = nn.functional.conv2d(features, weight, **options)
        assert Cost(tally.work, 0, 0, 0).flops == products
        out.backward(torch.empty_like(out))
        assert Cost(tally.work, 0, 0, 0).flops == 3 * products


def test_a_composite_is_taken_apart_where_autograd_does_not() -> None:
    tally = Tally()
    with FakeTensorMode(), tally, torch.inference_mode():
        nn.functional.linear(torch.empty(3, 5), torch.empty(7, 5))
    assert Cost(tally.work, 0, 0, 0).flops == 2 * 3 * 5 * 7


# -- a step ------------------------------------------------------------------------------------------------

SIZES = {  # at which the test is fast, and the step's tensors outweigh what kernels hold for themselves
    "dinosaur": ("optim.batch_size=16", "model.decoder.hidden=128"),
    "default": ("optim.batch_size=16", "data.normalize=slow=32"),
    "mix": ("optim.batch_size=16",),
    "savi-dinosaur": ("optim.batch_size=4", "model.decoder.hidden=128", "data.clip=3"),
    "log-2026-video": ("optim.batch_size=2", "data.clip=2"),
    **{
        preset: (*fitted(preset), *shortened(preset), "optim.batch_size=4", "model.decoder.hidden=128")
        for preset in ("grounded", "slotcontrast", "slotcurri", "videosaur")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_its_memory_is_what_the_allocator_gives_out(preset: str) -> None:
    usual = (*fitted(preset), *shortened(preset), "optim.batch_size=4")
    config = load_config(preset, None, SIZES.get(preset, usual))
    inputs, batch = inputs_of(config)
    features = (255 * torch.rand(batch.shape)).to(batch.dtype)
    features = features if config.data.clip > 1 else features[:, 0]

    def steps() -> None:
        model = empty_model(config, inputs)
        if not config.loss.reconstructs:
            freeze_unreached(model, config, features[:1], Draws(0))
        step = TrainStep(config, model, Ranks(CPU))
        for _ in range(2):
            step(features)

    assert counted(config).peak == pytest.approx(allocated(steps), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + ON_HOST, ids=str)
def test_every_preset_is_counted_without_memory(case: list[str]) -> None:
    preset, *overrides = case
    config = load_config(preset, None, [*fitted(preset), *shortened(preset), *overrides])
    costs: list[Cost] = []
    assert allocated(lambda: costs.append(counted(config, on_gpu=True))) < 1 << 20
    (cost,) = costs
    assert cost.flops > 6 * cost.parameters and cost.operations > 30
    assert cost.peak > cost.state > 16 * cost.parameters, "weights, gradients, two moments"


@pytest.mark.slow
def test_no_preset_needs_more_operations_than_the_page_says() -> None:
    """At its own batch, on 256 patches of 384 values: a GPU waits for the launch of each."""
    page = (Path(__file__).parent.parent / "docs/gpu.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\| (\d+) \|[^|]*\| (\d+) \|", page, re.M)
    said = {name: (int(now), int(outside)) for name, now, outside in rows}
    assert set(said) == set(presets())
    for preset, (most, outside) in said.items():
        config = load_config(preset)
        found = count_step(config, *inputs_of(config, side=16, dim=384), on_gpu=True)
        assert 0.9 * most < found.operations <= most, f"{preset}: {found} operations; if that has to be, write it down"
        assert found.operations - found.passes == outside, preset


@pytest.mark.slow
def test_operations_do_not_grow_with_the_batch_and_flops_do() -> None:
    one, two = (counted(load_config("mix", None, [f"optim.batch_size={size}"]), on_gpu=True) for size in (16, 32))
    assert one.operations == two.operations
    assert two.flops == pytest.approx(2 * one.flops, rel=0.03), "products of weights alone do not grow"
    assert one.peak < two.peak < 2 * one.peak


@pytest.mark.slow
def test_a_gpu_launches_fewer_for_a_recurrent_cell() -> None:
    config = load_config("log-2026-video", None, ["optim.batch_size=2", "data.clip=2"])
    there, here = counted(config, on_gpu=True), counted(config)
    assert there.operations < 0.8 * here.operations
    assert here.flops < there.flops < 1.2 * here.flops, "values hold the cell's gates: three times as wide"


@pytest.mark.slow
def test_settings_that_change_its_memory_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slotlab.training.cost.ROWS", 1 << 10)  # what is computed again is a part of all

    def peak(*overrides: str) -> int:
        return counted(load_config("dinosaur", None, [*SIZES["dinosaur"], *overrides]), on_gpu=True).peak

    usual = peak()
    assert peak("model.decoder.recompute=true") < 0.75 * usual
    assert peak("optim.accumulate=4") < 0.5 * usual
    assert peak("optim.precision=bfloat16") < 0.8 * usual
    assert peak("optim.compile=true", "optim.cuda_graphs=true") == usual, "counted as it would be without"


@pytest.mark.parametrize(
    "request_", [Request("normal", (4, 3), 0, None), Request("exponential", (2, 4, 5), 1, None),
                 Request("uniform", (4, 1), 0, None), Request("integers", (9, 2), 0, None),
                 Request("choice", (9, 4), 0, None)]
)  # fmt: skip
def test_draws_without_values_have_their_shapes(request_: Request) -> None:
    drawn, undrawn = (kind.of_step(0, 3, Share(1, 2)).drawn(request_) for kind in (Draws, Undrawn))
    assert (drawn.shape, drawn.dtype, drawn.device) == (undrawn.shape, undrawn.dtype, undrawn.device)
