"""Shared fixtures. The tests run on one thread: two small-core threads mostly wait for each other."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_COLOR", "1")

import pytest
import torch
from jaxtyping import config, install_import_hook

# Shapes and types are checked at every call of the tensor code, in the tests alone.
install_import_hook(["slotlab.models", "slotlab.training.losses", "featcache.store.encoding"], "beartype.beartype")

from featcache.store.reading import FeatureStore
from tests.commands import Slotlab, call
from tests.synthetic import make_store
from tests.training import small, tracked, tracks_of

torch.set_num_threads(1)
os.fsync = lambda fd: None  # what a test writes need not outlive a power cut; tests of durability put their own here


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A small finished store with two splits, which the tests only read."""
    return make_store(tmp_path_factory.mktemp("shared") / "synthetic.zarr")


@pytest.fixture
def store(shared_store: FeatureStore, tmp_path: Path) -> FeatureStore:
    """A copy of it, to do with what one likes."""
    return FeatureStore.open(shutil.copytree(shared_store.path, tmp_path / "synthetic.zarr"))


@pytest.fixture(scope="session")
def shared_run(shared_store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps on it, which the tests only read."""
    from slotlab.training.train import train

    return train(small(), shared_store, tmp_path_factory.mktemp("shared") / "run")


@pytest.fixture(scope="session")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that follows objects, which the tests only read."""
    return tracked(tmp_path_factory.mktemp("tracked"))


@pytest.fixture(scope="session")
def shared_tracks(tracked_run: Path) -> FeatureStore:
    """Its tracks, which the tests only read."""
    return tracks_of(tracked_run)


@pytest.fixture(scope="session")
def predicting(shared_tracks: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world model of twelve steps on them, which the tests only read."""
    from slotlab.training.train import train

    return train(small(preset="dynamics"), shared_tracks, tmp_path_factory.mktemp("dynamics") / "run")


@pytest.fixture
def store_of(store: FeatureStore, shared_tracks: FeatureStore) -> Callable[[str], FeatureStore]:
    """A preset's kind of store: features, or tracks."""
    return lambda preset: shared_tracks if preset == "dynamics" else store


@pytest.fixture
def run(shared_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to do with what one likes."""
    return shutil.copytree(shared_run, tmp_path / "run")


@pytest.fixture
def slotlab(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Slotlab:
    """A command, run in ``tmp_path``: ``slotlab("eval", run, "--json")``."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: call(monkeypatch, capsys, caplog, *args)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No checks of shapes: torch.compile does not trace them."""
    torch.compiler.reset()
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: all processes would wait for a long one that begins last."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look through it again and again, and a fork server, one
    for all tests of this process, has imported it for the processes that they start."""
    gc.collect()
    gc.freeze()
    multiprocessing.set_forkserver_preload(["tests.forked"])


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores: for a quarter of the time a test waits for another program."""
    return (os.cpu_count() or 1) + 1


def pytest_configure() -> None:
    """Let programs that tests start be interrupted: a shell's background job inherits an ignored Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
