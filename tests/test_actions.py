"""Actions as an input of world models: from files beside the slots, through training, to rollouts of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.sources.video import Instance, Video
from featcache.store.reading import FeatureStore
from featcache.store.writing import StoreWriter
from slotlab.dynamics.actions import read_actions
from slotlab.dynamics.rollout import load_dynamics
from slotlab.dynamics.tracks import make_tracks
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.dynamics.state import PLACE
from slotlab.models.inputs import Tracks
from slotlab.runs.loaded import load_run
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.synthetic import SIZE, DiscSource, make_store
from tests.training import small

FRAMES, BLOCK = 8, 8
LENGTHS: Mapping[str, tuple[int, ...]] = {"train": (FRAMES,) * 24, "validation": (FRAMES,) * 6}


class PushedSource(DiscSource):
    """Videos of one block that stands, but for the pushes it gets: each frame's says how far it is in the next."""

    def __init__(self) -> None:
        super().__init__(LENGTHS)

    def pushes(self, split: str, index: int) -> npt.NDArray[np.int64]:
        """(T, 2) pixels, rows and columns: drawn anew in each frame, and never out of the picture."""
        rng, places = np.random.default_rng((index, len(split), 7)), [np.array([12, 12])]
        for _ in range(FRAMES):
            places.append(rng.integers(0, SIZE - BLOCK + 1, 2))
            places[-1] = np.clip(places[-1], places[-2] - 7, places[-2] + 7)
        return np.diff(places, axis=0)

    def read(self, split: str, index: int) -> Video:
        rng = np.random.default_rng((index, len(split)))
        frames = rng.integers(90, 110, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        masks = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
        place = np.array([12, 12])
        for t, push in enumerate(self.pushes(split, index)):
            where = (t, slice(place[0], place[0] + BLOCK), slice(place[1], place[1] + BLOCK))
            frames[where], masks[where] = (250, 10, 10), 1
            place = place + push
        shown = tuple(int(n) for n in (masks == 1).sum((1, 2)))
        return Video(f"{split}-{index}", frames, masks, (Instance("cube", "large", "red", "metal", shown),))


def centres_of(masks: torch.Tensor) -> torch.Tensor:
    """Mean row and column, (T, K, 2), of masks (T, K, H, W)."""
    y, x = (axis.float() for axis in torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij"))
    return torch.stack([(masks * axis).sum((2, 3)) / masks.sum((2, 3)) for axis in (y, x)], -1)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FeatureStore, Path]:
    """A run on these videos, its tracks with the pushes, and their file."""
    folder, source = tmp_path_factory.mktemp("pushed"), PushedSource()
    run = train(small(preset="default", model__slots=2), make_store(folder / "s.zarr", source), folder / "run")
    file = folder / "pushes.npz"
    named = {f"{split}/{split}-{v}": source.pushes(split, v) for split in LENGTHS for v in range(len(LENGTHS[split]))}
    np.savez(file, **named)  # type: ignore[arg-type]
    loaded = load_run(run)
    return run, make_tracks(loaded, folder / "run/tracks.zarr", actions=read_actions(file, loaded.store)), file


@pytest.fixture(scope="module")
def followed(pushed: tuple[Path, FeatureStore, Path], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Tracks that hold the block and the floor exactly: their masks are the truth's, averaged over each patch."""
    features, other = load_run(pushed[0]).store, pushed[1]
    path, source = tmp_path_factory.mktemp("followed") / "t.zarr", PushedSource()
    with StoreWriter(path, other.spec) as writer:
        for split in (features[name] for name in features.splits):
            target = writer.split(split.name, replace(split.spec, statistics_videos=0, shard_chunks=0))
            for video in split.videos:
                read = source.read(split.name, video)
                assert read.segmentations is not None
                block = torch.from_numpy(read.segmentations).float().unflatten(1, (4, 8)).unflatten(3, (4, 8))
                block = block.mean((2, 4)).flatten(1)  # (T, N)
                masks = torch.stack([1 - block, block], 1)
                means = masks @ split.tokens("block1", video).float() / masks.sum(-1, keepdim=True)
                pushes = torch.from_numpy(source.pushes(split.name, video))
                whole = torch.from_numpy(read.segmentations).float()
                place = (centres_of(torch.stack([1 - whole, whole], 1)) - 15.5) / 8
                tokens = torch.cat([means, masks, pushes.unsqueeze(1).expand(-1, 2, -1), place], -1)
                target.write(video, read, {"tracks": tokens, "slots": other[split.name].tokens("slots", video).float()})
            target.finish({tap: other[split.name].statistics(tap) for tap in ("tracks", "slots", "block1")})
            target.close()
    return FeatureStore.open(path)


@pytest.mark.slow
def test_actions_stand_beside_the_slots(pushed: tuple[Path, FeatureStore, Path], tmp_path: Path) -> None:
    run, tracks, _ = pushed
    inputs, split, source = Tracks.in_store(tracks), tracks["validation"], PushedSource()
    assert (inputs.actions, inputs.dim, inputs.patches) == (2, 12, 16)
    tokens = inputs.read(split, 3)  # (T, K, D + N + A + 2)
    expected = torch.from_numpy(source.pushes("validation", 3)).unsqueeze(1).expand(-1, 2, -1)
    assert torch.equal(tokens[..., -4:-2].long(), expected)
    torch.testing.assert_close(inputs.masks(tokens), load_run(run).segment(load_run(run).store["validation"], 3).masks,
                               atol=1e-3, rtol=0)  # fmt: skip
    assert make_tracks(load_run(run), tracks.path).spec.model["actions"] == 2, "they stay"


@pytest.mark.slow
def test_what_a_block_does_next_is_known_from_its_push(followed: FeatureStore, tmp_path: Path) -> None:
    """The pushes are drawn at random: without them nothing can be known of the next places."""
    errors = {}
    for actions in (2, 0):
        parts = [f"model.actions={actions}", "optim.learning_rate=0.01", "model.layers=1", "data.clip=6"]
        parts += ["log_every=100"]
        config = small(*parts, preset="dynamics", optim__steps=250, optim__batch_size=8)
        loaded = load_dynamics(train(config, followed, tmp_path / str(actions)))
        assert isinstance(loaded.model, DynamicsModel) and loaded.config.model.actions == actions  # type: ignore[union-attr]
        off = []
        for video in followed["validation"].videos:
            seen = loaded.model.see(loaded.inputs.read(followed["validation"], video).unsqueeze(0))
            with torch.no_grad():
                future = loaded.model.roll_out(seen, FRAMES - 3)
            off.append((future - seen.vectors[:, 3:])[0, :, 1, PLACE].norm(dim=-1))
        errors[actions] = float(torch.stack(off).mean())  # patches
    assert errors[2] < 0.5 * errors[0], errors


@pytest.mark.slow
def test_actions_by_the_command_line_and_in_python(
    slotlab: Slotlab, pushed: tuple[Path, FeatureStore, Path], tmp_path: Path
) -> None:
    run, _, file = pushed
    place, made, exported = tmp_path / "t.zarr", tmp_path / "world", tmp_path / "slots.h5"
    assert slotlab("slots", run, "--out", place, "--actions", file).code == 0
    parts = [part for key in ("data.clip=5", "model.burn_in=3", "model.width=16") for part in ("--set", key)]
    ended = slotlab("train", "--preset", "dynamics", "--cache", place, *parts, "--steps", 2, "--out", made)
    assert ended.code == 0 and "actions = 2" in (made / "config.toml").read_text()
    assert slotlab("rollout", made, "--json").json["rows"]["rollout"]["mse"]["mean"] > 0
    ended = slotlab("slots", run, "--out", place, "--actions", tmp_path / "gone.txt")
    assert ended.code == 2 and "name an HDF5 file" in ended.said
    assert slotlab("slots", run, "--format", "hdf5", "--out", exported).code == 0
    with h5py.File(exported) as columns:
        expected = np.concatenate([PushedSource().pushes("train", video) for video in range(24)])
        np.testing.assert_array_equal(columns["train/actions"], expected)
    config = small("model.actions=3", preset="dynamics")
    with pytest.raises(UsageError, match="its actions have 2 numbers, and model.actions = 3"):
        train(config, pushed[1], tmp_path / "other")


def test_files_of_actions(pushed: tuple[Path, FeatureStore, Path], tmp_path: Path) -> None:
    store, source = load_run(pushed[0]).store, PushedSource()
    rows = {split: np.stack([source.pushes(split, v) for v in range(len(of))]) for split, of in LENGTHS.items()}
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        for split, values in rows.items():
            file[f"{split}/actions"] = values
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        for split, values in rows.items():
            file[f"{split}/action"] = values.reshape(-1, 2)
            file[f"{split}/ep_len"] = np.full(len(values), FRAMES)
            file[f"{split}/ep_offset"] = np.arange(len(values)) * FRAMES
    found = [read_actions(path, store) for path in (pushed[2], tmp_path / "rows.h5", tmp_path / "flat.h5")]
    assert len({of.digest for of in found}) == 1 and found[0].size == 2
    assert torch.equal(found[1].of["train"][5].long(), torch.from_numpy(rows["train"][5]))
    with h5py.File(tmp_path / "short.h5", "w") as file:
        for split, values in rows.items():
            file[f"{split}/actions"] = values[:, :-1]
    with pytest.raises(DataError, match=r"train-0: are of shape \(7, 2\); need \(8, numbers\)"):
        read_actions(tmp_path / "short.h5", store)
    np.savez(tmp_path / "few.npz", **{"train/train-0": rows["train"][0]})
    with pytest.raises(DataError, match="has no train/train-1; it needs the actions of every video"):
        read_actions(tmp_path / "few.npz", store)
    with h5py.File(tmp_path / "nan.h5", "w") as file:
        for split, values in rows.items():
            file[f"{split}/actions"] = np.where(values > 5, np.nan, values)
    with pytest.raises(DataError, match="hold a number that is not finite"):
        read_actions(tmp_path / "nan.h5", store)


def test_other_actions_are_not_mixed(pushed: tuple[Path, FeatureStore, Path]) -> None:
    run, tracks, file = pushed
    loaded = load_run(run)
    other = read_actions(file, loaded.store)
    other.of["train"][0].zero_()
    with pytest.raises(IncompatibleError) as caught:
        make_tracks(loaded, tracks.path, actions=other)
    assert {row.setting for row in caught.value.differences} == {"model.actions_digest"}
