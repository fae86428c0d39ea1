"""HDF5 files are read by a process of their own: on some damaged files libhdf5 ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks.corruptions import BAD, Reader
from benchmarks.readable import KINDS
from featcache.errors import DataError
from featcache.sources import hdf5_file, open_source
from featcache.sources.damaged import SoundVideos
from featcache.upkeep.convert import open_origin
from tests.commands import Slotlab
from tests.media import oblong

ROWS = 4
# Reads as the real one does, but for row 2, whose damage kills it.
DYING = """
import os, signal, sys
sys.path.append(sys.argv[1] if sys.argv[1:] else {folder!r})
import hdf5_child
real = hdf5_child.answer
def answer(path, name, what, key):
    if what == "rows" and (key == 2 or isinstance(key, tuple) and key[0] == 2):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(path, name, what, key)
hdf5_child.answer = answer
hdf5_child.main()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as made:
        made["video"] = np.stack([oblong(3) + k for k in range(ROWS)])
    return path


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reader of another process, that ends as libhdf5 may end it."""
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(folder=str(Path(hdf5_file.__file__).parent)))
    hdf5_file._stop()
    monkeypatch.setattr(hdf5_file, "_CHILD", script)
    yield
    hdf5_file._stop()


def test_what_ends_the_library_is_one_line_and_the_rest_is_read(file: Path, dying: None) -> None:
    source = open_source(file)
    for _ in range(2):
        with pytest.raises(DataError, match=r"a.h5: its damage ends the program that reads it \(SIGSEGV\); copy or"):
            source.read("train", 2)
        with h5py.File(file) as opened:
            np.testing.assert_array_equal(source.read("train", 3).frames, opened["video"][3])
    prints = source.fingerprints("train")
    assert len(set(prints)) == ROWS
    sound = SoundVideos(source)
    assert sound.lengths("train") == (3,) * 3 and list(sound.damaged("train")) == ["train_00002"]


@pytest.mark.slow
def test_by_the_command(file: Path, dying: None, slotlab: Slotlab) -> None:
    words = ("extract", "--backbone", "resnet18", "--weights", "random", "--input-size", 32, "--out", "s.zarr")
    ended = slotlab(*words, "--data", file)
    assert ended.code == 3 and "a.h5: its damage ends the program that reads it (SIGSEGV)" in ended.said
    ended = slotlab(*words, "--data", file, "--out", "t.zarr", "--skip-damaged", "--json")
    assert ended.code == 0 and ended.json["splits"] == {"train": 9}


def test_several_threads_get_their_own_rows(file: Path) -> None:
    source = open_source(file)
    with h5py.File(file) as opened:
        rows = opened["video"][...]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda index: source.read("train", index % ROWS).frames, range(60)))
    assert all(np.array_equal(frames, rows[index % ROWS]) for index, frames in enumerate(found))


def test_what_an_interrupt_left_unread_answers_no_other_request(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(file)
    real = hdf5_file.pickle.load

    def interrupted(stream: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hdf5_file.pickle, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.read("train", 0)
    monkeypatch.setattr(hdf5_file.pickle, "load", real)
    with h5py.File(file) as opened:
        np.testing.assert_array_equal(source.read("train", 1).frames, opened["video"][1])


def test_it_ends_with_the_process_that_asked(file: Path) -> None:
    code = (
        "import os, sys; from featcache.sources import hdf5_file, open_source; from pathlib import Path;"
        "open_source(Path(sys.argv[1])); print(hdf5_file._child[1].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    for _ in range(100):
        try:
            os.kill(int(ended.stdout), 0)
        except ProcessLookupError:
            break
        with open(f"/proc/{int(ended.stdout)}/stat") as state:
            if state.read().split()[2] == "Z":  # ended, and nobody asks how
                break
        signal.sigtimedwait([], 0.05)
    else:
        pytest.fail("it goes on")


def test_other_files_of_features_too(tmp_path: Path, slotlab: Slotlab) -> None:
    path = tmp_path / "features.h5"
    path.write_bytes(b"no HDF5")
    ended = slotlab("import", path, "o.zarr")
    assert ended.code == 3 and f"{path}: Unable to synchronously open file (file signature not found)" in ended.said
    with h5py.File(path, "w") as made:
        made["features/block12"] = np.zeros((3, 4, 8), np.float16)
        made["video"], made["video_offsets"] = oblong(3), np.array([0, 3])
        made["instances"] = [b"[{}]"]
    split = open_origin(path).splits["train"]
    with pytest.raises(DataError, match="instances: video 0 is damaged"):
        split.read(0, ["video"])


@pytest.mark.slow
def test_small_damages_of_hdf5(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind.name.startswith("hdf5")]
    reader = Reader(tmp_path, 0, kinds)
    assert not [result for result in map(reader.case, range(240)) if result.outcome in BAD]
