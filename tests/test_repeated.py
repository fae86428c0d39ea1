"""What a pass calls again and again: values and gradients are those of plain calls, in fewer operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slotlab.config.model import SlotAttentionConfig
from slotlab.config.parts import PredictorConfig
from slotlab.models.competition import EPSILON
from slotlab.models.normalise import Normaliser
from slotlab.models.predictors import TransformerPredictor
from slotlab.models.randomness import Draws
from slotlab.models.recurrence import Recurrence
from slotlab.models.repeated import Repeated
from slotlab.models.slot_attention import SlotAttention
from slotlab.models.slot_model import SlotModel
from slotlab.training.cost import Tally

B, T, N, K, S = 3, 4, 16, 5, 8

Call = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(result: Tensor, *parts: nn.Module | Tensor) -> list[Tensor]:
    """Of a loss that no two values of the result share, by all parameters and tensors; 0 where there is none."""
    wanted = [t for part in parts for t in (part.parameters() if isinstance(part, nn.Module) else [part])]
    loss = (result * draw(*result.shape, seed=9)).sum()
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def chained_cell(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """A recurrent cell, each call on the result of the one before."""
    state = x.tanh()
    for _ in range(3):
        state = call(x, state)
    return state


def chained_predictor(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    active = torch.arange(S) < 6
    for _ in range(3):
        x = call(x, active.expand(len(x), -1))
    return call(x, active.expand(len(x), -1)) + x


def two_of_three(module: nn.Module, call: Call, x: Tensor) -> Tensor:
    """The result of one call is not looked at, and another is seen without gradients."""
    call(2 * x)
    with torch.no_grad():
        x = call(x)
    return call(x) + call(x + 1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[nn.Module, Call, Tensor], Tensor]]] = {
    "cell": (lambda: nn.GRUCell(S, S), (6, S), chained_cell),
    "layers": (lambda: nn.Sequential(nn.LayerNorm(S), nn.Linear(S, S), nn.ReLU()), (6, S), two_of_three),
    "predictor": (
        lambda: TransformerPredictor(K, PredictorConfig(kind="transformer", hidden=16, heads=1, output_norm=True)),
        (B, S, K),
        chained_predictor,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_plain_calls(name: str) -> None:
    make, shape, use = CASES[name]
    torch.manual_seed(0)
    module, x = make().double(), draw(*shape).requires_grad_()
    plain, repeated = use(module, module, x), use(module, Repeated(module, 3), x)
    assert torch.equal(plain, repeated)
    torch.testing.assert_close(gradients(repeated, module, x), gradients(plain, module, x))
    assert all(p.requires_grad for p in module.parameters())


def test_what_is_frozen_stays_so() -> None:
    module = nn.Sequential(nn.Linear(S, S), nn.Linear(S, S)).double()
    module[0].requires_grad_(False)
    x, call = draw(6, S).requires_grad_(), Repeated(module, 2)
    call(call(x)).sum().backward()
    assert [p.grad is None for p in module.parameters()] == [True, True, False, False]
    assert not module[0].weight.requires_grad and x.grad is not None


def test_a_further_call_costs_its_own_way_back_alone() -> None:
    """Of a linear layer: the product forward, and the gradient of its input; two concatenations grow and stay two."""

    def operations(calls: int) -> int:
        tally = Tally()
        with FakeTensorMode(), tally:
            layer, x = nn.Linear(S, S), torch.empty(6, S, requires_grad=True)
            call = Repeated(layer, calls)
            tally.restart()
            for _ in range(calls):
                x = call(x)
            x.backward(torch.empty_like(x))
        return tally.cost(0, 0).operations

    assert operations(5) - operations(4) == operations(9) - operations(8) == 2


# -- slot attention ----------------------------------------------------------------------------------------


def as_published(module: SlotAttention, inputs: Tensor, slots: Tensor, iterations: int) -> Tensor:
    """Algorithm 1 of Locatello et al. (2020), line by line, with the weights of ours."""
    inputs = module.norm_inputs(inputs)
    key, value = module.to_key(inputs), module.to_value(inputs)
    for _ in range(iterations):
        before = slots
        query = module.to_query(module.norm_slots(slots))
        attention = (module.scale * query @ key.transpose(1, 2)).softmax(1)  # (B, K, N)
        weights = attention + EPSILON
        updates = weights / weights.sum(-1, keepdim=True) @ value
        state = nn.GRUCell.forward(module.gru, updates.flatten(0, 1), before.flatten(0, 1))
        slots = state.view_as(before)
        slots = slots + module.mlp(slots) if module.mlp is not None else slots
    return slots


@pytest.mark.parametrize("mlp_hidden", [0, 16])
def test_slot_attention_is_the_published_one(mlp_hidden: int) -> None:
    torch.manual_seed(0)
    module = SlotAttention(12, S, mlp_hidden, temperature=0.5).double()
    inputs, slots = draw(B, N, 12).requires_grad_(), draw(B, K, S, seed=1).requires_grad_()
    inputs_far = inputs + torch.eye(N, 12).double() * 50  # slots that hold next to nothing
    for given in (inputs, inputs_far):
        ours, theirs = module(given, slots, 3).slots, as_published(module, given, slots, 3)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(ours, module, given, slots), gradients(theirs, module, given, slots))


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 2, "predictor": {"first_iterations": 2}},
        {"iterations": 1, "predictor": {"first_iterations": 3, "refresh": 2}},
        {"iterations": 1, "predictor": {"first_iterations": 2}, "fewest_slots": 2, "initializer": "learnt"},
        {"iterations": 2, "predictor": {"first_iterations": 2}, "gradient": "bilevel", "initializer": "learnt"},
    ],
    ids=str,
)
def test_frames_at_once_are_frames_in_turn(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no gradient passes between them: output and every gradient."""
    predictor = {"kind": "transformer", "hidden": 16, "heads": 2, "stop_gradient": True, **options.pop("predictor")}  # type: ignore[dict-item]
    config = SlotAttentionConfig.model_validate(
        {"slots": K, "slot_dim": S, "slot_mlp_hidden": 16, "decoder": {"kind": "mix", "hidden": 16}, **options}
        | {"predictor": predictor}
    )
    torch.manual_seed(0)
    model, clips = SlotModel(config, Normaliser("none", 12), (4, 4)), draw(B, T, N, 12).float()

    def found() -> list[Tensor]:
        output = model(clips, Draws(1))
        loss = F.mse_loss(output.reconstruction, output.target) + output.slots.square().mean()
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [output.slots, output.attention, *torch.autograd.grad(loss, parameters)]

    at_once = found()
    monkeypatch.setattr(Recurrence, "_apart", lambda self: False)
    torch.testing.assert_close(at_once, found(), rtol=1e-4, atol=1e-6)
