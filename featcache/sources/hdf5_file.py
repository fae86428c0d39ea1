"""HDF5 files, read by a process of their own: on some damaged files libhdf5 ends the process that it runs in.

:class:`Group` and :class:`Dataset` have what is used here of h5py's classes of the same names. Every error is a
``DataError`` that names the file.
"""

from __future__ import annotations

import atexit
import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError

_CHILD = Path(__file__).with_name("hdf5_child.py")
_IS_HELD = f"errno = {errno.EAGAIN}"  # as HDF5 puts it


@dataclass(frozen=True)
class Dataset:
    """An array in a file. Indexing it reads."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """``DataError`` where the rows are damaged or not there."""
        return _ask(self.path, self.name, "rows", index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self[...], dtype)


@dataclass(frozen=True)
class Group(Mapping[str, "Group | Dataset"]):
    """A group of a file; :func:`opened` gives the one at the top."""

    path: Path
    name: str
    members: tuple[str, ...]

    def __getitem__(self, name: str) -> Any:
        """``DataError`` where there is no such array or group."""
        found = _item(self.path, f"{self.name.rstrip('/')}/{name}")
        if found is None:
            raise DataError(f"{self.path}: {self.name} has no {name} that can be read; copy or write this file again")
        return found

    def get(self, name: str, default: Any = None) -> Any:
        found = _item(self.path, f"{self.name.rstrip('/')}/{name}")
        return default if found is None else found

    def __contains__(self, name: object) -> bool:
        return self.get(str(name)) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def attribute(self, name: str) -> Any:
        """The value of an attribute; None without it."""
        return _ask(self.path, self.name, "attribute", name)


def opened(path: Path) -> Group:
    """The top of a file. It is opened at each access, so that threads and processes share no handle.

    ``DataError`` in one line where it is damaged, or another program writes to it.
    """
    top = _item(path, "/")
    assert isinstance(top, Group)
    return top


def _item(path: Path, name: str) -> Group | Dataset | None:
    found = _ask(path, name, "kind", None)
    if found is None:
        return None
    if len(found) == 2:
        return Group(path, found[0], tuple(found[1]))
    name, shape, dtype = found
    return Dataset(path, name, tuple(shape or ()), np.dtype(dtype))


# -- the process -------------------------------------------------------------------------------------------

_lock = threading.Lock()
_child: tuple[int, subprocess.Popen[bytes]] | None = None  # with the process that it belongs to


def _ask(path: Path, name: str, what: str, key: Any) -> Any:
    """One request to the process that reads; requests of several threads wait for each other, as in libhdf5."""
    with _lock:
        child = _running()
        assert child.stdin is not None and child.stdout is not None
        try:
            pickle.dump((os.fspath(path.absolute()), name, what, key), child.stdin)
            child.stdin.flush()
            good, found = pickle.load(child.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise DataError(
                f"{path}: its damage ends the program that reads it ({_ended(child)}); copy or write this file again"
            ) from error
        except BaseException:  # it would answer the next request with what this one asked for
            _stop()
            raise
    if good:
        return found
    raise _error(path, *found)


def _running() -> subprocess.Popen[bytes]:
    global _child
    if _child is None or _child[0] != os.getpid() or _child[1].poll() is not None:
        _child = (
            os.getpid(),
            subprocess.Popen(
                [sys.executable, "-P", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            ),
        )
    return _child[1]


def _ended(child: subprocess.Popen[bytes]) -> str:
    """How a process ended, in words."""
    code = child.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@atexit.register
def _stop() -> None:
    global _child
    if _child is not None and _child[0] == os.getpid():
        _child[1].kill()
        _child[1].communicate()
    _child = None


def _error(path: Path, kind: str, said: str) -> DataError:
    said = " ".join(said.strip("\"'").split()) or kind
    if "unable to lock file" in said:
        what = "another program has it open for writing" if _IS_HELD in said else "its file system has no locks"
        return DataError(
            f"{path}: {what}; close it there, or where none has it open (NFS, often), set "
            "HDF5_USE_FILE_LOCKING=FALSE in the environment"
        )
    if "already open for write" in said:
        return DataError(
            f"{path}: a program writes to it, or did until it was killed; close it there, or clear the mark "
            "(h5clear -s FILE)"
        )
    return DataError(f"{path}: {said}; copy or write this file again")
