"""Measures how fast a model trains from a store on this machine, and what bounds it: data, copy or compute."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UsageError, out_of_memory
from featcache.machine import alternate, paired_ratio, timed
from featcache.store.reading import FeatureStore
from featcache.stream.residence import RING
from slotlab.config.schema import Config
from slotlab.training.cost import Tally
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep, matrix_products
from slotlab.training.train import training_stream

RESIDENT = "the same steps on a batch that is on the device already"
WARM_UP = 3  # steps before measuring: they compile, allocate, and touch the files first
SAMPLE_SECONDS = 0.05  # between two samples of the GPU
MATMUL = {"cuda": (8192, 8), "cpu": (1024, 2)}  # side of the matrices, products a measurement


@dataclass(frozen=True)
class Seconds:
    """Median seconds of the parts of a step. The parts overlap in training, so that the largest bounds the step."""

    compute: float  # the whole step on resident data
    data: float  # reading a batch to host memory
    copy: float  # from there to the device

    @property
    def bound(self) -> str:
        parts = asdict(self)
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class TrainingRate:
    """One batch size: the rate from the store, beside the rate on resident data and the device's matrix products.

    FLOPs are those of the matrix products, convolutions and attention of one step, forward and backward.
    """

    name: str
    batch_size: int
    clip: int
    samples_per_s: float
    frames_per_s: float
    limit_frames_per_s: float
    ratio: float  # of the two rates: median of the ratios within a round
    limit: str
    wait_share: float  # share of the time that the device waited for a batch
    seconds: Seconds
    bound: str  # compute, data or copy
    flops_per_step: int
    flops_per_s: float
    matmul_flops_per_s: float  # of one large product in the same precision, in the same rounds
    flop_utilisation: float
    precision: str
    peak_memory_bytes: int | None  # CUDA: allocated by torch; else resident memory with mapped files
    gpu_utilisation: float | None  # mean share of time with a kernel running, by NVML
    gpu_memory_bytes: int | None  # largest use by all processes, by NVML

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class DoesNotFit(UsageError):
    """A batch size that the device's memory does not hold."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.batch_size, self.clip = config.optim.batch_size, config.data.clip
        super().__init__(
            f"--batch-size {self.batch_size}: does not fit in the memory of {device}; choose a smaller one, or "
            "--set optim.accumulate=2"
        )

    @property
    def name(self) -> str:
        return pattern_name(self.batch_size, self.clip)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "batch_size": self.batch_size, "clip": self.clip, "does_not_fit": str(self)}


def pattern_name(batch_size: int, clip: int) -> str:
    return f"batch {batch_size}" + (f" clips of {clip}" if clip > 1 else "")


def flops_of(step: TrainStep, features: Tensor) -> int:
    """FLOPs of one step on a batch (B, ...), from the operators that torch calls. The step is taken."""
    as_written = copy(step)
    as_written.forward = step.as_written  # compiled code is not counted
    with Tally() as tally:  # torch's counter follows modules by hooks, which fail where one is called again and again
        as_written(features)
    flops: int = tally.cost(peak=0, state=0).flops
    return flops


def measure_training(
    config: Config,
    store: FeatureStore,
    device: torch.device | str = "cpu",
    *,
    steps: int = 10,
    rounds: int = 3,
) -> TrainingRate:
    """Rate of training from the store, beside training on resident data and large matrix products, in turns.

    The batch size is the configuration's. Raises :class:`DoesNotFit` if the device's memory does not hold it.
    """
    device = torch.device(device)
    try:
        return _measure(config, store, device, steps, rounds)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # Here the error is gone, and with it its references to the model and to all that its step had allocated.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise DoesNotFit(config, device)


def _measure(config: Config, store: FeatureStore, device: torch.device, steps: int, rounds: int) -> TrainingRate:
    data, optim = config.data, config.optim
    if optim.batch_size % optim.accumulate:
        raise UsageError(f"--batch-size {optim.batch_size}: must be a multiple of optim.accumulate, {optim.accumulate}")
    step = TrainStep.fresh(config, store, Ranks(device))
    stream = training_stream(config, store, Ranks(device))
    part = stream.batch_seconds(2 * RING)
    batches = iter(stream)
    flops = flops_of(step, next(batches).features)
    waits: list[float] = []

    def train(features: Iterator[Tensor]) -> int:
        for batch in features:
            step(batch)
        return steps * optim.batch_size

    def from_store(count: int) -> Iterator[Tensor]:
        return (batch.features for batch in itertools.islice(batches, count))

    def streamed() -> float:
        timed(lambda: train(from_store(RING)), device)  # skip batches that were read ahead during other jobs
        waited, began = stream.wait_seconds, time.perf_counter()
        with gpu:
            achieved = timed(lambda: train(from_store(steps)), device)
        waits.append((stream.wait_seconds - waited) / (time.perf_counter() - began))
        time.sleep(2 * RING * (part.read + part.copy))  # the thread reads ahead now, and not during the next job
        return achieved

    def on_resident() -> float:
        return timed(lambda: train(itertools.repeat(resident, steps)), device)

    gpu = GpuMonitor(device)
    train(from_store(WARM_UP))
    reset_peak_memory(device)
    train(from_store(RING))
    peak = peak_memory(device)  # of training alone: what the measurement itself holds comes after
    resident = next(batches).features.clone()
    jobs = {"stream": streamed, "resident": on_resident, "matmul": matmul_rate(device, optim.precision)}
    rates = alternate(jobs, rounds)
    batches.close()  # type: ignore[attr-defined]

    medians = {name: statistics.median(values) for name, values in rates.items()}
    flops_per_s = medians["stream"] / optim.batch_size * flops
    seconds = Seconds(optim.batch_size / medians["resident"], part.read, part.copy)
    return TrainingRate(
        name=pattern_name(optim.batch_size, data.clip),
        batch_size=optim.batch_size,
        clip=data.clip,
        samples_per_s=medians["stream"],
        frames_per_s=medians["stream"] * data.clip,
        limit_frames_per_s=medians["resident"] * data.clip,
        ratio=paired_ratio(rates, "stream", "resident"),
        limit=RESIDENT,
        wait_share=statistics.median(waits),
        seconds=seconds,
        bound=seconds.bound,
        flops_per_step=flops,
        flops_per_s=flops_per_s,
        matmul_flops_per_s=medians["matmul"],
        flop_utilisation=paired_ratio(rates, "stream", "matmul") / optim.batch_size * flops,
        precision=optim.precision,
        peak_memory_bytes=peak,
        gpu_utilisation=gpu.utilisation,
        gpu_memory_bytes=gpu.memory_bytes,
    )


def matmul_rate(device: torch.device, precision: str) -> Callable[[], float]:
    """A job whose rate is the FLOPs per second of large square matrix products in that precision."""
    side, count = MATMUL.get(device.type, MATMUL["cuda"])
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def work() -> int:
        with matrix_products(precision):
            for _ in range(count):
                torch.mm(left, right, out=out)
        return int(count * 2 * side**3)

    timed(work, device)
    return lambda: timed(work, device)


def convolution_rate(device: torch.device) -> Callable[[], float]:
    """A job whose rate is the FLOPs per second of float32 convolutions of many channels, without padding.

    Where other code computes them than products, it may be the faster: on a processor of AMD, oneDNN multiplies with
    AVX-512 and MKL with AVX2.
    """
    images, channels, side, window = 8, 384, 20, 5
    features = torch.randn(images, channels, side, side, device=device)
    weight = torch.randn(channels, channels, window, window, device=device)

    def work() -> int:
        found = F.conv2d(features, weight)
        return 2 * found.numel() * channels * window**2

    timed(work, device)
    return lambda: timed(work, device)


# -- memory and the GPU --------------------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes since the reset: allocated by torch on CUDA, else resident; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), None)
    return None


class GpuMonitor:
    """Samples a CUDA device by NVML in a ``with`` statement; does nothing elsewhere, or without ``slotlab[bench]``."""

    def __init__(self, device: torch.device) -> None:
        self._busy: list[int] = []  # percent
        self._used: list[int] = []  # bytes
        self._over = threading.Event()
        self._nvml: Any = None
        self._handle: Any = None
        if device.type == "cuda":
            self._nvml, self._handle = _nvml(device)

    def __enter__(self) -> GpuMonitor:
        if self._nvml is not None:
            self._over.clear()
            self._thread = threading.Thread(target=self._watch, name="slotlab-nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is not None:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            with contextlib.suppress(self._nvml.NVMLError):  # some drivers (WSL, MIG slices) report only one of the two
                self._used.append(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
                self._busy.append(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)

    @property
    def utilisation(self) -> float | None:
        return statistics.mean(self._busy) / 100 if self._busy else None

    @property
    def memory_bytes(self) -> int | None:
        return max(self._used, default=None)


def _nvml(device: torch.device) -> tuple[Any, Any]:
    """NVML and the device's handle, by UUID, as CUDA numbers only visible devices; None, None without NVML."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception:  # not installed, no driver, a MIG slice: the figures are then left out
        return None, None
