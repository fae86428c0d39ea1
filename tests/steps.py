"""Training steps looked at from inside, in a process of their own.

    python -m tests.steps STORE < CASES

A case is a list of a preset and its overrides. Prints lists of one entry a case, as JSON:

- ``waits``: what its second step on a GPU would wait for, values that the host asks for and copies that block; or the
  error, where devices are mixed. A device that is absent stands in: torch's fake tensors carry shapes, types and
  devices through forward, backward, clipping and optimiser, without any arithmetic.
- ``careless``: the same where random draws are sent as anyone would send them.
- ``recompiled``: the error where torch.compile compiles anything again after the second step; else empty.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from featcache.store.reading import FeatureStore
from featcache.stream.rows import TORCH_DTYPES
from featcache.stream.stream import FeatureStream
from slotlab.config.load import load_config
from slotlab.models.build import build_model
from slotlab.models.inputs import ModelInput
from slotlab.training.speed import Trainee

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
    """Notes every operation for which the host waits until the device has done its work."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.exponential_.default:  # fake tensors know it without a generator only
            return args[0]
        if func is aten._local_scalar_dense.default and args[0].device.type == "cpu":
            return 0
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
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack() if "/slotlab/" in f.filename]
        self.found.append(f"{func} at {' < '.join(reversed(ours))}")


def waits(store: FeatureStore, preset: str, *overrides: str) -> list[str]:
    """What a preset's second step waits for; the error, where it does not get that far."""
    config = load_config(preset, None, overrides)
    model, watch = build_model(config, store), Waits()  # a model needs the store's values: built where there are any
    split = store[config.data.train_split]
    sample = split.array("video" if config.data.tap == "video" else f"features/{ModelInput.of(config, store).tap}")
    shape = (config.optim.batch_size, config.data.clip, *sample.shape[1:])
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        watch,
        patch("slotlab.training.speed.build_model", lambda *_: model),
        patch.object(nn.Module, "to", absent),
    ):
        features = torch.empty(shape, dtype=TORCH_DTYPES[str(sample.dtype)], device=GPU)
        trainee = Trainee(config, store, torch.device(GPU))
        trainee.step(features if config.data.clip > 1 else features[:, 0])
        watch.found.clear()
        try:
            trainee.step(features if config.data.clip > 1 else features[:, 0])
        except Exception as error:
            watch.found.append(f"{type(error).__name__}: {error}")
    return watch.found


def absent(model: nn.Module, device: torch.device) -> nn.Module:
    """In place of ``nn.Module.to``, which cannot turn real tensors into fake ones."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def recompiled(store: FeatureStore, preset: str, *overrides: str) -> str:
    """Why the compiler starts again in the third to the eighth step, if it does."""
    torch.compiler.reset()
    config = load_config(preset, None, overrides)
    trainee = Trainee(config, store, torch.device("cpu"))
    trainee.forward = torch.compile(trainee.model, backend="eager")  # traces and guards as any other, in less time
    tap, data = ModelInput.of(config, store).tap, config.data
    stream = FeatureStream(store[data.train_split], tap, batch_size=config.optim.batch_size, clip=data.clip)
    try:
        for index, batch in enumerate(itertools.islice(stream, 8)):
            torch.compiler.set_stance("default" if index < 2 else "fail_on_recompile")
            trainee.step(batch.features)
    except RuntimeError as error:
        return str(error)
    finally:
        torch.compiler.set_stance("default")
    return ""


def main() -> None:
    store = FeatureStore.open(Path(sys.argv[1]))
    cases = json.load(sys.stdin)
    found: dict[str, list[Any]] = {"recompiled": [recompiled(store, *case) for case in cases]}
    kernels = add_missing_kernels()
    _setup_privateuseone_for_python_backend(GPU.partition(":")[0], backend_module=Backend())
    found["waits"] = [waits(store, *case) for case in cases]
    with patch("slotlab.models.randomness.send", lambda values, device: values.to(device)):
        found["careless"] = [waits(store, *case) for case in cases]
    del kernels
    print(json.dumps(found))


if __name__ == "__main__":
    main()
