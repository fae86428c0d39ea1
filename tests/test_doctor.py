"""What is said of a machine: why its GPU is left alone, what torch lacks there, and where Windows is in the way."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from featcache import machine
from featcache.machine import chosen, on_windows_drive, unused_gpu
from featcache.store.reading import FeatureStore
from slotlab.commands import doctor
from tests.commands import Slotlab

CPU = torch.device("cpu")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NVIDIA's driver, of which torch sees nothing."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && echo 570.86.16\n')
    program.chmod(0o755)
    monkeypatch.setattr(machine, "NVIDIA_SMI", (str(program),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "does not serve CUDA 13.0" in unused_gpu() and "update the driver" in unused_gpu()
    assert chosen(CPU).startswith("device: cpu, ") and chosen(CPU).endswith(unused_gpu())
    found = doctor.examine_gpus()
    assert found == {"torch_cuda": "13.0", "nvidia_driver": "570.86.16", "gpus": unused_gpu()}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch has no CUDA" in unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpu() == "the NVIDIA GPU is hidden by CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_gpu() == ""


def test_without_one_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NVIDIA_SMI", ("nvidia-smi-of-no-one",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unused_gpu() == "" and ";" not in chosen(CPU)
    assert doctor.nvidia_driver() == "none"


def test_a_driver_that_does_not_answer_is_reported(driver: Path) -> None:
    driver.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.nvidia_driver().startswith("does not answer")


@pytest.mark.parametrize(
    ("built", "missing"), [(["sm_90", "sm_120"], False), (["sm_80", "compute_90"], False), (["sm_80", "sm_90"], True)]
)
def test_a_card_is_compared_with_torch_s_code(
    monkeypatch: pytest.MonkeyPatch, driver: Path, built: list[str], missing: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 5090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (31_200_000_000, 33_600_000_000))
    properties = SimpleNamespace(total_memory=33_600_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("featcache.stream.staging.page_locked", lambda size: None)
    found = doctor.examine_gpus()
    assert found["gpus"] == ["NVIDIA GeForce RTX 5090"]
    assert found["gpu_memory"] == ["31.2 GB of 33.6 GB free"]
    assert found["page_locked"] == "0.3 GB not to be had"
    (capability,) = found["gpu_capability"]
    assert capability == ("12.0: this torch has code for sm_80 sm_90 alone" if missing else "12.0")


def test_what_compiling_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert doctor.compiler() == "present"
    (tmp_path / "Python.h").unlink()
    assert doctor.compiler().startswith("Python.h missing") and "python3-dev" in doctor.compiler()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.compiler().startswith("a C compiler and Python.h missing")


def test_drives_of_windows_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path("/mnt/c/Users/me/cache.zarr"), Path("/mnt/data/cache.zarr"), Path("/home/me"), Path("/mnt/d")]
    assert not any(map(on_windows_drive, paths))
    monkeypatch.setattr(platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    assert [on_windows_drive(path) for path in paths] == [True, False, False, True]


def test_train_names_its_device_first(shared_store: FeatureStore, slotlab: Slotlab, driver: Path) -> None:
    command = ("train", "--cache", shared_store.path, "--steps", 1, "--batch-size", 2, "--normalize", "slow=8")
    ended = slotlab(*command, "--set", "model.slots=4", "--device", "cpu")
    first, second, *_ = ended.said.splitlines()
    assert first == chosen(CPU) and unused_gpu() in first
    assert second.startswith("features (")
