"""Files that survive a power cut: written under another name, synced, renamed, and their directories synced.

A rename is durable only when the directory that holds it is synced, and a new directory only when its parent
is. A reader sees the old file or the new one, never a part of either.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from featcache.errors import DataError, is_full
from featcache.text import printable

TEMPORARY = ".tmp"
LONGEST = 40  # characters of a file's name that its temporary name keeps: a name may have 255 bytes


def write_durably(path: Path, data: bytes, synced: bool = True) -> None:
    """Write to a temporary name, sync, rename. ``DataError`` names the file when the disk is full, and leaves what was
    there.

    The name itself lasts once `sync_directory` has run on the folder. What can soon be made again need not be
    ``synced``.
    """
    # A unique name: a worker that was given up for dead may still be writing the same chunk.
    temporary = path.with_name(f"{path.name[:LONGEST]}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if synced:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def write_output(path: Path, data: bytes | str) -> None:
    """Write a picture, a page or a table, and the folder that it lies in: all of it, or ``DataError`` and nothing."""
    make_directory(path.absolute().parent)
    write_durably(path, printable(data, lines=True).encode() if isinstance(data, str) else data, synced=False)


def cannot_write(path: Path, error: OSError) -> DataError:
    """The error for a file that cannot be written, with the remedy for a full disk or for a read-only folder."""
    remedy = "free space" if is_full(error) else "make the folder writable, or choose another --out,"
    return DataError(
        f"{path}: cannot write ({error.strerror}); {remedy} and run the same command again, it resumes "
        "(train: with --resume)"
    )


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, each durable in its own parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_tree(root: Path, files: Mapping[str, bytes]) -> None:
    """Write files, given by their paths below ``root``, in order; all are durable on return."""
    folders: dict[Path, None] = {}
    for name, data in files.items():
        path = root / name
        make_directory(path.parent)
        write_durably(path, data)
        folders[path.parent] = None
    for folder in folders:
        sync_directory(folder)


class Lines:
    """Appends lines to a file, each wholly or not at all. Opening it creates the file, or cuts off a torn last line.

    Use as a context manager, or close it. ``DataError`` where the file cannot be written.
    """

    def __init__(self, path: Path, synced: bool = True) -> None:
        self._path, self._synced = path, synced
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._end = os.fstat(self._fd).st_size
            whole = os.pread(self._fd, self._end, 0).rfind(b"\n") + 1
            if whole != self._end:
                os.ftruncate(self._fd, whole)
                self._end = whole
            if synced:
                os.fsync(self._fd)
                sync_directory(path.parent)  # a new file must not vanish with the lines in it
        except OSError as error:
            raise cannot_write(path, error) from error

    def add(self, *lines: str) -> None:
        """Append lines; where lines are synced they are durable on return. No part of what failed is left."""
        data = b"".join(line.encode() + b"\n" for line in lines)
        at = self._end
        try:
            while data:
                written = os.pwrite(self._fd, data, at)
                data, at = data[written:], at + written
            if self._synced:
                os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):  # else the next opening cuts it off
                os.ftruncate(self._fd, self._end)
            raise cannot_write(self._path, error) from error
        self._end = at

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


NEXT, BEFORE = ".next", ".before"  # folders beside one that is being replaced: what takes its place, what it was


def replace_directory(new: Path, path: Path) -> None:
    """Give a directory the name of another in the same folder, which is removed; both must be synced.

    A kill leaves the old or the new one: in one step where the system can exchange names, else
    `settle_directories` puts the old one back.
    """
    if _exchange(new, path):
        gone = new
    else:
        gone = path.with_name(f".{path.name}{BEFORE}")
        os.rename(path, gone)
        os.rename(new, path)
    sync_directory(path.parent)
    shutil.rmtree(gone)


def settle_directories(folder: Path) -> None:
    """Undo what a kill left of `replace_directory` in a folder whose lock is held, and remove what is not used."""
    for before in folder.glob(f".*{BEFORE}"):
        path = folder / before.name.removeprefix(".").removesuffix(BEFORE)
        if not path.exists():
            os.rename(before, path)
            sync_directory(folder)
    for leftover in [*folder.glob(f".*{BEFORE}"), *folder.glob(f".*{NEXT}")]:
        shutil.rmtree(leftover)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once (Linux's renameat2); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


LOCK = ".lock"


def lock(folder: Path) -> BinaryIO:
    """An exclusive lock on a folder until the returned file is closed; the system drops it even after ``kill -9``.

    ``DataError`` if another process holds it, the folder cannot be written, or its file system has no locks.
    """
    try:
        file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = file.read(32).decode(errors="replace").strip() or "unknown"
        file.close()
        if not isinstance(error, BlockingIOError):
            raise DataError(
                f"{folder}: its file system has no locks ({error.strerror}); choose --out on another"
            ) from error
        raise DataError(
            f"{folder}: another process (pid {holder}) is writing there; wait for it, or choose another --out"
        ) from error
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    except OSError as error:
        file.close()
        raise cannot_write(folder / LOCK, error) from error
    return file
