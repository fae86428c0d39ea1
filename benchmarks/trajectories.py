"""What more trajectories are worth to a world model: fewer training videos, and every N-th frame of them.

    python -m benchmarks.trajectories RUN [--videos 15 30 60] [--strides 1 2] [--seeds 0 1 2] [--hold-out N]
        [--folder runs/trajectories] [--set KEY=VALUE ...] [--stores-alone]

RUN has its tracks (``slotlab slots RUN``). Stores of a part of the videos are made of them and of the features that
they are of, with statistics of their own; they stay in the folder, and any command takes them. Of a stride N, a
training video becomes N videos that begin one frame apart, so that no frame is lost; predictions begin after the same
frame as without it, and see and predict as far. ``--hold-out N`` trains without the last N training videos and scores
these in place of the validation split: to choose settings on.

A row of scores for each part, mean (spread) over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from featcache.extraction.plan import strided
from featcache.moments import Moments
from featcache.store.encoding import ENCODINGS
from featcache.store.reading import FeatureStore, Split
from featcache.store.writing import StoreWriter
from slotlab.config.load import load_config
from slotlab.config.model import DynamicsConfig
from slotlab.dynamics.measures import MEASURES
from slotlab.dynamics.rollout import Rollout, features_at, load_dynamics, roll_out
from slotlab.dynamics.rows import ROWS
from slotlab.dynamics.tracks import stored_video
from slotlab.runs.checkpoint import CONFIG
from slotlab.runs.folder import tracks_path
from slotlab.training.train import train

AHEAD = (2, 4, 8, 18)  # frames of the whole video
SHOWN = [measure for measure in MEASURES if measure.key in ("mse", "mbo", "mbo_moving", "centre")]
TRAIN, VALIDATION = "train", "validation"

Piece = tuple[int, int]  # a video, and the first of its frames that is taken
Chosen = Mapping[str, tuple[Split, Sequence[Piece]]]  # what each split of a new store takes from one that is there


def some(splits: Mapping[str, Split], videos: int, stride: int, hold_out: int, burn_in: int) -> Chosen:
    """The first ``videos`` of the training split, and what they are scored on."""
    training = splits[TRAIN].videos
    scored = (splits[VALIDATION], splits[VALIDATION].videos)
    if hold_out:
        training, scored = training[:-hold_out], (splits[TRAIN], training[-hold_out:])
    last = (burn_in - 1) % stride  # so that the frame that is seen last is one of them
    return {
        TRAIN: (splits[TRAIN], [(video, first) for video in training[:videos] for first in range(stride)]),
        VALIDATION: (scored[0], [(video, last) for video in scored[1]]),
    }


def part(store: FeatureStore, out: Path, chosen: Chosen, stride: int, features: FeatureStore | None = None) -> None:
    """Write a store of pieces of a store's videos; of tracks, ``features`` is that of the same pieces' features."""
    origin = store.spec.exported_from if features is None else str(features.path.resolve())
    spec = replace(store.spec, exported_from=origin, frame_stride=stride)
    rounded = ENCODINGS[spec.dtype].rounded
    with StoreWriter(out, spec) as writer:
        for name, (of, pieces) in chosen.items():
            split = store[of.name]
            videos = [strided(stored_video(split, video), stride, first) for video, first in pieces]
            form = replace(
                split.spec,
                statistics_videos=0,
                shard_chunks=0,
                lengths=tuple(len(video.frames) for video in videos),
                names=tuple(f"{video.id}/{first}" for video, (_, first) in zip(videos, pieces, strict=True)),
                fingerprints=tuple(f"{split.spec.content}/{video}/{first}/{stride}" for video, first in pieces),
            )
            target = writer.split(name, form)
            moments = {tap: Moments.empty(shape.patches, shape.dim) for tap, shape in spec.taps.items()}
            for place, ((video, first), shown) in enumerate(zip(pieces, videos, strict=True)):
                tokens = {tap: split.tokens(tap, video)[first::stride].float() for tap in spec.taps}
                target.write(place, replace(shown, id=form.names[place]), tokens)
                for tap, values in tokens.items():
                    moments[tap] += Moments.from_tokens(rounded(values))
            beside = {} if features is None else {tap: features[name].statistics(tap) for tap in features.spec.taps}
            target.finish(moments | beside)
            target.close()


def finished(path: Path) -> bool:
    if not path.exists():
        return False
    store = FeatureStore.open(path)
    return {TRAIN, VALIDATION} <= {*store.splits} and all(store[name].complete for name in store.splits)


def stores(run: Path, folder: Path, videos: int, stride: int, hold_out: int, burn_in: int) -> Path:
    """The tracks of a part of the videos, made unless they are there, beside their features."""
    tracks, features = (folder / f"{kind}-{videos}-{stride}-{hold_out}.zarr" for kind in ("tracks", "features"))
    if not finished(tracks):
        whole = FeatureStore.open(tracks_path(run))
        dense = features_at(whole)
        chosen = some({name: whole[name] for name in whole.splits}, videos, stride, hold_out, burn_in)
        part(dense, features, chosen, stride)
        part(whole, tracks, chosen, stride, FeatureStore.open(features))
    return tracks


def scored(tracks: Path, out: Path, stride: int, seed: int, overrides: Sequence[str]) -> Rollout:
    """The scores of a world model that is trained on tracks, on their validation split; a run goes on where it is."""
    usual = load_config("dynamics", None, list(overrides))
    assert isinstance(usual.model, DynamicsConfig)
    seen, ahead = usual.model.burn_in // stride, (usual.data.clip - usual.model.burn_in) // stride
    shorter = [f"model.burn_in={seen}", f"data.clip={seen + ahead}", f"seed={seed}"]
    config = load_config("dynamics", None, [*overrides, *shorter])
    loaded = load_dynamics(train(config, FeatureStore.open(tracks), out, resume=(out / CONFIG).exists()))
    return roll_out(loaded, features_at(loaded.store), loaded.store[VALIDATION], {"rollout": ROWS["rollout"]})


def cells(found: Sequence[Rollout], stride: int) -> list[str]:
    """Scores at the frames that are shown, mean (spread) of several models."""
    told = []
    for measure in SHOWN:
        at = []
        for ahead in AHEAD:
            known = [v for of in found if (v := of.means("rollout", measure.key)[ahead // stride - 1]) is not None]
            if not known:
                at.append("–")
                continue
            mean, low, high = (f"{of(known):.{measure.digits}f}" for of in (statistics.fmean, min, max))
            at.append(f"{mean} ({low}–{high})" if len(found) > 1 else mean)
        told.append(", ".join(at))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--videos", type=int, nargs="+", default=[15, 30, 60])
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hold-out", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/trajectories"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--stores-alone", action="store_true", help="make the stores and train nothing")
    args = parser.parse_args()
    burn_in = load_config("dynamics", None, args.set).model.burn_in  # type: ignore[union-attr]
    if not args.stores_alone:
        print("| | " + " | ".join(f"{measure.title} at {', '.join(map(str, AHEAD))}" for measure in SHOWN) + " |")
        print("|---" * (1 + len(SHOWN)) + "|")
    for stride in args.strides:
        for videos in args.videos if stride == 1 else args.videos[-1:]:
            tracks = stores(args.run, args.folder, videos, stride, args.hold_out, burn_in)
            if args.stores_alone:
                print(tracks)
                continue
            name = f"{videos}-{stride}-{args.hold_out}"
            found = [scored(tracks, args.folder / f"run-{name}-{seed}", stride, seed, args.set) for seed in args.seeds]
            print(f"| {videos} videos, stride {stride} | " + " | ".join(cells(found, stride)) + " |", flush=True)


if __name__ == "__main__":
    main()
