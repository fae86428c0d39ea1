"""A disk that is full at any write: one line, exit code 3, no file cut short, and what was there stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from featcache.errors import DataError
from featcache.store.durable import Lines
from featcache.store.reading import FeatureStore
from featcache.upkeep.convert import ConvertOptions, convert
from slotlab.runs import checkpoint
from tests.commands import Slotlab
from tests.synthetic import arrays_of, make_store
from tests.training import small

FULL = "No space left on device"


class Disk:
    """Counts writes; from one of them on there is room for half of that one alone."""

    def __init__(self, full_at: int) -> None:
        self.writes, self._full_at = 0, full_at

    def limited(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(fd: int, data: Any, *at: int) -> int:
            self.writes += 1
            if self.writes == self._full_at and len(data) > 1:
                return real(fd, data[: len(data) // 2], *at)
            if self.writes >= self._full_at:
                raise OSError(28, FULL)
            return real(fd, data, *at)

        return write


@contextmanager
def disk(full_at: int = 1 << 30) -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as patch:
        found = Disk(full_at)
        for name in ("write", "pwrite"):
            patch.setattr(os, name, found.limited(getattr(os, name)))
        yield found


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def require_whole(path: Path) -> None:
    if path.suffix in (".png", ".gif"):
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        assert [json.loads(line) for line in path.read_text().splitlines()] or not path.stat().st_size
    elif path.suffix in (".html", ".svg"):
        assert path.read_text().rstrip().endswith(f"</{path.suffix[1:]}>")
    elif path.suffix == ".safetensors":
        load_file(path)


COMMANDS = {
    "masks": ("masks", "{run}", "--out", "out"),
    "run lengths": ("masks", "{run}", "--out", "out", "--format", "rle"),
    "film": ("masks", "{run}", "--out", "out", "--format", "overlay-mp4", "--videos", "1"),
    "sheet": ("eval", "{run}", "--sheet", "out/sheet.png"),
    "report": ("report", "{run}", "--out", "out/r.html", "--markdown", "out/r.md", "--figures", "out/figures"),
    "plot": ("stats", "{store}", "--plot", "out/scale.svg"),
    "export": ("export", "{store}", "out/copy.zarr"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "report" else ()) for n in COMMANDS])
def test_what_a_command_leaves(slotlab: Slotlab, tmp_path: Path, run: Path, store: FeatureStore, name: str) -> None:
    words = [word.format(run=run, store=store.path) for word in COMMANDS[name]]
    with disk() as counted:
        assert slotlab(*words).code == 0
    for full_at in sorted({1, counted.writes // 2, counted.writes}):
        shutil.rmtree(tmp_path / "out")
        for file in [*run.glob("eval-*.json"), *store.path.rglob("references.json")]:
            file.unlink()  # what was kept is not written again
        before = contents(run) | contents(store.path)
        with disk(full_at):
            ended = slotlab(*words)
        kept = full_at == 1 and name in ("sheet", "report")  # scores are shown all the same, and so is why not kept
        references = [*store.path.rglob("references.json")]  # those that are not kept are measured again: no loss
        lost_nothing = ended.code == 0 and (run / "eval-validation.json").exists() and not references
        assert lost_nothing or (FULL in ended.said and (ended.code == 3 or kept)), ended
        if ended.code:
            (line,) = [line for line in ended.said.splitlines() if line.startswith("slotlab: ")]
            assert FULL in line and "; free space" in line
        after = contents(tmp_path)
        assert {path: after[path] for path in before} == before
        assert not any(path.suffix == ".tmp" for path in after), after.keys()
        for path in after:
            require_whole(path)
    if name == "export":  # and the same command goes on
        assert slotlab(*words).code == 0
        assert arrays_of(tmp_path / "out/copy.zarr").keys() == arrays_of(store.path).keys()


@pytest.mark.slow
def test_training_goes_on_where_it_was_full(slotlab: Slotlab, tmp_path: Path, store: FeatureStore) -> None:
    (tmp_path / "c.toml").write_text(small("checkpoint_every=1", optim__steps=2).to_toml())
    words = ("train", "--preset", "dinosaur", "--config", "c.toml", "--cache", store.path, "--out", "run")
    with disk() as counted:
        assert slotlab(*words).code == 0
    for full_at in range(1, counted.writes + 1):
        shutil.rmtree("run")
        with disk(full_at):
            ended = slotlab(*words)
        (line,) = [line for line in ended.said.splitlines() if line.startswith("slotlab: ")]
        assert ended.code == 3 and FULL in line and "--resume" in line
        assert not list(Path().rglob("*.tmp")) and not Path("run/checkpoint.new").exists()
        for path in contents(Path("run")):
            require_whole(path)
        begun = Path("run/config.toml").exists()
        assert slotlab(*words, *(["--resume"] if begun else [])).code == 0
        assert checkpoint.state(Path("run"))["step"] == 2


def test_a_line_is_there_or_not(tmp_path: Path) -> None:
    with Lines(tmp_path / "log") as log:
        log.add("one")
        with disk(1), pytest.raises(DataError, match=f"log: cannot write .{FULL}"):
            log.add("two")
        log.add("three")
    (tmp_path / "log").write_bytes((tmp_path / "log").read_bytes() + b"torn")
    with Lines(tmp_path / "log") as log:
        log.add("four")
    assert (tmp_path / "log").read_text() == "one\nthree\nfour\n"


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path, run: Path) -> None:
    model = torch.nn.Linear(3, 3)
    before = contents(run / checkpoint.FOLDER)
    for full_at in (1, 2, 3):  # model, optimiser, state
        with disk(full_at), pytest.raises(DataError, match=FULL):
            checkpoint.save(run, model, None, torch.optim.Adam(model.parameters()), {"step": 1})
        assert contents(run / checkpoint.FOLDER) == before and not (run / "checkpoint.new").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("form", ["hdf5", "zarr"])
def test_on_a_small_disk(tmp_path: Path, form: Any) -> None:
    """HDF5 writes by itself: here the disk is one."""
    store = make_store(tmp_path / "s.zarr")
    small_disk = tmp_path / "disk"
    small_disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", small_disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(DataError, match=f"cannot write .*{FULL}.*; free space"):
            convert(store.path, small_disk / "copy", ConvertOptions(), form)
        left = [path for path in small_disk.rglob("*") if path.name.endswith(".tmp")]
        assert not left and not (form == "hdf5" and (small_disk / "copy").exists())
    finally:
        subprocess.run(["umount", small_disk], check=True)
