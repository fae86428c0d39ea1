"""Extraction on dask workers, real processes: the local extractor's bytes, whatever dies on the way."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster
from distributed.utils import get_mp_context

import cli
from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.extraction import distributed
from featcache.extraction.distributed import connect, extract_distributed
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, ExtractPlan, plan
from featcache.scale.recompute import recomputed_statistics
from featcache.sources import open_source
from featcache.sources.video import Video
from featcache.store import layout, manifest
from featcache.store.reading import FeatureStore
from featcache.upkeep.verify import verify
from tests import growing
from tests.synthetic import DiscSource, make_store

pytestmark = pytest.mark.slow

OPTIONS = ExtractOptions(batch_size=8, precision="float32")  # groups of two videos


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """Workers come from a fork server that has done the imports: most of what they would do here."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(["tests.forked"])  # dask's own list is of its packages
        yield


@pytest.fixture(scope="module")
def client(forked: None) -> Iterator[Client]:
    with connect(workers=2) as client:
        yield client


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("local") / "s.zarr"
    extract(planned(path, backbone), DiscSource(), backbone)
    return files(path)


@contextmanager
def in_this_process(threads: int) -> Iterator[Client]:
    cluster = LocalCluster(n_workers=1, threads_per_worker=threads, processes=False, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        yield client


def planned(path: Path, backbone: Backbone, options: ExtractOptions = OPTIONS) -> ExtractPlan:
    return plan(path, DiscSource(), backbone, options)


def run(path: Path, backbone: Backbone, client: Client, source: DiscSource | None = None) -> FeatureStore:
    return extract_distributed(planned(path, backbone), source or DiscSource(), client, weights="random", device="cpu")


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store but its lock; manifests with their rows in order."""
    found = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != ".lock"}
    for name, content in found.items():
        if name.endswith(manifest.NAME):
            found[name] = b"".join(sorted(content.splitlines(keepends=True)))
    return found


class Deadly(DiscSource):
    """Its worker dies once at video 3 of train: killed after the first of its chunks has its name."""

    def __init__(self, died: Path, again: bool = False) -> None:
        super().__init__()
        self.died, self.again = died, again

    def read(self, split: str, index: int) -> Video:
        if (split, index) == ("train", 3) and (self.again or not self.died.exists()):
            rename = os.replace

            def last(source: str, target: str) -> None:
                rename(source, target)
                self.died.touch()
                os.kill(os.getpid(), signal.SIGKILL)

            os.replace = last  # type: ignore[assignment]
        return super().read(split, index)


class Poisoned(DiscSource):
    def read(self, split: str, index: int) -> Video:
        if (split, index) == ("train", 3):
            raise DataError("synthetic discs: video 3 is damaged; copy it again")
        return super().read(split, index)


def test_a_killed_worker_costs_only_its_task(
    tmp_path: Path, backbone: Backbone, client: Client, local: dict[str, bytes]
) -> None:
    before = set(client.run(os.getpid).values())
    store = run(tmp_path / "s.zarr", backbone, client, Deadly(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert files(store.path) == local
    assert verify(store.path) == []
    client.wait_for_workers(2)
    assert len(before & set(client.run(os.getpid).values())) == 1


def test_workers_wait_at_barriers_as_their_client_does(client: Client) -> None:
    assert set(client.run(os.environ.get, "OMP_WAIT_POLICY").values()) == {os.environ["OMP_WAIT_POLICY"]}


def test_a_damaged_video_is_one_line_and_the_rest_is_kept(
    tmp_path: Path, backbone: Backbone, client: Client, local: dict[str, bytes]
) -> None:
    path = tmp_path / "s.zarr"
    with pytest.raises(DataError, match="^synthetic discs: video 3 is damaged; copy it again$"):
        run(path, backbone, client, Poisoned())
    assert not list(path.glob(".run-*"))
    run(path, backbone, client)
    assert files(path) == local


class Unplugged(DiscSource):
    """At video 3 of train the folder with the store is gone for a while."""

    def __init__(self, folder: Path, gone: Path) -> None:
        super().__init__()
        self.folder, self.gone = folder, gone

    def read(self, split: str, index: int) -> Video:
        if (split, index) == ("train", 3) and not self.gone.exists():
            self.gone.touch()
            self.folder.rename(self.folder.with_name("away"))
            threading.Timer(1.5, lambda: self.folder.with_name("away").rename(self.folder)).start()
        return super().read(split, index)


class Blind(DiscSource):
    """One worker reads nothing any more, from its second group on: as if its mount were lost for good."""

    def __init__(self, blind: Path) -> None:
        super().__init__()
        self.blind = blind

    def read(self, split: str, index: int) -> Video:
        mine = str(os.getpid())
        if (split, index) == ("train", 3) and not self.blind.exists():
            self.blind.write_text(mine)
            distributed.PATIENCE = 0.3
            distributed._there = lambda *_: False
        if self.blind.exists() and self.blind.read_text() == mine:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return super().read(split, index)


def test_a_mount_that_is_lost_for_a_while_costs_nothing(
    tmp_path: Path, backbone: Backbone, client: Client, local: dict[str, bytes]
) -> None:
    """Of a worker that has seen the store, which waits; chunks, rows and moments are those of an unbroken run."""
    (mount := tmp_path / "mount").mkdir()
    store = run(mount / "s.zarr", backbone, client, Unplugged(mount, tmp_path / "gone"))
    assert (tmp_path / "gone").exists()
    lines = (store.path / "train/manifest.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["video"] for line in lines) == [0, 1, 2, 3, 4], "no video twice"
    assert files(store.path) == local and verify(store.path) == []


def test_a_store_that_is_mounted_at_first_use_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a worker that has not seen it; for long by none."""
    run = tmp_path / "mount" / "s.zarr" / ".run-1"
    coming = threading.Timer(0.5, lambda: run.mkdir(parents=True))
    coming.start()
    assert distributed._wait_for_files(run, None)
    coming.join()
    monkeypatch.setattr(distributed, "ARRIVAL", 0.1)
    assert not distributed._wait_for_files(tmp_path / "elsewhere" / ".run-1", None)


def test_late_workers_take_their_share_and_one_that_stays_without_files_gives_its_own_to_others(
    tmp_path: Path, backbone: Backbone, local: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks name a file in the store: what a late worker needs is there."""
    cluster = LocalCluster(n_workers=0, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        coming = threading.Timer(1.0, lambda: cluster.scale(2))
        coming.start()
        store = run(tmp_path / "s.zarr", backbone, client, Blind(tmp_path / "blind"))
        coming.join()
        assert len(client.nthreads()) == 1
    said = [record.getMessage() for record in caplog.records]
    assert sum("no dask worker is connected; waiting for one" in line for line in said) == 1
    told = [line for line in said if "has lost it; others go on" in line]
    assert len(told) == 1 and told[0].startswith(f"{store.path}: worker tcp://")
    assert files(store.path) == local and verify(store.path) == []


class Glitch(DiscSource):
    """Video 3 cannot be read so many times, as over a network that stumbles."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__()
        self.folder, self.times = folder, times

    def read(self, split: str, index: int) -> Video:
        tried = len(list(self.folder.iterdir()))
        if (split, index) == ("train", 3) and tried < self.times:
            (self.folder / str(tried)).touch()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(split, index)


def test_an_error_counts_when_it_comes_twice(
    tmp_path: Path, backbone: Backbone, client: Client, local: dict[str, bytes]
) -> None:
    (once := tmp_path / "once").mkdir()
    store = run(tmp_path / "s.zarr", backbone, client, Glitch(once, 1))
    assert files(store.path) == local
    (often := tmp_path / "often").mkdir()
    with pytest.raises(DataError, match=r"t.zarr: worker tcp://\S+: \[Errno 5\] Input/output error$"):
        run(tmp_path / "t.zarr", backbone, client, Glitch(often, 9))


def test_a_task_is_small_however_many_videos_there_are(
    tmp_path: Path, backbone: Backbone, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    submit = client.submit

    def watched(*args: object, **options: object) -> object:
        sizes.append(len(pickle.dumps(args)))
        return submit(*args, **options)

    monkeypatch.setattr(client, "submit", watched)
    many = DiscSource({"train": (1,) * 60})
    todo = plan(tmp_path / "s.zarr", many, backbone, OPTIONS)
    extract_distributed(todo, many, client, weights="random", device="cpu")
    assert len(sizes) == 8 and max(sizes) < 1000


def test_it_continues_what_was_begun_locally(
    tmp_path: Path, backbone: Backbone, client: Client, local: dict[str, bytes]
) -> None:
    path = tmp_path / "s.zarr"
    extract(planned(path, backbone, replace(OPTIONS, max_videos=3)), DiscSource(), backbone)
    chunk = path / "train/features/layer1/c.0.0.0"
    written = chunk.stat().st_mtime_ns
    run(path, backbone, client)
    assert files(path) == local
    assert chunk.stat().st_mtime_ns == written, "finished videos are read back, not written again"


def test_interrupted_it_keeps_what_the_workers_finished(
    tmp_path: Path, backbone: Backbone, client: Client, local: dict[str, bytes]
) -> None:
    path = tmp_path / "s.zarr"

    def interrupt(_split: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_distributed(
            planned(path, backbone), DiscSource(), client, weights="random", device="cpu", progress=interrupt
        )
    assert len(manifest.read(path / "train")) >= 1
    assert verify(path) == [] and not list(path.glob(".run-*"))
    run(path, backbone, client)
    assert files(path) == local


def test_a_worker_that_does_not_see_the_store_says_so(
    tmp_path: Path, backbone: Backbone, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same check stops the workers of a client that was killed before they write."""
    monkeypatch.setattr(distributed, "write_durably", lambda *_: None)
    with pytest.raises(DataError, match=r"s.zarr: worker tcp://.* does not see this store.*shares"):
        run(tmp_path / "s.zarr", backbone, client)
    assert manifest.read(tmp_path / "s.zarr" / "train") == {}
    assert not list(tmp_path.rglob("c.*"))


def test_a_worker_with_other_weights_is_refused(tmp_path: Path, backbone: Backbone, client: Client) -> None:
    asked = planned(tmp_path / "s.zarr", backbone)
    other = replace(asked, spec=replace(asked.spec, model={**asked.spec.model, "weights_sha256": "1234"}))
    with pytest.raises(
        IncompatibleError, match=r"worker tcp://.* other features \(weights_sha256: here '.*asked '1234'"
    ):
        extract_distributed(other, DiscSource(), client, weights="random", device="cpu")


def test_the_command_line_takes_a_scheduler(tmp_path: Path, client: Client) -> None:
    command = ["extract", "--backbone", "resnet18", "--weights", "random", "--input-size", "32", "--max-videos", "2"]
    for name, more in (("a.zarr", []), ("b.zarr", ["--scheduler", client.scheduler.address])):
        fixed = ["--precision", "float32", "--batch-size", "24", "--out", str(tmp_path / name)]
        cli.app([*command, *fixed, *more], standalone_mode=False)
    assert files(tmp_path / "a.zarr") == files(tmp_path / "b.zarr")


def test_threads_of_one_worker_do_not_mix_their_tokens(tmp_path: Path) -> None:
    """Facets are read by hooks on the one model that a worker's threads share."""
    model = load_backbone("dinov2_vits14", weights="random", taps=("block2.key",), input_size=28)
    options = ExtractOptions(batch_size=1, precision="float32")
    one, other = (planned(tmp_path / name, model, options) for name in ("a.zarr", "b.zarr"))
    extract(one, DiscSource(), model)
    with in_this_process(threads=4) as client:
        extract_distributed(other, DiscSource(), client, weights="random", device="cpu")
    assert files(one.path) == files(other.path)


def test_a_lost_scheduler_is_one_line_and_what_was_finished_is_kept(tmp_path: Path, backbone: Backbone) -> None:
    path = tmp_path / "s.zarr"
    with in_this_process(threads=1) as client, pytest.raises(DataError, match="lost the dask scheduler.*resumes"):
        extract_distributed(
            planned(path, backbone), DiscSource(), client, weights="random", device="cpu",
            progress=lambda *_: client.cluster.close(),
        )  # fmt: skip
    assert len(manifest.read(path / "train")) >= 1 and verify(path) == []


def test_statistics_of_a_store_on_workers(tmp_path: Path, client: Client, backbone: Backbone) -> None:
    split = extract(planned(tmp_path / "s.zarr", backbone), DiscSource(), backbone)["train"]
    on_workers = recomputed_statistics(split, "layer1", client)
    here = recomputed_statistics(split, "layer1")
    for name, values in here.to_arrays().items():
        assert (on_workers.to_arrays()[name] == values).all(), name


def test_the_command_line_recomputes_statistics_on_workers(
    tmp_path: Path, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(make_store(tmp_path / "s.zarr").path)
    reports = []
    for more in ([], ["--recompute"], ["--recompute", "--scheduler", client.scheduler.address]):
        cli.app(["stats", store, "--json", *more], standalone_mode=False)
        reports.append(json.loads(capsys.readouterr().out)["stores"][0])
    stored, here, on_workers = reports
    assert on_workers == here
    assert on_workers["std"] == pytest.approx(stored["std"], rel=1e-9)
    with pytest.raises(UsageError, match="only with --recompute"):
        cli.app(["stats", store, "--workers", "1"], standalone_mode=False)


def test_a_source_that_changed_is_followed_alike(tmp_path: Path, backbone: Backbone, client: Client) -> None:
    source, path = growing.videos(tmp_path / "v", "abcde"), tmp_path / "s.zarr"
    growing.run(path, source, backbone)
    growing.put(source, "b", 9, 5)
    growing.put(source, "x", 6)
    growing.drop(source, "a")
    there = shutil.copytree(path, tmp_path / "there.zarr")
    todo = plan(there, open_source(source), backbone, growing.GROW)
    extract_distributed(todo, open_source(source), client, weights="random", device="cpu")
    split, _ = growing.run(path, source, backbone, growing.GROW)
    assert growing.ids(split) == list("abcdex") and files(there) == files(path)
    todo = plan(there, open_source(source), backbone, growing.PRUNE)
    extract_distributed(todo, open_source(source), client, weights="random", device="cpu")
    growing.run(path, source, backbone, growing.PRUNE)
    assert files(there) == files(path) and verify(there) == []


def test_workers_write_whole_shards(
    tmp_path: Path, backbone: Backbone, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARDED", 2)
    monkeypatch.setattr(layout, "SHARD_CHUNKS", (2, 2))
    source, path = growing.videos(tmp_path / "v", "abcde"), tmp_path / "s.zarr"
    todo = plan(tmp_path / "there.zarr", open_source(source), backbone, growing.OPTIONS)
    there = extract_distributed(todo, open_source(source), client, weights="random", device="cpu")
    assert there["train"].spec.shard_chunks == 2 and verify(there.path) == []
    growing.run(path, source, backbone)
    assert files(there.path) == files(path)


def test_videos_that_always_kill_their_worker_are_named(tmp_path: Path, backbone: Backbone, client: Client) -> None:
    def allow_none(dask_scheduler: object) -> None:
        dask_scheduler.allowed_failures = 0  # type: ignore[attr-defined]

    client.run_on_scheduler(allow_none)
    # Of the two groups that the worker had been given, dask reports one or the other first.
    with pytest.raises(DataError, match="the workers that ran train videos (2 to 3|4 to 4) died 1 times.*--batch-size"):
        run(tmp_path / "s.zarr", backbone, client, Deadly(tmp_path / "died", again=True))
    assert 3 not in manifest.read(tmp_path / "s.zarr" / "train")


def test_connecting_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(UsageError, match="--scheduler tcp://127.0.0.1:1: no dask scheduler answers"),
        connect("tcp://127.0.0.1:1"),
    ):
        pass
    with pytest.raises(UsageError, match="one of the two"), connect("tcp://127.0.0.1:1", 2):
        pass
    with pytest.raises(UsageError, match="--workers 0: must be at least 1"), connect(workers=0):
        pass
