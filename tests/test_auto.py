"""What ``auto`` settles of an extraction: by the machine and the frames, and never by a clock."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from featcache import machine
from featcache.backbones import inference
from featcache.backbones.backbone import Backbone, load_backbone
from featcache.backbones.inference import choose_batch_size, choose_precision, relative_error
from featcache.extraction.extract import decoders, extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.words import Precision
from tests.synthetic import DiscSource

AUTO = ExtractOptions()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("dinov2_vits14", weights="random", taps=("block2", "block1.key"), input_size=28)


@pytest.mark.slow
def test_what_auto_settles_no_busy_moment_tips(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clock is read, and with every core busy the same command gives the same store, byte for byte."""
    source = DiscSource()
    for clock in ("perf_counter", "perf_counter_ns", "monotonic", "process_time", "thread_time", "time"):
        monkeypatch.setattr(time, clock, lambda clock=clock: pytest.fail(f"read time.{clock}"))
    todo = plan(tmp_path / "quiet.zarr", source, backbone, AUTO)
    monkeypatch.undo()
    quiet = extract(todo, source, backbone).path
    with busy(2 * (os.cpu_count() or 1)):
        beside = extract(plan(tmp_path / "busy.zarr", source, backbone, AUTO), source, backbone).path
    files = {p.relative_to(quiet) for p in quiet.rglob("*") if p.is_file()} - {Path(".lock")}
    assert files == {p.relative_to(beside) for p in beside.rglob("*") if p.is_file()} - {Path(".lock")}
    assert [name for name in files if (quiet / name).read_bytes() != (beside / name).read_bytes()] == []


@contextlib.contextmanager
def busy(workers: int) -> Iterator[None]:
    """That many processes that do nothing but compute."""
    spin = [sys.executable, "-c", "print('on', flush=True)\nwhile True: sum(range(1000))"]
    spinning = [subprocess.Popen(spin, stdout=subprocess.PIPE) for _ in range(workers)]
    try:
        for process in spinning:
            assert process.stdout is not None and process.stdout.readline() == b"on\n"
        yield
    finally:
        for process in spinning:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "precision"), [(4, "float32"), (3, "bfloat16"), (16, "float32")])
def test_a_store_lends_what_it_was_made_with(
    tmp_path: Path, backbone: Backbone, batch_size: int, precision: Precision
) -> None:
    """Also one by an earlier version, which measured: none of its values has to be what is chosen now."""
    made, source = replace(AUTO, batch_size=batch_size, precision=precision, max_videos=1), DiscSource()
    extract(plan(tmp_path / "s.zarr", source, backbone, made), source, backbone)
    resumed = plan(tmp_path / "s.zarr", source, backbone, AUTO)
    assert (resumed.spec.batch_size, resumed.spec.precision) == (batch_size, precision)
    split = extract(resumed, source, backbone)["train"]
    assert split.complete and len(split.videos) == 5


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 fsrm", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("Features\t: fp asimd", False),
        ("", False),
    ],
)
def test_the_processor_says_what_it_can_do(tmp_path: Path, flags: str, native: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
        assert machine.native_bfloat16.__wrapped__() == native
        patch.setattr(machine, "CPUINFO", tmp_path / "absent")
        assert not machine.native_bfloat16.__wrapped__()


@pytest.mark.parametrize(("capability", "precision"), [((6, 1), "float32"), ((7, 0), "float16"), ((12, 0), "float16")])
def test_a_gpu_s_capability_decides(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert inference.fast_precision(torch.device("cuda")) == precision


def test_precision_is_chosen_by_its_measured_error(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = [DiscSource().read("train", index).frames for index in (0, 2)]
    error = relative_error(backbone, videos, "bfloat16")
    assert 1e-5 < error < 0.2
    for native, limit, chosen in ((True, 2, "bfloat16"), (True, 0.5, "float32"), (False, 2, "float32")):
        monkeypatch.setattr(inference, "native_bfloat16", lambda native=native: native)
        monkeypatch.setattr(inference, "MAX_RELATIVE_ERROR", limit * error)
        assert choose_precision(backbone, videos) == chosen


def test_the_error_is_measured_on_frames_of_several_videos(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def recorded(_: Backbone, videos: list[np.ndarray]) -> Precision:
        seen.extend(videos)
        return "float32"

    monkeypatch.setattr("featcache.extraction.plan.choose_precision", recorded)
    source = DiscSource({"train": (24,) * 9})
    plan(tmp_path / "s.zarr", source, backbone, AUTO)
    assert [len(frames) for frames in seen] == [5, 5, 5]  # of videos 0, 3 and 6
    assert np.array_equal(seen[1], source.read("train", 3).frames[::5])
    seen.clear()
    plan(tmp_path / "s.zarr", DiscSource({"train": (1, 1)}), backbone, AUTO)
    assert [len(frames) for frames in seen] == [1, 1]
    seen.clear()
    images = DiscSource({"train": (1,) * 320})
    plan(tmp_path / "s.zarr", images, backbone, AUTO)
    assert [len(frames) for frames in seen] == [1] * 32, "of all the set, and not of its first pictures"
    assert all(np.array_equal(frame, images.read("train", 10 * at).frames) for at, frame in enumerate(seen))


@pytest.mark.parametrize(
    ("frame", "free", "batch"),
    [(10, 10_000, 32), (1, 10_000, 128), (9_000, 10_000, 1), (10, 150, 8), (10, 5, 1)],
)
def test_a_batch_on_a_gpu_is_what_fits(
    frame: int, free: int, batch: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the whole memory, in half of it; others that hold most of it now are worth a line."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1_000))
    monkeypatch.setattr(inference, "_frame_memory", lambda *_: frame)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert choose_batch_size(gpu, "float16") == batch
    assert ("are free" in caplog.text) == (free < 1_000)


def test_a_batch_on_a_cpu_is_fixed(backbone: Backbone) -> None:
    assert choose_batch_size(backbone, "float32") == choose_batch_size(backbone, "bfloat16") == 8


def test_a_format_that_overflows_is_not_chosen(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """What overflows in a block is NaN after the next norm, and NaN compares as false."""
    overflowing = load_backbone("dinov2_vits14", weights="random", taps=("block1", "block2"), input_size=28)
    real = type(overflowing).__call__

    class Overflowing(type(overflowing)):  # type: ignore[misc]
        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = real(self, images)
            return tokens | {"block2": tokens["block2"] * torch.nan} if torch.is_autocast_enabled("cpu") else tokens

    overflowing.__class__ = Overflowing
    monkeypatch.setattr(inference, "native_bfloat16", lambda: True)
    assert choose_precision(overflowing, [DiscSource().read("train", 0).frames]) == "float32"


def test_a_gpu_gets_several_decoding_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for cores, threads in ((2, 2), (8, 4), (64, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert (decoders(cuda), decoders(cpu)) == (threads, 2)
