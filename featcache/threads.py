"""Threads beside the one that computes, kept from fighting it for the cores.

``torch.set_num_threads`` limits the thread that calls it, but also sets what threads born later begin with: both
helpers put that back at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def start_limited(work: Callable[[], None], name: str, cores: int = 1) -> threading.Thread:
    """A started daemon thread whose own torch operations use so many cores."""
    threads = torch.get_num_threads()
    limited = threading.Event()

    def run() -> None:
        torch.set_num_threads(cores)
        limited.set()
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    limited.wait()
    torch.set_num_threads(threads)
    return thread


def limited_executor(name: str, workers: int = 1) -> ThreadPoolExecutor:
    """Worker threads whose own torch operations use one core each."""
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, name, initializer=torch.set_num_threads, initargs=(1,))
    everyone = threading.Barrier(workers)  # each waits for the others, so that none takes two of the calls
    for call in [executor.submit(everyone.wait) for _ in range(workers)]:
        call.result()  # the threads are there, and limited
    torch.set_num_threads(threads)
    return executor
