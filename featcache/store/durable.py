"""Files that survive a power cut: written under another name, synced, renamed, and their directories synced.

A rename is durable only when the directory that holds it is synced, and a new directory only when its parent
is. A reader sees the old file or the new one, never a part of either.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from featcache.errors import DataError

TEMPORARY = ".tmp"


def write_durably(path: Path, data: bytes) -> None:
    """Write to a temporary name, sync, rename. ``DataError`` names the file when the disk is full.

    The name itself lasts once `sync_directory` has run on the folder.
    """
    # A unique name: a worker that was given up for dead may still be writing the same chunk.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> DataError:
    """The error for a file that cannot be written, with the remedy for a full disk or for a read-only folder."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free space" if full else "make the folder writable, or choose another --out,"
    return DataError(f"{path}: cannot write ({error.strerror}); {remedy} and run the same command again, it resumes")


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
