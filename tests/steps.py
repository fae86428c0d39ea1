"""The training loop looked at from inside, in a process of its own.

    python -m tests.steps STORE TRACKS < CASES

A case is a list of a preset and its overrides. Prints, as JSON, for each case:

- ``waits``: what the host would wait for on a GPU in each of three steps of the loop, from one batch to the next, the
  first and the last of them logged: values that it asks for and copies that block; or the error, where devices are
  mixed. A device that is absent stands in: torch's fake tensors carry shapes, types and devices through forward,
  backward, clipping and optimiser, without any arithmetic.
- ``careless``: for the first case of each preset, the same of two steps where random draws are sent as anyone would
  send them.
- ``recompiled``: the error where torch.compile cannot trace a step as it is on CUDA, or compiles anything again after
  the second; else empty.
- ``pieces``: how many graphs torch.compile makes of a step.
- ``on_cuda``: for each precision, of the forward pass and the losses on fake CUDA tensors: the error, if there is one,
  such as of tensors on two devices; operators without a CUDA kernel; what should be float32 and is not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import slotlab
from featcache.store.reading import FeatureStore
from featcache.stream.residence import Home
from featcache.stream.rows import TORCH_DTYPES
from featcache.stream.stream import Batch
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.models.build import build_model
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import Draws
from slotlab.training.losses import losses
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep
from slotlab.training.train import batch_samples, train, training_stream

PACKAGE = Path(slotlab.__file__).parent  # not every folder of that name: a checkout may have it, too
GPU = "absent:0"
aten = torch.ops.aten


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def add_missing_kernels() -> torch.library.Library:
    """Shapes of the operators for which torch has no meta kernel."""
    library = torch.library.Library("aten", "IMPL", "Meta")

    def gru(inputs: Tensor, hidden: Tensor, state: Tensor, *biases: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(state), state.new_empty(len(state), 5 * state.shape[1])

    def gru_backward(gradient: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
        rows, width = gradient.shape
        gates = [gradient.new_empty(rows, 3 * width) for _ in range(2)]
        biases = [gradient.new_empty(3 * width) if has_bias else None for _ in range(2)]
        return (*gates, torch.empty_like(gradient), *biases)

    library.impl("_thnn_fused_gru_cell", gru)
    library.impl("_thnn_fused_gru_cell_backward", gru_backward)
    return library


class Waits(TorchDispatchMode):
    """Notes every operation for which the host waits until the device has done its work, and lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.exponential_.default:  # fake tensors know it without a generator only
            return args[0]
        if func is aten._local_scalar_dense.default:  # a value that is asked for: of a run that goes well
            if args[0].device.type != "cpu":
                self.note(func)
            return torch.iinfo(torch.int64).max if args[0].dtype == torch.int64 else 1
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.note(func)
            raise
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            blocks = not (kwargs.get("non_blocking") or (func is aten.copy_.default and True in args[2:]))
            if blocks and source.device.type != result.device.type:
                self.note(func)
        return result

    def note(self, func: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)]
        self.found.append(f"{func} at {' < '.join(ours)}")


def batch_form(config: Config, store: FeatureStore) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape (B, T, ...) and type of a batch as it is stored."""
    split = store[config.data.train_split]
    tap = ModelInput.of(config, store).tap
    stored = split.array("video" if tap == "video" else f"features/{tap}")
    return (*batch_samples(config), *stored.shape[1:]), TORCH_DTYPES[str(stored.dtype)]


class AbsentStream:
    """In place of a :class:`FeatureStream`: the trainer's batches on the absent device."""

    wait_seconds = 0.0
    home = Home("device", "where it is looked at")

    def __init__(self, config: Config, store: FeatureStore, watch: Waits, steps: int) -> None:
        (batch, clip, *row), self.dtype = batch_form(config, store)
        self.shape = (batch, *row) if config.data.clip == 1 else (batch, clip, *row)
        self.watch = watch
        self.found: list[list[str]] = [[] for _ in range(steps)]  # what each step has waited for

    def __iter__(self) -> Iterator[Batch]:
        features = torch.empty(self.shape, dtype=self.dtype, device=GPU)
        for found in self.found:
            self.watch.found = found
            yield Batch(features, np.zeros(len(features), np.int64), 0)
        raise Enough


class Enough(Exception):
    """The steps that are looked at have been taken."""


def waits(store: FeatureStore, steps: int, preset: str, *overrides: str) -> list[list[str]]:
    """What each of the first steps of a preset's loop waits for; and the error, where it ends."""
    config = load_config(preset, None, [*overrides, "log_every=3"])
    model, watch = build_model(config, store), Waits()  # a model needs the store's values: built where there are any
    stream = AbsentStream(config, store, watch, steps)
    with (
        tempfile.TemporaryDirectory() as folder,
        FakeTensorMode(allow_non_fake_inputs=True),
        watch,
        patch("slotlab.training.step.build_model", lambda *_: model),
        patch("slotlab.training.train.FeatureStream", lambda *_, **__: stream),
        patch.object(nn.Module, "to", absent),
    ):
        try:
            train(config, store, Path(folder) / "run", device=GPU)
        except Enough:
            pass
        except Exception as error:
            watch.found.append(f"{type(error).__name__}: {error}")
    return stream.found


class Kernels(TorchDispatchMode):
    """Notes operators that this torch has no CUDA kernel for, and a softmax in less than float32."""

    SOFTMAX = (aten._softmax.default, aten._log_softmax.default)
    KEYS = ("CUDA", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")

    def __init__(self) -> None:
        super().__init__()
        self.missing: set[str] = set()
        self.coarse: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.exponential_.default, aten.is_pinned.default, aten._pin_memory.default):
            return args[0] if func is not aten.is_pinned.default else False
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cuda" for tensor in results) and func.namespace == "aten":
            if not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in self.KEYS):
                self.missing.add(func.name())
            if func in self.SOFTMAX and args[0].dtype != torch.float32:
                self.coarse.add(f"{func.name()} of {args[0].dtype}")
        return result


def on_cuda(store: FeatureStore, preset: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """By precision, what :class:`Kernels` notes of a forward pass and its losses, and the error, if there is one."""
    found = {}
    for precision in ("float32", "bfloat16"):
        config, kernels, error = load_config(preset, None, list(overrides)), Kernels(), ""
        model = build_model(config, store)
        shape, dtype = batch_form(config, store)
        with FakeTensorMode(allow_non_fake_inputs=True), kernels:
            absent(model, torch.device("cuda:0"))
            features = torch.empty(shape, dtype=dtype, device="cuda:0")
            try:
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                    output = model(features if config.data.clip > 1 else features[:, 0], Draws(0))
                    values = losses(output, config.loss)
                exact = {"slots": output.slots, "attention": output.attention, "masks": output.masks, **values}
                kernels.coarse |= {name for name, value in exact.items() if value.dtype != torch.float32}
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
        found[precision] = {"error": error, "missing": sorted(kernels.missing), "coarse": sorted(kernels.coarse)}
    return found


def absent(model: nn.Module, device: torch.device) -> nn.Module:
    """In place of ``nn.Module.to``, which cannot turn real tensors into fake ones."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def compiled(store: FeatureStore, preset: str, *overrides: str) -> tuple[str, int]:
    """Why the compiler cannot trace a step, or starts again after the second; and its graphs of a step."""
    torch.compiler.reset()
    config = load_config(preset, None, [*overrides, "optim.compile=true"])
    graphs: list[torch.fx.GraphModule] = []

    def traced(graph: torch.fx.GraphModule, inputs: Any) -> Any:  # and guarded as for any backend, in less time
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    with (
        patch("torch.compile", lambda module, mode: compile(module, backend=traced)),
        patch("slotlab.models.randomness.send", sent_to_cuda),
    ):
        step = TrainStep.fresh(config, store, Ranks(torch.device("cpu")))
        try:
            for index, batch in enumerate(itertools.islice(training_stream(config, store, step.ranks), 5)):
                torch.compiler.set_stance("default" if index < 2 else "fail_on_recompile")
                step(batch.features)
        except RuntimeError as error:
            return str(error), len(graphs)
        finally:
            torch.compiler.set_stance("default")
    return "", len(graphs)


def sent_to_cuda(values: Tensor, device: torch.device | None) -> Tensor:
    """In place of ``send``: what its branch for CUDA is to the compiler, which has no kernel to trace that pins.

    The stream's thread draws the frames to read while this one compiles, and is not traced.
    """
    traced = torch.compiler.is_compiling() and threading.current_thread() is threading.main_thread()
    return values.pin_memory() if traced else values


def main() -> None:
    features, tracks = (FeatureStore.open(Path(path)) for path in sys.argv[1:])
    cases = json.load(sys.stdin)
    stores = [tracks if case[0] == "dynamics" else features for case in cases]
    found: dict[str, list[Any]] = {}
    found["recompiled"], found["pieces"] = map(
        list, zip(*(compiled(store, *case) for store, case in zip(stores, cases, strict=True)), strict=True)
    )
    kernels = add_missing_kernels()
    able = {"torch.cuda.amp.common.amp_definitely_not_available": False, "torch.cuda.is_bf16_supported": True}
    with contextlib.ExitStack() as stack:
        for question, answer in able.items():  # that autocast asks of a device that is not there
            stack.enter_context(patch(question, lambda *_, answer=answer, **__: answer))
        found["on_cuda"] = [on_cuda(store, *case) for store, case in zip(stores, cases, strict=True)]
    _setup_privateuseone_for_python_backend(GPU.partition(":")[0], backend_module=Backend())
    found["waits"] = [waits(store, 3, *case) for store, case in zip(stores, cases, strict=True)]
    with patch("slotlab.models.randomness.send", lambda values, device: values.to(device)):
        first = {case[0]: case for case in reversed(cases)}  # of each preset: a variant draws no otherwise
        found["careless"] = [
            waits(store, 2, *case) if case is first[case[0]] else [[], []]
            for store, case in zip(stores, cases, strict=True)
        ]
    del kernels
    print(json.dumps(found))


if __name__ == "__main__":
    main()
