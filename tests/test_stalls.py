"""What a trainer waits for data: on a GPU, the time for which it has nothing to do, and not that its host is ahead."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcache.store.reading import FeatureStore
from featcache.stream.staging import Staging
from featcache.stream.stream import FeatureStream

STEPS = 20


class Queue:
    """Stands in for a CUDA stream: work is done in its order, some time after it was queued, by a thread."""

    def __init__(self, *_: object) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while (work := self.work.get()) is not None:
            work()

    def wait_event(self, event: Event) -> None:
        reached = event.reached  # as it was recorded last
        self.work.put(lambda: reached.wait() and None)

    def synchronize(self) -> None:
        event = Event()
        event.record(self)
        event.synchronize()

    def close(self) -> None:
        self.work.put(None)
        self.thread.join()


class Event:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.reached = threading.Event()
        self.reached.set()  # one that was never recorded is no obstacle

    def record(self, stream: Queue) -> None:
        self.reached = reached = threading.Event()

        def reach() -> None:
            self.at = time.perf_counter()
            reached.set()

        stream.work.put(reach)

    def query(self) -> bool:
        return self.reached.is_set()

    def synchronize(self) -> None:
        self.reached.wait()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """A GPU's stream of the trainer; batches are copied on another. Their memory is the host's."""
    trainer, local, others = Queue(), threading.local(), []

    def other(*_: object) -> Queue:
        others.append(Queue())
        return others[-1]

    monkeypatch.setattr(torch.cuda, "Stream", other)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: getattr(local, "stream", trainer))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Current(local, stream))
    monkeypatch.setattr(Staging, "_empty", lambda staging, of: torch.empty(of.shape, dtype=of.dtype))
    yield trainer
    for stream in (trainer, *others):
        stream.close()


class Current:
    """``torch.cuda.stream``."""

    def __init__(self, local: Any, stream: Queue) -> None:
        self.local, self.stream = local, stream

    def __enter__(self) -> None:
        self.local.stream = self.stream

    def __exit__(self, *_: object) -> None:
        del self.local.stream


def wait_share(store: FeatureStore, gpu: Queue, step: float, read: float) -> float:
    """Of steps that take the GPU ``step`` seconds, on batches that take ``read`` to read."""
    stream = FeatureStream(store["train"], "block1", batch_size=4, device="cuda", residence="host")
    for name, rows in stream._readers.items():
        stream._readers[name] = SimpleNamespace(gather=lambda *given, to=rows.gather: (time.sleep(read), to(*given)))
    batches = iter(stream)
    for _ in itertools.islice(batches, 5):
        gpu.work.put(lambda: time.sleep(step))
    gpu.synchronize()
    began, waited = time.perf_counter(), stream.wait_seconds
    for index, _ in enumerate(itertools.islice(batches, STEPS), 1):
        gpu.work.put(lambda: time.sleep(step))
        if index % 10 == 0:
            gpu.synchronize()  # a logged step
    share = (stream.wait_seconds - waited) / (time.perf_counter() - began)
    batches.close()  # type: ignore[attr-defined]
    return share


def test_a_gpu_that_is_never_idle_waits_for_no_data(store: FeatureStore, gpu: Queue) -> None:
    """Though its host, which is ahead, is held up at every step until the GPU gives a buffer back."""
    assert wait_share(store, gpu, step=0.02, read=0) < 0.1


def test_a_gpu_that_is_idle_for_want_of_batches_waits_for_data(store: FeatureStore, gpu: Queue) -> None:
    assert wait_share(store, gpu, step=0.005, read=0.04) > 0.7
