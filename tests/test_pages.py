"""What the kernel is asked about memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from featcache.memory import pages

HUGE = pages.HUGE


@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (3, HUGE // 4), (HUGE + 12,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8])
def test_host_buffers_are_plain_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    buffer = pages.host_empty(shape, dtype)
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == (shape, dtype, True)
    expected = torch.arange(buffer.numel()).remainder(100).to(dtype).view(shape)
    view = buffer.copy_(expected)[:1]
    del buffer  # a view keeps the memory
    assert torch.equal(view, expected[:1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells where huge pages are")
def test_large_host_buffers_ask_for_huge_pages() -> None:
    buffer = pages.host_empty((4 * HUGE,), torch.int8)
    assert buffer.data_ptr() % HUGE == 0
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags:")
    for block, flags in pairwise(blocks):
        span = next(line for line in block.splitlines() if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0])
        first, last = (int(part, 16) for part in span.split(" ")[0].split("-"))
        if first <= buffer.data_ptr() < last:
            assert "hg" in flags.splitlines()[0].split()
            return
    pytest.fail("the buffer is nowhere")


def test_what_was_just_written_is_cached_and_can_be_populated(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 3 * 4096 + 100
    path.write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    assert pages.cached_share(mapped.data_ptr(), size) == 1
    pages.populate(mapped.data_ptr(), size)
    pages.read_ahead([(mapped.data_ptr() + 5000, 3000)])
    assert mapped[:512].tolist() == [*range(256)] * 2
