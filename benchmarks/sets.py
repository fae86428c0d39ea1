"""One preset on many sets: training-free segments, the model untrained and trained, with and without guided edges.

    python -m benchmarks.sets --home STORE NAME=STORE[:SPLIT] ... [--own NAME=STORE[:SPLIT] ...] [--last NAME=N ...]
        [--stride 1] [--video] [--preset objects] [--seeds 0 1 2] [--own-steps N] [--then STORE[:SPLIT]]
        [--then-steps N] [--folder runs/sets] [--plain] [--set KEY=VALUE ...] [--json]

``carried`` is trained on the store ``--home`` alone and scored on every set as it is; ``own`` is trained on the set's
own videos of ``--own``, which must not be among those scored: ``--last moving=4`` scores the last 4 of a split alone.
``--own-steps`` makes that shorter; ``continued`` is the same, begun from the run ``carried``, directions and all, and
so is ``then``, on one more store for all sets. ``carried`` and ``own`` stand beside their start, a step at a rate of
next to nothing. ``--set`` changes settings of all runs. Runs are kept in the folder and used again: other settings want
another folder. With ``--stride N`` every N-th frame of a video counts; slots are followed over all of them. A set's
store may have another input size than the home's, which the preset ``objects`` can read. FG-ARI is a mean over frames
of two objects or more, mBO over all frames with objects; both at the store's frame size, of soft masks upsampled and,
without ``--plain``, of the same after a guided filter. With ``--video`` both are of whole videos, in which a slot must
keep its object. What training adds comes with a 95 % interval: a bootstrap over videos, or single pictures, of the
difference that each has, its mean over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import report
from featcache.store.reading import FeatureStore, Split
from slotlab.config.load import load_config
from slotlab.masks.refine import refine
from slotlab.models.normalise import Normaliser
from slotlab.models.segments import SHRINKAGE, soft_segments
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.follow import follow
from slotlab.scoring.intervals import Bootstrap
from slotlab.scoring.metrics import adjusted_rand_index, mean_best_overlap
from slotlab.scoring.tables import count_labels, ground_truth, labelled_frames, mask_tables, require_truth
from slotlab.training.train import train

Pair = tuple[float, float]  # FG-ARI and mBO
START = ["optim.steps=1", "optim.learning_rate=1e-12"]  # settings of an untrained run
STARTS = {"carried": "untrained", "then": "carried", "own": "own-untrained", "continued": "carried"}  # of each row


@dataclass(frozen=True)
class Scored:
    """FG-ARI and mBO (F,) of frames, NaN where there is none, and the video (F,) of each."""

    fg_ari: Tensor
    mbo: Tensor
    videos: Tensor

    @property
    def pair(self) -> Pair:
        return float(self.fg_ari.nanmean()), float(self.mbo.nanmean())


def split_of(place: str) -> Split:
    """``STORE:SPLIT``, or ``STORE`` for the split that a configuration evaluates, or the only one."""
    path, _, name = place.rpartition(":") if not Path(place).exists() else (place, "", "")
    store = FeatureStore.open(Path(path))
    return store[name or ("validation" if "validation" in store.splits else next(iter(store.splits)))]


def trained(preset: str, place: str, folder: Path, *overrides: str, init_from: Path | None = None) -> Path:
    """The run of a preset on a split, made unless it is there; it starts from another, if one is named."""
    if not (folder / "metrics.jsonl").exists():
        split = split_of(place)
        options = [f"data.train_split={split.name}", f"data.eval_split={split.name}", *overrides]
        train(load_config(preset, None, options), split.store, folder, init_from=init_from)
    return folder


def model_masks(loaded: LoadedRun, split: Split, videos: Iterable[int]) -> Iterator[Tensor]:
    """Published masks (T, K, rows, columns) of each video."""
    for followed in follow(loaded, split, videos):
        yield followed.masks


def free_masks(split: Split, videos: Iterable[int]) -> Iterator[Tensor]:
    """Training-free segments' masks, whitened by the split's own statistics."""
    tap = next(iter(split.store.spec.taps))
    normaliser = Normaliser.from_moments("whiten", split.statistics(tap), SHRINKAGE, "channel")
    rows, columns = split.store.spec.taps[tap].grid
    for video in videos:
        masks = soft_segments(normaliser(split.tokens(tap, video).float()), (rows, columns))
        yield masks.reshape(*masks.shape[:2], rows, columns)


def scores(
    masks: Iterable[Tensor], split: Split, videos: list[int], stride: int, plain: bool = False, by_video: bool = False
) -> dict[str, Scored]:
    """FG-ARI and mBO of plain masks and, as ", guided", of refined ones; of every ``stride``-th frame.

    They are of frames or, with ``by_video``, of videos, each of which counts as one large frame.
    """

    def counted(found: Tensor) -> Tensor:
        of_frames = mask_tables(found, truth[known], labels)
        return of_frames.sum(0, keepdim=True) if by_video else of_frames

    labels = count_labels(split)
    tables: dict[str, list[Tensor]] = {}
    numbers: list[int] = []
    for video, found in zip(videos, masks, strict=True):
        truth = ground_truth(split, video)
        known = labelled_frames(truth).nonzero().flatten()[::stride]
        tables.setdefault("", []).extend(counted(found[known]))
        numbers += [video] * (len(tables[""]) - len(numbers))
        if not plain:
            fine = refine(found[known], torch.from_numpy(split.video(video))[known], "guided")
            tables.setdefault(", guided", []).extend(counted(fine))
    return {edges: Scored(*frame_scores(of_frames), torch.tensor(numbers)) for edges, of_frames in tables.items()}


def frame_scores(tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """FG-ARI (F,) of frames of two objects or more, NaN for others, and mBO (F,), of counts (objects, slots)."""
    several = [int((table[1:].sum(-1) > 0).sum()) > 1 for table in tables]
    ari = [
        adjusted_rand_index(table[None], foreground=True) if more else torch.full((1,), torch.nan)
        for table, more in zip(tables, several, strict=True)
    ]
    return torch.cat(ari).double(), torch.cat([mean_best_overlap(table[None]) for table in tables]).double()


def mean_scores(tables: list[Tensor]) -> Pair:
    ari, overlap = frame_scores(tables)
    return float(ari.nanmean()), float(overlap.nanmean())


def added(rows: Mapping[str, Sequence[Scored]]) -> dict[str, dict[str, list[float]]]:
    """What the runs of a row have more than those that they started as: mean, low and high of each score."""
    found = {}
    for row, of_seeds in rows.items():
        name, comma, edges = row.partition(",")
        if (start := rows.get(f"{STARTS.get(name)}{comma}{edges}")) is None:
            continue
        values = {}
        for score in ("fg_ari", "mbo"):
            after, before = (torch.stack([getattr(x, score) for x in each]).mean(0) for each in (of_seeds, start))
            values[score] = after - before
        sure = Bootstrap().intervals(values, of_seeds[0].videos)
        found[row] = {score: [float(of.nanmean()), *(sure[score] or ())] for score, of in values.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="+", metavar="NAME=STORE[:SPLIT]")
    parser.add_argument("--home", required=True)
    parser.add_argument("--own", nargs="*", default=[], metavar="NAME=STORE[:SPLIT]")
    parser.add_argument("--last", nargs="*", default=[], metavar="NAME=N")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--preset", default="objects")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--own-steps", type=int, default=0)
    parser.add_argument("--then", default="", metavar="STORE[:SPLIT]")
    parser.add_argument("--then-steps", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/sets"))
    parser.add_argument("--plain", action="store_true", help="without guided edges, which take the longest")
    parser.add_argument("--video", action="store_true", help="scores of whole videos instead of frames")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    places, own, last = (dict(pair.split("=", 1) for pair in pairs) for pairs in (args.sets, args.own, args.last))
    found: dict[str, dict[str, object]] = {}
    for name, place in places.items():
        split = require_truth(split_of(place))
        videos = list(range(len(split.manifest)))[-int(last.get(name, 0)) :]
        training = {"untrained": (args.home, "home", [*args.set, *START]), "carried": (args.home, "home", args.set)}
        if args.then:
            training["then"] = (args.then, Path(args.then).stem, [*args.set, *lasting(args.then_steps)])
        if name in own:
            shorter = [*args.set, *lasting(args.own_steps)]
            training |= {
                "own-untrained": (own[name], name, [*args.set, *START]),
                "own": (own[name], name, shorter),
                "continued": (own[name], name, shorter),
            }
        rows = measured(split, videos, training, args)
        found[name] = {row: [one.pair for one in of_seeds] for row, of_seeds in rows.items()}
        found[name]["adds"] = added(rows)
        if not args.json:
            print(line(name, rows), flush=True)
    if args.json:
        report("sets", found)


def lasting(steps: int) -> list[str]:
    """Settings of a run of so many steps; 0: as many as the preset's."""
    return [f"optim.steps={steps}"] if steps else []


def measured(
    split: Split, videos: list[int], training: dict[str, tuple[str, str, list[str]]], args: argparse.Namespace
) -> dict[str, list[Scored]]:
    """The scores of each row and kind of edges, by seed. ``training`` has a store, its name and settings by row."""
    rows: dict[str, list[Scored]] = {}
    runs: dict[tuple[str, int], Path] = {}

    def add(row: str, masks: Iterable[Tensor]) -> None:
        for edges, scored in scores(masks, split, videos, args.stride, args.plain, args.video).items():
            rows.setdefault(row + edges, []).append(scored)

    add("tfs", free_masks(split, videos))
    for seed in args.seeds:
        for row, (place, home, options) in training.items():
            if row.endswith("untrained") and seed != args.seeds[0]:
                continue  # all seeds start from the same keys
            folder = args.folder / f"{args.preset}-{row}-{home}-{seed}"
            start = runs["carried", seed] if row in ("then", "continued") else None
            runs[row, seed] = trained(args.preset, place, folder, f"seed={seed}", *options, init_from=start)
            add(row, model_masks(load_run(runs[row, seed], split.store.path), split, videos))
    return rows


def line(name: str, rows: Mapping[str, Sequence[Scored]]) -> str:
    """A row of Markdown: FG-ARI/mBO, means over seeds and the spread of each, and what was added, with its interval."""
    adds, cells = added(rows), []
    for row, of_seeds in rows.items():
        means, spreads = zip(
            *((statistics.fmean(x), max(x) - min(x)) for x in zip(*(one.pair for one in of_seeds), strict=True)),
            strict=True,
        )
        more = (f"{of[0]:+.3f} [{', '.join(f'{x:+.3f}' for x in of[1:])}]" for of in adds.get(row, {}).values())
        spread = f"(±{spreads[0] / 2:.3f}/{spreads[1] / 2:.3f})"
        cells.append(" ".join([f"{row} {means[0]:.3f}/{means[1]:.3f} {spread}", *more]))
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
