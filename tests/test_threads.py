"""Threads on a busy machine: OpenMP's soon sleep where they wait, and small operations use one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from featcache.machine import limited

ROOT = Path(__file__).parent.parent
OPENMP = ("OMP_", "GOMP_", "KMP_")
# CPU seconds that a process burns while it sleeps 0.5 s, 10 ms after each of 50 operations on two threads.
IDLE = """
import featcache, time, torch
torch.set_num_threads(2)
numbers, burnt = torch.ones(1 << 18), 0.0
for _ in range(50):
    numbers.add_(1)
    start = time.process_time()
    time.sleep(0.01)
    burnt += time.process_time() - start
print(burnt)
"""


def python(code: str, **settings: str) -> str:
    """What a fresh Python prints, without this one's settings of OpenMP."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OPENMP)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["featcache", "slotlab", "cli", "slotlab.commands.app", "featcache.errors"])
def test_threads_are_to_sleep_before_torch_is_loaded(module: str) -> None:
    found = "os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules"
    code = f"import os, sys, {module}; print({found})"
    assert python(code) == "PASSIVE 10000 False"
    assert python(code, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None False", "what the user has set stays"
    assert python(code, GOMP_SPINCOUNT="7") == "PASSIVE 7 False"


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="OpenMP does not spin on one core")
def test_waiting_threads_burn_next_to_nothing_unless_the_user_wants_it() -> None:
    asleep = float(python(IDLE))
    assert asleep < 0.05
    assert float(python(IDLE, GOMP_SPINCOUNT="300000")) > 2 * asleep + 0.03  # libgomp's own, where nothing is set


def test_limited_puts_the_count_back_and_leaves_other_threads_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError), limited():
            assert torch.get_num_threads() == 1
            _ = 1 / 0
        assert torch.get_num_threads() == 3
        with limited(2):
            pass
        born: list[int] = []
        later = threading.Thread(target=lambda: born.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert born == [3]
    finally:
        torch.set_num_threads(before)
