"""Carries out runs in several processes on several devices. A process that dies does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, cast

import torch

from featcache.errors import UsageError
from featcache.machine import pick_device
from slotlab.experiments.plan import Run
from slotlab.experiments.worker import work

# A fork server imports once what every process needs; where the system has none, each process imports it.
_server = "forkserver" in multiprocessing.get_all_start_methods()
_context = cast(SpawnContext, multiprocessing.get_context("forkserver" if _server else "spawn"))
if _server:
    _context.set_forkserver_preload([work.__module__])


class Watcher(Protocol):
    """Follows runs while they are carried out."""

    def begun(self, runs: Sequence[Run], finished: int) -> None:
        """Called before the first of ``runs`` starts; ``finished`` others of the plan are done."""

    def started(self, run: Run) -> None: ...
    def row(self, run: Run, row: dict[str, Any]) -> None: ...
    def ended(self, run: Run, error: str | None) -> None: ...


def places(devices: str, workers: int | None, runs: int) -> list[str]:
    """The device of each process, for ``--devices`` and ``--workers``.

    By default there is one process per GPU, or one per CPU core, but never more than ``runs``. More ``workers`` than
    devices share the devices evenly. ``UsageError`` for a device that this machine lacks.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    names = [name.strip() for name in devices.split(",") if name.strip()]
    if names == ["auto"] and torch.cuda.is_available():
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    found = [str(pick_device(name)) for name in names]
    if not found:
        raise UsageError(f"--devices {devices!r}: name one, for example cpu or cuda:0,cuda:1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or (cores if found == ["cpu"] else len(found))
    return [found[index % len(found)] for index in range(min(count, runs))]


def carry_out(runs: Sequence[Run], places: Sequence[str], watcher: Watcher) -> None:
    """Carry out all runs, in order, as processes become free.

    A run that fails, or whose process dies, leaves ``error.json`` in its folder. An exception in this
    process (Ctrl-C) ends the other processes; each run can resume from its last checkpoint.
    """
    waiting = deque(runs)
    busy: dict[Any, tuple[_Worker, Run]] = {}  # by connection
    workers = [_Worker(device, places.count(device)) for device in places]

    def give(worker: _Worker) -> None:
        if waiting:
            run = waiting.popleft()
            worker.start()
            with suppress(OSError):  # it died already; reading from it will show that
                worker.link.send(run)
            busy[worker.link] = worker, run
            watcher.started(run)

    try:
        for worker in workers:
            give(worker)
        while busy:
            for link in wait(list(busy)):
                worker, run = busy[link]
                try:
                    kind, value = worker.link.recv()
                except (EOFError, ConnectionResetError):  # killed: out of memory, or a fault in a library
                    kind, value = "ended", worker.fate()
                    run.fail(value)
                if kind == "row":
                    watcher.row(run, value)
                    continue
                watcher.ended(run, value)
                del busy[link]
                give(worker)
    finally:
        for worker in workers:
            worker.stop()


@dataclass
class _Worker:
    """A process and the connection to it; a fresh process replaces one that died."""

    device: str
    sharers: int  # workers on that device
    _process: BaseProcess | None = None
    _link: Connection | None = None

    @property
    def link(self) -> Connection:
        assert self._link is not None
        return self._link

    def start(self) -> None:
        """Start the process, if it is not running."""
        if self._process is not None and self._process.is_alive():
            return
        self.stop()
        self._link, theirs = _context.Pipe()
        self._process = _context.Process(target=work, args=(theirs, self.device, self.sharers))
        with _without_interrupts(), _threads(self.device):
            self._process.start()
        theirs.close()  # so that its death closes the connection

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()  # safe at any moment: it writes files aside and renames them
            self._process.join()
        if self._link is not None:
            self._link.close()

    def fate(self) -> str:
        """The way the process died, in one line."""
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
        return f"its process ended with exit code {code}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Protect processes started here from Ctrl-C, which a terminal sends to all of them: the parent decides alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _threads(device: str) -> Iterator[None]:
    """Give processes started here one thread each on a CPU, before their libraries start threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
