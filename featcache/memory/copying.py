"""Copies runs of rows into a batch's buffer, on several threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from featcache.memory import kernels

Piece = tuple[int, int, int]  # target address, source address, number of bytes

CHECK = 16  # copies between two calls of ``between``


class Copier:
    """Copies memory on ``threads`` threads.

    One thread moves about 10 GB/s; the memory of a machine often allows several times that.
    """

    def __init__(self, threads: int = 1) -> None:
        self._helpers = ThreadPoolExecutor(threads - 1, "featcache-copy") if threads > 1 else None
        self._threads = threads

    def __call__(self, pieces: Sequence[Piece], between: Callable[[Sequence[Piece]], None] = lambda _: None) -> None:
        """Copy all pieces. ``between(rest)`` is called every ``CHECK`` copies with the pieces left to this thread."""
        past_caches = sum(size for *_, size in pieces) >= kernels.PAST_CACHES
        copy = partial(_copy, kernels.copy() if past_caches else ctypes.memmove)
        mine, *others = (pieces[part :: self._threads] for part in range(self._threads))
        helping = [self._helpers.submit(copy, part) for part in others] if self._helpers else []
        for first in range(0, len(mine), CHECK):
            copy(mine[first : first + CHECK])
            between(mine[first + CHECK :])
        for part in helping:
            part.result()


def _copy(lines: Callable[[int, int, int], object], pieces: Sequence[Piece]) -> None:
    """Copy pieces, whole lines by ``lines``. Both functions release the GIL, and cost half as much as Tensor.copy_."""
    for target, source, size in pieces:
        copy = ctypes.memmove if (target | size) % kernels.LINE else lines
        copy(target, source, size)
