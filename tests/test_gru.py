"""The recurrent cell is torch's, whose input may be mapped before: values, gradients, operations on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slotlab.config.model import GRUHidden
from slotlab.models.gru import GRU
from slotlab.models.slot_attention import SlotAttention
from slotlab.training.cost import Tally

ROWS, S = 6, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.fixture
def kernels() -> Iterator[None]:
    """The two operators that torch has for CUDA alone, on a CPU, by their formula."""
    library = torch.library.Library("aten", "IMPL", "CPU")

    def there(gates: Tensor, hidden: Tensor, state: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
        reset, update, new = (gates + biases[0]).chunk(3, 1)
        from_reset, from_update, from_new = (hidden + biases[1]).chunk(3, 1)
        reset, update = torch.sigmoid(reset + from_reset), torch.sigmoid(update + from_update)
        new = torch.tanh(new + reset * from_new)
        return new + update * (state - new), torch.cat([reset, update, new, state, from_new], 1)

    def back(gradient: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
        reset, update, new, state, from_new = workspace.chunk(5, 1)
        of_update = gradient * (state - new) * update * (1 - update)
        of_new = gradient * (1 - update) * (1 - new * new)
        of_reset = of_new * from_new * reset * (1 - reset)
        gates = torch.cat([of_reset, of_update, of_new], 1)
        hidden = torch.cat([of_reset, of_update, of_new * reset], 1)
        sums = (gates.sum(0), hidden.sum(0)) if has_bias else (None, None)
        return gates, hidden, gradient * update, *sums

    library.impl("_thnn_fused_gru_cell", there)
    library.impl("_thnn_fused_gru_cell_backward", back)
    yield
    library._destroy()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("few_kernels", [None, True])
def test_values_and_gradients_are_torch_s(few_kernels: bool | None) -> None:
    torch.manual_seed(0)
    ours, theirs = GRU(S, S).double(), nn.GRUCell(S, S).double()
    ours.load_state_dict(theirs.state_dict())  # one checkpoint
    ours.few_kernels = few_kernels
    input, state = draw(ROWS, S), draw(ROWS, S, seed=1)

    def found(made: Tensor, cell: nn.GRUCell) -> tuple[Tensor, ...]:
        return made, *torch.autograd.grad((made**2).sum() + made.sum(), [input, state, *cell.parameters()])

    mapped = F.linear(input, ours.weight_ih) if few_kernels else input
    torch.testing.assert_close(found(ours(mapped, state), ours), found(theirs(input, state), theirs))
    assert torch.autograd.gradcheck(ours, (draw(*mapped.shape, seed=2), state))


@pytest.mark.usefixtures("kernels")
def test_a_frozen_cell_passes_its_gradient_on() -> None:
    cell = GRU(S, S).double().requires_grad_(False)
    cell.few_kernels = True
    input, state = draw(ROWS, 3 * S), draw(ROWS, S, seed=1)
    cell(input, state).sum().backward()
    assert input.grad is not None and state.grad is not None and cell.weight_hh.grad is None


def test_on_a_gpu_it_is_a_product_and_a_kernel_there_and_back() -> None:
    tally = Tally()
    with FakeTensorMode(), tally:
        cell = GRU(S, S).requires_grad_(False)
        cell.few_kernels = True
        input, state = (torch.empty(ROWS, width, requires_grad=True) for width in (3 * S, S))
        tally.restart()
        after = cell(input, state)
        assert tally.operators == {"mm": 1, "_thnn_fused_gru_cell": 1}
        tally.restart()
        after.backward(torch.empty_like(after))
    assert tally.operators == {"_thnn_fused_gru_cell_backward": 1, "addmm": 1}


@pytest.mark.usefixtures("unchecked", "kernels")
@pytest.mark.parametrize("few_kernels", [False, True])
def test_it_is_written_out_where_it_is_compiled(few_kernels: bool) -> None:
    """torch's cell is one CUDA kernel that nothing is fused with, and has no shapes for the compiler."""
    cell, called = GRU(S, S).double(), []
    cell.few_kernels = few_kernels
    given = draw(ROWS, 3 * S if few_kernels else S), draw(ROWS, S, seed=1)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def found(made: Tensor) -> tuple[Tensor, ...]:
        return made, *torch.autograd.grad(made.square().sum(), [*given, cell.weight_hh, cell.bias_ih, cell.bias_hh])

    compiled = torch.compile(cell, backend=backend, fullgraph=True)
    torch.testing.assert_close(found(compiled(*given)), found(cell(*given)))
    assert sum("linear" in name for name in called) == 2 - few_kernels
    assert not [name for name in called if "gru" in name]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("gru_hidden", ["slots", "normalised"])
def test_slots_are_the_same_where_the_map_of_the_input_is_applied_to_the_values(gru_hidden: GRUHidden) -> None:
    torch.manual_seed(0)
    module = SlotAttention(5, S, 8, gru_hidden=gru_hidden).double()
    inputs, slots = draw(2, 9, 5), draw(2, 3, S, seed=1)

    def found(few_kernels: bool) -> tuple[Tensor, ...]:
        module.gru.few_kernels = few_kernels
        made = module(inputs, slots, 3).slots
        return made, *torch.autograd.grad((made**3).sum(), [inputs, slots, *module.parameters()])

    torch.testing.assert_close(found(True), found(False))
