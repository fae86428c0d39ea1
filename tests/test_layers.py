"""A linear layer and its ReLU as one operation: values and gradients are torch's, in fewer operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slotlab.models.layers import MLP, linear_relu
from slotlab.training.cost import Tally


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("few_kernels", [False, True])
def test_values_and_gradients_are_torch_s(few_kernels: bool) -> None:
    given = draw(2, 3, 5), draw(4, 5, seed=1), draw(4, seed=2)

    def found(made: Tensor) -> tuple[Tensor, ...]:
        return made, *torch.autograd.grad((made**2).sum() + made.sum(), given)

    torch.testing.assert_close(found(linear_relu(*given, few_kernels)), found(F.relu(F.linear(*given))))
    assert torch.autograd.gradcheck(lambda *parts: linear_relu(*parts, few_kernels), given)
    with torch.no_grad():
        torch.testing.assert_close(linear_relu(*given), F.relu(F.linear(*given)))


def test_a_frozen_layer_gets_no_gradient() -> None:
    input, weight, bias = draw(3, 5), draw(4, 5, seed=1).detach(), draw(4, seed=2)
    linear_relu(input, weight, bias, True).sum().backward()
    assert weight.grad is None and bias.grad is not None and input.grad is not None


@pytest.mark.parametrize("few_kernels", [False, True])
def test_bfloat16_is_that_of_autocast(few_kernels: bool) -> None:
    torch.manual_seed(0)
    layers = nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()
    ours, theirs, x = MLP(*layers), nn.Sequential(*layers), torch.randn(6, 8)
    ours.few_kernels = few_kernels

    def found(module: nn.Module) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            made = module(x)
        return made, *torch.autograd.grad(made.float().square().sum(), list(module.parameters()))

    for one, other in zip(found(ours), found(theirs), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_parameters_have_the_names_of_a_sequence() -> None:
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
    assert MLP(*layers).state_dict().keys() == nn.Sequential(*layers).state_dict().keys()


def test_it_is_one_operation_there_and_four_back() -> None:
    tally = Tally()
    with FakeTensorMode(), tally:
        rows, layer = torch.empty(6, 5, requires_grad=True), MLP(nn.Linear(5, 4), nn.ReLU())
        layer.few_kernels = True
        tally.restart()
        made = layer(rows)
        assert tally.operators == {"_addmm_activation": 1}
        made.backward(torch.empty_like(made))
    assert tally.cost(0, 0).operations == 1 + 4, "back through the ReLU, two products and a sum"
