"""Stores for the ranks of a training: together the run on the whole store, and one line for what does not fit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec
from featcache.stream.stream import FeatureStream
from featcache.upkeep.convert import ConvertOptions
from featcache.upkeep.ranks import export_for_ranks, own_store, rank_store
from featcache.upkeep.repair import repair
from featcache.upkeep.verify import verify
from slotlab.models.build import build_model
from slotlab.models.inputs import SAMPLE_VIDEOS
from slotlab.training.processes import Ranks
from slotlab.training.train import train, training_stream
from tests.commands import Slotlab
from tests.synthetic import DiscSource, make_store
from tests.training import rows_of, small

LENGTHS = (4, 4, 3, 7, 2, 5, 3, 4, 6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    source = DiscSource({"train": LENGTHS, "validation": (4, 4)})
    return make_store(tmp_path_factory.mktemp("whole") / "whole.zarr", source, chunk_frames=4)


@pytest.fixture(scope="module")
def folder(whole: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores for two ranks, with two videos for both."""
    out = tmp_path_factory.mktemp("ranks") / "parts"
    export_for_ranks(whole.path, out, ConvertOptions(), 2, besides=2)
    return out


def of_rank(folder: Path, rank: int, ranks: int = 2) -> FeatureStore:
    return FeatureStore.open(rank_store(folder, rank, ranks))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), data=st.data())
def test_shares_are_all_videos_and_about_as_large(lengths: list[int], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, len(lengths)))
    spec = SplitSpec("f", tuple(lengths), 4, (8, 8), False)
    shares = spec.shares(ranks)
    assert [video for share in shares for video in share] == list(range(len(lengths)))
    assert len(shares) == ranks and all(len(share) for share in shares)
    frames = [sum(lengths[video] for video in share) for share in shares]
    if len(set(lengths)) == 1:
        assert max(frames) - min(frames) <= lengths[0]
    with pytest.raises(UsageError, match="cannot be shared"):
        spec.shares(len(lengths) + 1)


def test_shares_stay_what_they_are() -> None:
    """Stores that lie on other machines' disks, and runs that resume, rely on it."""
    spec = SplitSpec("f", LENGTHS, 4, (8, 8), False)
    assert spec.shares(2) == [range(0, 5), range(5, 9)]
    assert spec.shares(3) == [range(0, 4), range(4, 7), range(7, 9)]


def test_a_rank_has_its_videos_and_no_other_file(whole: FeatureStore, folder: Path) -> None:
    held = {0: [0, 1, 2, 3, 4], 1: [0, 4, 5, 6, 7, 8]}  # 0 and 4 are for both
    for rank, videos in held.items():
        store = of_rank(folder, rank)
        split = store["train"]
        assert list(split.videos) == videos and verify(store.path) == []
        for video in videos:
            assert torch.equal(split.tokens("block1", video), whole["train"].tokens("block1", video))
        chunks = len(list((split.path / "features/block1").glob("c.*")))
        assert chunks == sum(-(-LENGTHS[video] // 4) for video in videos)
        for name, values in whole["train"].statistics("block1").to_arrays().items():
            assert (split.statistics("block1").to_arrays()[name] == values).all()
        assert store["validation"].complete


def test_what_a_rank_lacks_is_damage_and_repaired_by_another_export(
    whole: FeatureStore, tmp_path: Path, folder: Path
) -> None:
    (path,) = export_for_ranks(whole.path, tmp_path / "parts", ConvertOptions(), 2, only=[1], besides=2)
    (path / "train/features/block1/c.0.0.0").unlink()
    assert [damage.what for damage in verify(path)] == ["train/features/block1/c.0.0.0 is missing"]
    with pytest.raises(UsageError, match="one rank's videos of .*whole.zarr; delete .*make it again"):
        repair(path)


def test_a_part_that_lost_what_it_is_is_not_repaired_as_a_whole(whole: FeatureStore, tmp_path: Path) -> None:
    (path,) = export_for_ranks(whole.path, tmp_path / "parts", ConvertOptions(), 2, only=[1], besides=2)
    (path / "train/zarr.json").unlink()
    with pytest.raises(DataError, match=r"has 6 of the 9 videos of .*whole.zarr: one rank's.*delete .* slotlab export"):
        repair(path)
    assert not (path / "train/zarr.json").exists()


def test_an_interrupted_export_resumes(whole: FeatureStore, tmp_path: Path, folder: Path) -> None:
    def interrupt(_split: str, done: int, _total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_for_ranks(whole.path, tmp_path, ConvertOptions(), 2, [1], 2, interrupt)
    split = of_rank(tmp_path, 1)["train"]
    with pytest.raises(DataError, match=r"export unfinished \(3 of 6 videos\); run the same slotlab export"):
        split.require_share(1, 2)
    export_for_ranks(whole.path, tmp_path, ConvertOptions(), 2, [1], 2)
    assert of_rank(tmp_path, 1)["train"].require_share(1, 2).videos == of_rank(folder, 1)["train"].videos


@pytest.mark.parametrize("residence", ["disk", "host"])
@pytest.mark.parametrize("clip", [1, 3])
def test_ranks_stream_what_they_would_of_the_whole_store(
    whole: FeatureStore, folder: Path, residence: str, clip: int
) -> None:
    def streams(store: FeatureStore, rank: int, world: int, batch: int) -> FeatureStream:
        return FeatureStream(
            store["train"], "block1", batch_size=batch, clip=clip, seed=3, residence=residence,  # type: ignore[arg-type]
            rank=rank, world_size=world, shares=2,
        )  # fmt: skip

    alone = streams(whole, 0, 1, 6)
    ranks = [streams(of_rank(folder, rank), rank, 2, 3) for rank in range(2)]
    on_whole = [streams(whole, rank, 2, 3) for rank in range(2)]
    if residence == "host":
        rows = sum(reader.rows.shape[0] for stream in ranks for reader in stream._readers.values())  # type: ignore[attr-defined]
        assert rows == whole["train"].spec.rows, "a rank's memory is for its own videos"
    for _, one, *parts in zip(range(12), alone, *ranks, *on_whole, strict=False):
        rows = np.concatenate([part.rows for part in parts[:2]])
        assert (rows == one.rows).all() and (np.diff(rows) >= 0).all()
        assert torch.equal(torch.cat([part.features for part in parts[:2]]), one.features)
        assert all((part.rows == other.rows).all() for part, other in zip(parts[:2], parts[2:], strict=True))


def test_a_share_has_epochs_of_its_own(whole: FeatureStore) -> None:
    split = whole["train"]
    stream = FeatureStream(split, "block1", batch_size=4, shares=2)
    for share, order in enumerate(stream.orders):
        own = [row for v in split.spec.shares(2)[share] for row in range(*split.rows(v).indices(split.spec.rows))]
        taken = [row for step in range(2 * len(own)) for row in order.take(0, step, 1).tolist()]
        assert sorted(taken[: len(own)]) == sorted(taken[len(own) :]) == own and taken[: len(own)] != taken[len(own) :]


def test_a_model_is_calibrated_alike_on_every_rank(whole: FeatureStore, tmp_path: Path) -> None:
    """Its sample of videos is spread over the whole split."""
    export_for_ranks(whole.path, tmp_path, ConvertOptions(), 3, besides=SAMPLE_VIDEOS)
    for preset in ("default", "objects", "dinosaur"):
        expected = built(preset, whole)
        for rank in range(3):
            found = built(preset, of_rank(tmp_path, rank, 3))
            assert all(torch.equal(value, expected[name]) for name, value in found.items())


def built(preset: str, store: FeatureStore) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(small(preset=preset), store).state_dict()


def test_a_store_without_the_sample_is_refused(whole: FeatureStore, tmp_path: Path) -> None:
    export_for_ranks(whole.path, tmp_path, ConvertOptions(), 2, besides=0)
    with pytest.raises(IncompatibleError, match="has the videos of rank 1 of 2, for training alone"):
        list(of_rank(tmp_path, 1)["train"].spread(2))


def test_what_does_not_fit_is_one_line(whole: FeatureStore, folder: Path, tmp_path: Path) -> None:
    store, config = of_rank(folder, 0), small(optim__batch_size=6)
    for ranks, told in {
        Ranks(torch.device("cpu"), 1, 2): "rank 0 of 2, this is rank 1 of 2; name the folder of all parts with --cache",
        Ranks(torch.device("cpu"), 0, 3): "rank 0 of 2, this is rank 0 of 3; start 2 processes with torchrun, or name",
    }.items():
        with pytest.raises(IncompatibleError, match=told):
            training_stream(config, store, ranks)
    with pytest.raises(IncompatibleError, match="this is rank 0 of 1; start 2 processes with torchrun"):
        train(config, store, tmp_path / "run")
    with pytest.raises(IncompatibleError, match="is for 2 ranks; leave out data.shares = 3"):
        train(small("data.shares=3"), store, tmp_path / "run")
    with pytest.raises(UsageError, match="batch_size 4 has no 3 equal shares"):
        train(small("data.shares=3"), whole, tmp_path / "run")
    with pytest.raises(UsageError, match="no clips of 7 frames in share 1 of 2; use fewer ranks"):
        FeatureStream(whole["train"], "block1", batch_size=2, clip=7, shares=2)
    assert not (tmp_path / "run").exists()
    with pytest.raises(IncompatibleError, match=rf"for training alone; name the store .* {whole.path}"):
        store["train"].require_complete()


def test_the_commands(slotlab: Slotlab, whole: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = slotlab("export", whole.path, "parts", "--for-ranks", 3, "--rank", 2)
    assert done.code == 0 and done.out.split() == ["parts/rank-2-of-3.zarr:", "written"]
    for options, code, told in (
        (["--for-ranks", 1], 2, "must be at least 2"),
        (["--for-ranks", 99], 2, "9 videos cannot be shared by 99 ranks"),
        (["--for-ranks", 2, "--rank", 2], 2, "--rank 2: must be from 0 to 1"),
        (["--rank", 0], 2, "--rank: only with --for-ranks"),
        (["--for-ranks", 2, "--format", "hdf5"], 2, "ranks train on zarr stores"),
        (["--for-ranks", 2, "--dtype", "int8"], 2, "copies a store's tokens as they are"),
        (["--for-ranks", 2, "--split", "validation"], 2, "divides train; name it too"),
    ):
        refused = slotlab("export", whole.path, "other", *options)
        assert (refused.code, told in refused.said, refused.said.count("\n")) == (code, True, 1), refused.said
    assert not (tmp_path / "other").exists()
    for rank, ranks, code, told in (
        (0, 3, 3, f"rank-0-of-3.zarr: missing; make it here with: slotlab export {whole.path} parts --for-ranks 3"),
        (0, 1, 4, "has stores for 3 ranks, and 1 trains; start 3 processes with torchrun, or name the whole store"),
        (0, 2, 4, "has stores for 3 ranks, and 2 train"),
    ):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        refused = slotlab("train", "--cache", "parts", "--device", "cpu")
        assert (refused.code, told in refused.said, refused.said.count("\n")) == (code, True, 1), refused.said
    assert own_store(tmp_path / "parts", 2, 3) == tmp_path / "parts/rank-2-of-3.zarr"
    assert own_store(whole.path, 1, 2) == whole.path
    monkeypatch.delenv("WORLD_SIZE")
    refused = slotlab("stats", "parts/rank-2-of-3.zarr")
    assert refused.code == 4 and f"exported from, {whole.path}" in refused.said


RUNS = """
import os, sys
from pathlib import Path
from featcache.errors import FeatcacheError
from featcache.store.reading import FeatureStore
from featcache.upkeep.ranks import own_store
from slotlab.config.load import read_toml, validate
from slotlab.training.train import train

here, rank = Path(sys.argv[1]), int(os.environ["RANK"])
config = validate(read_toml(here / "config.toml"), "")
for run in ("whole", "parts", "mixed"):
    store, os.environ["MASTER_PORT"] = (here / run / "store").read_text().split()
    if run == "mixed" and rank:
        store = here / "stale"
    try:
        train(config, FeatureStore.open(own_store(Path(store), rank, 2)), here / run / "run")
    except FeatcacheError as error:
        (here / run / f"error-{rank}").write_text(f"{type(error).__name__} {error}")
"""


@pytest.mark.slow
def test_two_ranks_on_their_own_stores_are_two_ranks_on_the_whole(
    tmp_path: Path, whole: FeatureStore, folder: Path
) -> None:
    """Bit for bit; and nearly the run of one process, which sums in another order. A stale export is found out."""
    config = small("data.shares=2", "checkpoint_every=5", preset="videosaur", optim__steps=8)
    (tmp_path / "config.toml").write_text(config.to_toml())
    changed = make_store(tmp_path / "c.zarr", DiscSource({"train": (*LENGTHS[:-1], 5), "validation": (4, 4)}))
    export_for_ranks(changed.path, tmp_path / "stale", ConvertOptions(), 2, besides=2)
    for run, store in {"whole": whole.path, "parts": folder, "mixed": folder}.items():
        (tmp_path / run).mkdir()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            (tmp_path / run / "store").write_text(f"{store} {free.getsockname()[1]}")
    fixed = {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **fixed, "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUNS, str(tmp_path)],
            env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in ranks:
            told = process.communicate(timeout=300)[1]
            assert process.returncode == 0, told[-2000:]
    finally:
        for process in ranks:
            process.kill()
    whole_run, parts_run = tmp_path / "whole/run", tmp_path / "parts/run"
    assert rows_of(parts_run) == rows_of(whole_run) and len(rows_of(parts_run)) == 8
    saved = "checkpoint/model.safetensors"
    assert (parts_run / saved).read_bytes() == (whole_run / saved).read_bytes()
    one = train(config, whole, tmp_path / "one")
    losses = [[row["loss"] for row in rows_of(run)] for run in (one, parts_run)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert json.loads((parts_run / "store.json").read_text())["path"].endswith("rank-0-of-2.zarr")
    errors = [(tmp_path / f"mixed/error-{rank}").read_text() for rank in range(2)]
    assert all("IncompatibleError" in e and "rank 1 has other features or videos than rank 0" in e for e in errors)
    assert not (tmp_path / "mixed/run").exists()
