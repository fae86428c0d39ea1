"""The benchmarks: they measure what the trainer and the extractor do, and say it in the promised form."""

from __future__ import annotations

import json
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import cli
from featcache.bench.stream import measure_stream
from featcache.errors import UsageError
from featcache.store.reading import FeatureStore
from featcache.stream.staging import Format
from featcache.stream.stream import FeatureStream
from featcache.upkeep.convert import ConvertOptions, convert
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.models.inputs import ModelInput
from slotlab.training.cost import CORRECTED, count_step
from slotlab.training.processes import Ranks
from slotlab.training.speed import DoesNotFit, GpuMonitor, Seconds, flops_of, measure_training
from slotlab.training.step import Taken, TrainStep
from slotlab.training.train import batch_samples
from tests.synthetic import DiscSource, fitted, make_store

CPU = torch.device("cpu")
SMALL = (  # for the synthetic store: 12 channels, a 4x4 grid
    "model.slots=4", "model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "optim.batch_size=4",
    "optim.warmup_steps=0", "optim.decay=constant", "optim.learning_rate=1e-3",
)  # fmt: skip
SETS = tuple(part for override in SMALL for part in ("--set", override))


def small(*overrides: str) -> Config:
    return load_config("dinosaur", None, [*SMALL, *overrides])


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    cli.app(["bench", *arguments, "--json"], standalone_mode=False)
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


# -- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["raw", "sharded"])
def test_each_pattern_stands_beside_its_limit(tmp_path: Path, layout: str) -> None:
    store = make_store(tmp_path / "raw.zarr", DiscSource({"train": (7, 6)}))
    if layout == "sharded":
        convert(store.path, tmp_path / "sharded.zarr", ConvertOptions("int8", shard_videos=2))
        store = FeatureStore.open(tmp_path / "sharded.zarr")
    rates = {rate.name: rate for rate in measure_stream(store["train"], "block1", rounds=1, batches=1)}
    warm = {f"{job} {what}" for job in ("read", "stream") for what in ("clips 32x6", "clips 128x6", "frames 1024")}
    assert set(rates) - {"cold frames", "cold videos"} == warm  # a temporary folder may be in memory
    for rate in rates.values():
        assert {"name", "bytes_per_s", "limit_bytes_per_s", "ratio"} <= rate.as_dict().keys()
        if not rate.name.startswith("cold"):  # a median of several rounds, whatever was asked for
            assert rate.ratio == pytest.approx(rate.bytes_per_s / rate.limit_bytes_per_s, abs=0.01)


def test_the_parts_of_a_batch_are_timed_apart(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FeatureStream(store["train"], "block1", batch_size=4)
    gather = stream._readers["features"].gather

    def slow(*arguments: Any) -> None:
        time.sleep(0.02)
        gather(*arguments)

    monkeypatch.setattr(stream._readers["features"], "gather", slow)
    part = stream.batch_seconds(3)
    assert part.read >= 0.02 and part.copy == 0
    assert stream.samples_seen == 0, "measuring takes nothing from the stream"


# -- training ----------------------------------------------------------------------------------------------


def test_what_is_measured_is_the_trainer_s_step(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the steps that are counted and timed: a slower step is a lower rate."""
    taken: list[int] = []
    measured = TrainStep.__call__

    def slow(step: TrainStep, features: torch.Tensor) -> Taken:
        taken.append(len(features))
        time.sleep(0.05)
        return measured(step, features)

    monkeypatch.setattr(TrainStep, "__call__", slow)
    rate = measure_training(small(), store, steps=2, rounds=1)
    assert len(taken) > 2 * 2 and set(taken) == {4}
    assert rate.samples_per_s < 4 / 0.05 and rate.limit_frames_per_s < 4 / 0.05


@pytest.mark.slow
def test_flops_are_counted_of_the_model_as_written(store: FeatureStore) -> None:
    """And the step that is counted changes what a step changes."""
    counts = []
    for options in ((), ("optim.compile=true",)):
        step = TrainStep.fresh(small(*options), store, Ranks(CPU))
        before = [parameter.clone() for parameter in step.model.parameters()]
        counts.append(flops_of(step, torch.randn(4, 16, 12)))
        assert not all(map(torch.equal, before, step.model.parameters()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("preset", ["dinosaur", "log-2026"])
def test_flops_are_those_that_torch_counts(shared_store: FeatureStore, preset: str) -> None:
    """Of modules that a pass calls again and again, torch's counter fails in the trained step: there a plan's count."""
    config = load_config(preset, None, fitted(preset))
    step = TrainStep.fresh(config, shared_store, Ranks(CPU))
    samples = batch_samples(config)
    features = torch.randn(*samples, 16, 12)
    counted = flops_of(step, features[:, 0] if config.data.clip == 1 else features)
    if preset == "dinosaur":
        with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
            step(features[:, 0])
        assert counted == counter.get_total_flops() > 0
    else:
        inputs = ModelInput.of(config, shared_store)
        batch = Format(tuple(features.shape), torch.float32)
        assert counted == count_step(config, inputs, batch, on_gpu=False).flops > 0


def test_training_is_reported_with_what_bounds_it(store: FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--batch-size", "2", "--batch-size", "4")
    fast = ("--steps", "2", "--rounds", "1", "--device", "cpu")
    report = run_command(capsys, "train", "--cache", str(store.path), "--preset", "dinosaur", *SETS, *sizes, *fast)
    two, four = report["patterns"]
    assert [two["batch_size"], four["batch_size"]] == [2, 4]
    assert four["flops_per_step"] == pytest.approx(2 * two["flops_per_step"], rel=0.02)  # some are of parameters alone
    for pattern in (two, four):
        assert pattern["ratio"] == pytest.approx(pattern["frames_per_s"] / pattern["limit_frames_per_s"])
        assert pattern["flops_per_s"] == pytest.approx(
            pattern["flops_per_step"] * pattern["samples_per_s"] / pattern["batch_size"]
        )
        assert pattern["flop_utilisation"] == pytest.approx(pattern["flops_per_s"] / pattern["matmul_flops_per_s"])
        assert pattern["seconds"]["copy"] == 0 and pattern["bound"] in ("compute", "data")
        assert 0 <= pattern["wait_share"] <= 1
        assert pattern["gpu_utilisation"] is None and pattern["gpu_memory_bytes"] is None


@pytest.mark.parametrize(("largest", "name"), [((2, 1, 1), "compute"), ((1, 2, 1), "data"), ((1, 1, 2), "copy")])
def test_the_largest_part_bounds_the_step(largest: tuple[int, int, int], name: str) -> None:
    assert Seconds(*largest).bound == name


def test_a_table_is_printed_for_people(store: FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "train", "--cache", str(store.path), "--preset", "dinosaur", *SETS, "--steps", "1"]
    cli.app([*command, "--rounds", "1", "--device", "cpu"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "batch 4" in printed and "bound by" in printed and "(float32)" in printed


@pytest.mark.slow
def test_a_size_that_does_not_fit_ends_no_ladder(
    store: FeatureStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory"))
    sizes = [part for size in (1, 4, 2) for part in ("--batch-size", str(size))]
    command = ["train", "--cache", str(store.path), "--preset", "dinosaur", *SETS, *sizes, "--steps", "1"]
    command += ["--rounds", "1", "--device", "cpu"]
    one, four, two = run_command(capsys, *command)["patterns"]
    assert one["samples_per_s"] > 0 and two["samples_per_s"] > 0
    assert (four["name"], four["batch_size"], four["clip"]) == ("batch 4", 4, 1)
    assert "--batch-size 4: does not fit" in four["does_not_fit"]
    cli.app(["bench", *command], standalone_mode=False)
    printed = capsys.readouterr()
    assert "--batch-size 4: does not fit in the memory of cpu" in " ".join(printed.err.split())
    assert "batch 4" in printed.out and "does not fit" in printed.out and "batch 2" in printed.out
    with pytest.raises(UsageError, match="--batch-size 4: does not fit"):  # where none does, there is no table
        run_command(capsys, "train", "--cache", str(store.path), "--preset", "dinosaur", *SETS, "--device", "cpu")


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_cost_their_forward_once_for_each_gradient(groups: int, transposed: bool) -> None:
    features = torch.randn(2, 8, 5, 5, requires_grad=True)
    weight = torch.randn(8, 8 // groups, 3, 3, requires_grad=True)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    with FlopCounterMode(display=False) as forward:
        convolve(features, weight, groups=groups)
    sides = 5 if transposed else 3  # of what the products are summed over
    assert forward.get_total_flops() == 2 * 2 * 8 * (8 // groups) * 9 * sides**2
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as both:
        convolve(features, weight, groups=groups).sum().backward()
    assert both.get_total_flops() == 3 * forward.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as one:
        convolve(features.detach(), weight, groups=groups).sum().backward()
    assert one.get_total_flops() == 2 * forward.get_total_flops()


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 29.50 GiB"),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),  # page-locked memory is used up
    MemoryError(),
]


def too_large(monkeypatch: pytest.MonkeyPatch, largest: int, error: BaseException) -> list[weakref.ref[TrainStep]]:
    """Batches above ``largest`` do not fit; the steps that have tried one."""
    tried: list[weakref.ref[TrainStep]] = []
    fitting = TrainStep.gradients

    def gradients(step: TrainStep, features: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(features) > largest:
            tried.append(weakref.ref(step))
            raise error
        return fitting(step, features)

    monkeypatch.setattr(TrainStep, "gradients", gradients)
    return tried


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_one_line_and_leaves_nothing_behind(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    tried = too_large(monkeypatch, 2, error)
    with pytest.raises(DoesNotFit, match="--batch-size 4: does not fit in the memory of cpu; choose a smaller one"):
        measure_training(small(), store, steps=1, rounds=1)
    error.__traceback__ = None  # which the test holds, and no one else
    assert [step() for step in tried] == [None], "the next size needs its memory"


def test_other_errors_of_a_device_stay_what_they_are(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    too_large(monkeypatch, 2, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure_training(small(), store, steps=1, rounds=1)


def test_parts_that_are_not_equal_are_refused(store: FeatureStore) -> None:
    with pytest.raises(UsageError, match="--batch-size 4: must be a multiple of optim.accumulate, 3"):
        measure_training(small("optim.accumulate=3"), store)


def test_a_gpu_is_watched_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    busy = iter(range(10, 1000, 10))
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=next(busy)),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=7 << 30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr("slotlab.training.speed.SAMPLE_SECONDS", 0.01)
    monitor = GpuMonitor(torch.device("cuda:1"))
    for _ in range(2):  # rounds add up
        with monitor:
            time.sleep(0.1)
    assert asked == ["GPU-1234"]
    assert monitor.utilisation is not None and monitor.utilisation > 0.1
    assert monitor.memory_bytes == 7 << 30


def test_what_a_driver_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As WSL's, of utilisation; and nothing is said on stderr."""
    raised: list[object] = []

    class NVMLError(Exception):
        pass

    def unsupported(handle: str) -> None:
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: "handle",
        nvmlDeviceGetUtilizationRates=unsupported,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5 << 30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr("slotlab.training.speed.SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with GpuMonitor(torch.device("cuda:0")) as monitor:
        time.sleep(0.1)
    assert raised == []
    assert monitor.utilisation is None and monitor.memory_bytes == 5 << 30


def test_without_nvml_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import fails
    for device in ("cpu", "cuda"):
        with GpuMonitor(torch.device(device)) as monitor:
            pass
        assert monitor.utilisation is None and monitor.memory_bytes is None


# -- extraction --------------------------------------------------------------------------------------------


def test_extraction_stands_beside_the_bare_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--backbone", "resnet18", "--weights", "random", "--input-size", "32", "--device", "cpu")
    fixed = ("--videos", "1", "--rounds", "1", "--batch-size", "8", "--precision", "float32")
    report = run_command(capsys, "extract", *model, *fixed)
    (pattern,) = report["patterns"]
    assert report["backbone"] == "resnet18" and pattern["name"] == "extract resnet18"
    assert (pattern["frames"], pattern["batch_size"], pattern["precision"]) == (24, 8, "float32")
    assert (
        0
        < pattern["ratio"]
        == pytest.approx(pattern["frames_per_s"] / pattern["limit_frames_per_s"], rel=0.01, abs=1e-3)
    )
