"""The order of copies to a device: no computation sees another batch's values, whatever the device does first.

The device is simulated: its streams hold queued work, of which any that is legal may run next, as on a real one (for
those there is `tests/test_cuda.py`). Each guard that the order rests on is taken away once: the simulation notices.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from featcache.store.encoding import ENCODINGS, Encoding, Stored
from featcache.store.reading import FeatureStore
from featcache.stream import staging
from featcache.stream.order import clip_starts
from featcache.stream.rows import Rows
from featcache.stream.staging import Buffers, Format, Staging
from featcache.stream.stream import open_readers
from featcache.words import Dtype
from tests.synthetic import DIM, DiscSource, make_store

BATCHES, SAMPLES, CLIP, PATCHES = 16, 4, 2, 16
ROW = PATCHES * DIM  # values


class Work:
    """Something queued on a stream; it may have to wait for other work."""

    def __init__(self, run: Callable[[], object], after: Work | None = None) -> None:
        self.run, self.after, self.done = run, after, False


class Device:
    """Streams whose work runs in any legal order; ``first`` is the stream that is preferred."""

    def __init__(self, seed: int, first: str) -> None:
        self.random, self.first = random.Random(seed), first
        self.trainer = Stream(self)
        self.streams, self.current = [self.trainer], self.trainer
        self.broken = ""

    def progress(self) -> bool:
        """Run one piece of work, if there is any."""
        ready = [s for s in self.streams if s.queue and (s.queue[0].after is None or s.queue[0].after.done)]
        if not ready:
            return False
        preferred = [s for s in ready if (s is self.trainer) == (self.first == "trainer")]
        work = self.random.choice(preferred if self.first != "any" and preferred else ready).queue.popleft()
        work.run()
        work.done = True
        return True

    def until(self, work: Work) -> None:
        while not work.done:
            assert self.progress(), "a deadlock"

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, device: Device) -> None:
        self.device, self.queue = device, deque[Work]()

    def put(self, run: Callable[[], object], after: Work | None = None) -> Work:
        self.queue.append(Work(run, after))
        return self.queue[-1]

    def wait_event(self, event: Event) -> None:
        role = "filled" if self is self.device.trainer else "released"
        if event.reached is not None and self.device.broken != role:
            self.put(lambda: None, event.reached)

    def synchronize(self) -> None:
        if self.queue:
            self.device.until(self.queue[-1])


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.reached: Work | None = None

    def record(self, stream: Stream) -> None:
        self.reached = stream.put(lambda: None)

    def synchronize(self) -> None:
        if self.reached is not None and self.device.broken != "left":
            self.device.until(self.reached)


class Memory:
    """A tensor on the device: what writes to it is queued."""

    def __init__(self, device: Device, values: Tensor) -> None:
        self.device, self.values = device, values
        self.shape, self.dtype, self.nbytes = values.shape, values.dtype, values.nbytes

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> Memory:
        return Memory(self.device, self.values[key])

    def flatten(self, *dimensions: int) -> Memory:
        return Memory(self.device, self.values.flatten(*dimensions))

    def view(self, *shape: int) -> Memory:
        return Memory(self.device, self.values.view(*shape))

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        self.device.current.put(lambda: self.values.copy_(source))  # reads the source when it runs


class Queued(Encoding):
    """A form that decodes on the device."""

    def __init__(self, form: Encoding) -> None:
        self._form = form
        self.decoded = form.decoded  # type: ignore[misc]

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        return self._form.encode(tokens)

    def decode_into(self, stored: Any, out: Any) -> Tensor:
        held: Stored = {name: memory.values for name, memory in stored.items()}
        out.device.current.put(lambda: self._form.decode_into(held, out.values))
        return out  # type: ignore[no-any-return]


class ResidentOnDevice:
    """Rows that the device selects from its own memory."""

    def __init__(self, rows: Rows, device: Device) -> None:
        self._rows, self._device = rows, device

    def gather(self, starts: npt.NDArray[np.int64], out: Any) -> None:
        chosen = torch.empty_like(out.values)
        self._rows.gather(starts, chosen)
        self._device.current.put(lambda: out.values.copy_(chosen))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureStore]:
    folder, source = tmp_path_factory.mktemp("staging"), DiscSource({"heldout": (6, 5, 7)})
    return {dtype: make_store(folder / dtype, source, dtype=dtype) for dtype in ENCODINGS}


def wrong(
    store: FeatureStore, seed: int, first: str, *, resident: bool = False, piece: int = 3, broken: str = ""
) -> int:
    """How many computations saw other values than their batch's, with pieces of that many rows."""
    split, device = store["heldout"], Device(seed, first)
    device.broken = broken
    tokens, starts = split.read_tokens("block1", slice(0, split.spec.rows)), clip_starts(split, CLIP).tolist()
    form = None if store.encoding.plain else Queued(store.encoding)

    def stream(_: object) -> Stream:
        device.streams.append(Stream(device))
        return device.streams[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", stream)
        patch.setattr(torch.cuda, "Event", lambda: Event(device))
        patch.setattr(torch.cuda, "stream", device.use)
        patch.setattr(torch.cuda, "current_stream", lambda _: device.current)
        patch.setattr(staging, "page_locked", lambda size: torch.zeros(size, dtype=torch.uint8))
        patch.setattr(staging, "PIECE", piece * ROW * (2 if store.spec.dtype == "float16" else 1))
        patch.setattr(Staging, "_empty", lambda _, of: Memory(device, torch.zeros(of.shape, dtype=of.dtype)))
        stage = Staging(torch.device("cuda"), on_device=resident, encoding=form)
        readers: dict[str, Rows] = dict(open_readers(split, "block1", torch.device("cpu")))
        if resident:
            readers = {name: ResidentOnDevice(rows, device) for name, rows in readers.items()}
        arrays = {
            name: Format((SAMPLES, CLIP, *array.shape[1:]), getattr(torch, str(array.dtype)))
            for name, array in split.token_arrays("block1").items()
        }
        batch = Format((SAMPLES, CLIP, PATCHES, DIM), store.encoding.decoded)
        free, ready = deque(stage.buffers(arrays, batch) for _ in range(3)), deque[tuple[Buffers, Tensor]]()
        seen: list[bool] = []

        def fill() -> None:
            rows = np.sort(device.random.sample(starts, SAMPLES))
            stage.fill(free[0], readers, rows)
            expected = torch.stack([tokens[row : row + CLIP] for row in rows.tolist()])
            ready.append((free.popleft(), expected))

        def train() -> None:
            buffers, expected = ready.popleft()
            features: Any = stage.receive(buffers)
            for _ in range(3):  # forward, backward, and the next part of an accumulated batch
                device.trainer.put(lambda: seen.append(torch.equal(features.values, expected)))
            stage.release(buffers)
            free.append(buffers)

        for _ in range(BATCHES):
            while not free or (ready and device.random.random() < 0.3):
                train()
            fill()
            for _ in range(device.random.randrange(8)):
                device.progress()
        while ready:
            train()
        while device.progress():
            pass
        assert len(seen) == 3 * BATCHES
        return seen.count(False)


@pytest.mark.parametrize("dtype", ENCODINGS)
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_no_computation_sees_another_batch(
    stores: dict[str, FeatureStore], dtype: Dtype, resident: bool, piece: int
) -> None:
    for first in ("any", "trainer", "copies"):
        for seed in range(4):
            assert wrong(stores[dtype], seed, first, resident=resident, piece=piece) == 0


@pytest.mark.parametrize(("broken", "first"), [("filled", "trainer"), ("released", "copies"), ("left", "trainer")])
def test_the_simulation_notices_each_guard_that_is_missing(
    stores: dict[str, FeatureStore], broken: str, first: str
) -> None:
    assert all(wrong(stores["float16"], seed, first, broken=broken) > 0 for seed in range(4))


def test_without_page_locked_memory_there_is_a_line_and_the_same_batches(
    stores: dict[str, FeatureStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    empty = torch.empty

    def used_up(*size: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        if pin_memory:
            asked.append(1)
            raise getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCompile with ...")
        return empty(*size, **more)

    locked = staging.page_locked
    monkeypatch.setattr(torch, "empty", used_up)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(Device(0, "any")))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(Device(0, "any")))
    stage = Staging(torch.device("cuda"), on_device=False)
    stage._make_pieces([Format((4, 2, 16, 12), torch.float16)])
    assert asked == [1], "asked once, not for each piece"
    assert [piece.memory.nbytes for piece in stage._pieces] == [4 * 2 * 16 * 12 * 2] * staging.PIECES
    assert caplog.messages == [
        "no page-locked memory (CUDA error: out of memory): batches pass through ordinary memory, more slowly"
    ]
    assert locked(8) is None


@pytest.mark.parametrize(
    ("batch", "row", "size"), [(4, 1000, 4000), (1024, 256 * 384 * 2, 170 * 256 * 384 * 2), (2, 40 << 20, 40 << 20)]
)
def test_pieces_are_of_whole_rows_and_of_one_size_whatever_the_batch(
    batch: int, row: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is larger than a piece has a piece of its size."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    stage = Staging(torch.device("cuda"), on_device=False)
    stage._make_pieces([Format((batch, 1, row), torch.uint8), Format((batch, 1, 8), torch.uint8)])
    assert [piece.memory.nbytes for piece in stage._pieces] == [size] * 3
