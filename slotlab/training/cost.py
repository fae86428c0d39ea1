"""What a step of training needs: memory, FLOPs, bytes to move and operations, counted without computing anything.

The step is :class:`slotlab.training.step.TrainStep` itself, taken on torch's fake tensors, which have shapes, types and
lifetimes, and no values. They stand for tensors of a CPU, so that it is counted alike on every machine; where a GPU
does otherwise, that is said in :func:`as_on_a_gpu`. An allocator's fragments are not seen, and kernels' own scratch
memory only where it is as large as their operands.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from featcache.stream.staging import Format
from slotlab.config.schema import Config
from slotlab.models.base import Model
from slotlab.models.build import empty_model
from slotlab.models.clustering.model import ClusteringModel
from slotlab.models.decoders.broadcast import ROWS, MLPDecoder
from slotlab.models.gru import GRU
from slotlab.models.inputs import ModelInput
from slotlab.models.layers import MLP
from slotlab.models.randomness import Undrawn
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep, freeze_unreached

Shape = Sequence[int]
aten = torch.ops.aten


class Work(NamedTuple):
    """One operation: FLOPs, bytes of all operands and results, the type of its products (None without FLOPs), and
    whether it is a convolution."""

    flops: int
    bytes: int
    dtype: torch.dtype | None
    convolution: bool = False


@dataclass(frozen=True)
class Cost:
    """Of a step, or of one pass."""

    work: Mapping[Work, int]  # how often each is done
    peak: int  # the most bytes that are held at one time, the batch left out
    state: int  # of them those that stay between steps: parameters, buffers, gradients, optimiser
    parameters: int  # trained numbers
    operators: Mapping[str, int] = field(default_factory=dict)  # the operations of ``work`` by torch's names
    passes: int = 0  # of the operations those of forward pass, losses and backward pass, which CUDA graphs may hold

    @property
    def flops(self) -> int:
        """Of matrix products, convolutions and attention."""
        return sum(work.flops * count for work, count in self.work.items())

    @property
    def bytes(self) -> int:
        """Read and written, if no cache held anything from one operation to the next."""
        return sum(work.bytes * count for work, count in self.work.items())

    @property
    def operations(self) -> int:
        """Operations that compute or copy: kernels to launch, or nearly so. Views are none."""
        return sum(self.work.values())


def count_step(config: Config, inputs: ModelInput, batch: Format, *, on_gpu: bool) -> Cost:
    """A step of eager training on a batch (B, T, ...), in the steady state: the optimiser has its state.

    ``optim.compile`` is left out: what a compiler saves is not foreseen. ``optim.accumulate`` must divide B.
    """
    config = config.model_copy(
        update={"optim": config.optim.model_copy(update={"compile": False, "cuda_graphs": False})}
    )
    tally = Tally()
    with torch.random.fork_rng(devices=[]), Fake(), tally:
        model = empty_model(config, inputs)
        if on_gpu:
            as_on_a_gpu(model)
        features = torch.empty(batch.shape, dtype=batch.dtype)
        if config.data.clip == 1:
            features = features[:, 0]
        if not config.loss.reconstructs:
            freeze_unreached(model, config, features[:1], Undrawn(0))
        step = Counted(config, model, tally)
        step.source = Undrawn
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        step.optimizer.step()  # makes its state
        tally.restart()
        step(features)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        cost = tally.cost(tally.peak - batch.bytes, tally.live - batch.bytes, parameters)
        return replace(cost, passes=step.passes)


class Counted(TrainStep):
    """A step that notes how many of its operations find the gradients."""

    def __init__(self, config: Config, model: Model, tally: Tally) -> None:
        super().__init__(config, model, Ranks(torch.device("cpu")))
        self.tally, self.passes = tally, 0

    def gradients(self, features: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found = super().gradients(features)
        self.passes = sum(self.tally.work.values())
        return found


class Fake(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Tensors without values. A copy of a model, as of its averaged weights, belongs to the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fake:
        return self


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation while it is entered, and the memory that their results hold, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Counter[Work] = Counter()
        self.operators: Counter[str] = Counter()
        self.live = self.peak = 0  # bytes
        self._held: set[int] = set()  # storages, by address

    def restart(self) -> None:
        """Forget the operations so far, and the highest memory; what is held stays."""
        self.work.clear()
        self.operators.clear()
        self.peak = self.live

    def cost(self, peak: int, state: int, parameters: int = 0) -> Cost:
        """All that was noted, with the memory and the parameters that the caller knows of."""
        return Cost(dict(self.work), peak, state, parameters, dict(self.operators))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # a question, such as for a tensor's device
            return func(*args, **kwargs)
        if func in STAND_INS:
            result = STAND_INS[func](*args, **kwargs)
        else:
            if func._overloadpacket not in FLOPS:
                with self:
                    result = func.decompose(*args, **kwargs)  # a composite, which nothing before has taken apart
                if result is not NotImplemented:
                    return result
            result = func(*args, **kwargs)
        results = _tensors(result)
        for tensor in results:
            self._hold(tensor.untyped_storage())
        if func in SCRATCH:
            self.peak = max(self.peak, self.live + SCRATCH[func](*args))
        if not (func.is_view or func._overloadpacket in FREE):
            operands = _tensors((args, kwargs))
            count = FLOPS.get(func._overloadpacket)
            flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
            moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*operands, *results))
            dtype = operands[0].dtype if flops else None
            self.work[Work(flops, moved, dtype, func._overloadpacket in CONVOLUTIONS)] += 1
            self.operators[func._overloadpacket.__name__] += 1
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return
        self._held.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self._held.discard(key)
            self.live -= size

        weakref.finalize(storage, free).atexit = False


def as_on_a_gpu(model: nn.Module) -> None:
    """Let a model compute on a CPU's tensors as it would on a GPU's: the broadcast decoder takes more rows at a time,
    a linear layer and its ReLU are one kernel, frames pass the encoder of ``default`` together, and a GRU cell is a
    product and one kernel."""
    for part in model.modules():
        if isinstance(part, MLPDecoder):
            part.rows = ROWS
        elif isinstance(part, ClusteringModel):
            part.by_turns = False
        elif isinstance(part, MLP | GRU):
            part.few_kernels = True


def _gru(gates: Tensor, hidden: Tensor, state: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state), state.new_empty(len(state), 5 * state.shape[1])


def _gru_backward(gradient: Tensor | None, workspace: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    rows, width = len(workspace), workspace.shape[1] // 5
    gates = [workspace.new_empty(rows, 3 * width) for _ in range(2)]
    biases = [workspace.new_empty(3 * width) if has_bias else None for _ in range(2)]
    return (*gates, workspace.new_empty(rows, width), *biases)


STAND_INS: dict[Any, Callable[..., Any]] = {  # for operators of CUDA alone: the shapes of their results
    aten._thnn_fused_gru_cell.default: _gru,
    aten._thnn_fused_gru_cell_backward.default: _gru_backward,
}

SCRATCH: dict[Any, Callable[..., int]] = {  # bytes that an operator holds beside its results
    aten.mse_loss.default: lambda found, true, *_: 2 * max(found.nbytes, true.nbytes),  # all errors, allocated twice
}

FREE = {  # beside views: what touches no values
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view,
    aten.lift_fresh, aten.detach_,
}  # fmt: skip


def convolution_flops(
    features: Shape, weight: Shape, bias: Shape | None, *options: Any, out_shape: Shape, **rest: Any
) -> int:
    """FLOPs of a convolution where its window is on the features: padding can be skipped, and a CPU does.

    torch's formula counts the padding, too: a sixth more for a window of 5 on a grid of 16 x 16.
    """
    stride, padding, dilation, transposed = options[:4]
    counted = int(conv_flop_count(list(features), list(weight), list(out_shape), transposed))
    if transposed:
        return counted
    axes = zip(features[2:], weight[2:], out_shape[2:], stride, padding, dilation, strict=True)
    return round(counted * math.prod(_share_inside(*axis) for axis in axes))


def _share_inside(length: int, window: int, places: int, stride: int, padding: int, dilation: int) -> float:
    """The share of a window's entries that lie on ``length`` values, over all its places along an axis."""
    entries = [stride * place - padding + dilation * entry for place in range(places) for entry in range(window)]
    return sum(0 <= entry < length for entry in entries) / len(entries)


def convolution_backward_flops(
    gradient: Shape, features: Shape, weight: Shape, bias: Any, *options: Any, out_shape: Sequence[Shape | None]
) -> int:
    """FLOPs of a convolution's backward pass: those of a forward pass for each gradient that is needed.

    torch's formula ignores groups, and so counts a depthwise convolution of C channels C times.
    """
    wanted = sum(shape is not None for shape in out_shape[:2])  # the features' and the weight's
    return wanted * convolution_flops(features, weight, None, *options, out_shape=gradient)


def _attention_flops(query: Shape, key: Shape, value: Shape, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flops(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _product_flops(added: Shape, one: Shape, other: Shape, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * math.prod(one) * other[-1]


CORRECTED: dict[Any, Callable[..., int]] = {  # formulas of shapes that torch's counter has wrong, or lacks
    aten.convolution: convolution_flops,
    aten.convolution_backward: convolution_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten._addmm_activation: _product_flops,
    aten.addmm_: _product_flops,
    aten.baddbmm_: _product_flops,
}

CONVOLUTIONS = (aten.convolution, aten.convolution_backward)

FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{operator: shape_wrapper(formula) for operator, formula in CORRECTED.items()},  # type: ignore[no-untyped-call]
}


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
