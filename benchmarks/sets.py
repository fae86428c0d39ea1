"""One preset on many sets: training-free segments, the model untrained and trained, with and without guided edges.

    python -m benchmarks.sets --home STORE NAME=STORE[:SPLIT] ... [--own NAME=STORE[:SPLIT] ...] [--last NAME=N ...]
        [--stride 1] [--video] [--preset objects] [--seeds 0 1 2] [--own-steps N] [--then STORE[:SPLIT]]
        [--then-steps N] [--folder runs/sets] [--plain] [--set KEY=VALUE ...] [--json]

``carried`` is trained on the store ``--home`` alone and scored on every set as it is; ``own`` is trained on the set's
own videos of ``--own``, which must not be among those scored: ``--last moving=4`` scores the last 4 of a split alone.
``--own-steps`` makes that shorter; ``continued`` is the same, begun from the run ``carried``, statistics and all, and
so is ``then``, on one more store for all sets. ``carried`` and ``own`` stand beside their start, a step at a rate of
next to nothing. ``--set`` changes settings of all runs. Runs are kept in the folder and used again: other settings want
another folder. With ``--stride N`` every N-th frame of a video counts; slots are followed over all of them. A set's
store may have another input size than the home's, which the preset ``objects`` can read. FG-ARI is a mean over frames
of two objects or more, mBO over all frames with objects; both at the store's frame size, of soft masks upsampled and,
without ``--plain``, of the same after a guided filter. With ``--video`` both are of whole videos, in which a slot must
keep its object.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator
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
from slotlab.scoring.metrics import adjusted_rand_index, mean_best_overlap
from slotlab.scoring.tables import count_labels, ground_truth, labelled_frames, mask_tables, require_truth
from slotlab.training.train import train

Pair = tuple[float, float]  # FG-ARI and mBO
START = ["optim.steps=1", "optim.learning_rate=1e-12"]  # settings of an untrained run


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
) -> dict[str, Pair]:
    """FG-ARI and mBO of plain masks and, as ", guided", of refined ones; of every ``stride``-th frame.

    They are means over frames or, with ``by_video``, over videos, each of which counts as one large frame.
    """

    def counted(found: Tensor) -> Tensor:
        of_frames = mask_tables(found, truth[known], labels)
        return of_frames.sum(0, keepdim=True) if by_video else of_frames

    labels = count_labels(split)
    tables: dict[str, list[Tensor]] = {}
    for video, found in zip(videos, masks, strict=True):
        truth = ground_truth(split, video)
        known = labelled_frames(truth).nonzero().flatten()[::stride]
        tables.setdefault("", []).extend(counted(found[known]))
        if not plain:
            fine = refine(found[known], torch.from_numpy(split.video(video))[known], "guided")
            tables.setdefault(", guided", []).extend(counted(fine))
    return {edges: mean_scores(of_frames) for edges, of_frames in tables.items()}


def mean_scores(tables: list[Tensor]) -> Pair:
    several = [table for table in tables if int((table[1:].sum(-1) > 0).sum()) > 1]
    ari = [float(adjusted_rand_index(table[None], foreground=True)) for table in several]
    overlap = torch.cat([mean_best_overlap(table[None]) for table in tables])
    return statistics.fmean(ari) if ari else float("nan"), float(overlap.nanmean())


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
    found = {}
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
        found[name] = measured(split, videos, training, args)
        if not args.json:
            print(line(name, found[name]), flush=True)
    if args.json:
        report("sets", found)


def lasting(steps: int) -> list[str]:
    """Settings of a run of so many steps; 0: as many as the preset's."""
    return [f"optim.steps={steps}"] if steps else []


def measured(
    split: Split, videos: list[int], training: dict[str, tuple[str, str, list[str]]], args: argparse.Namespace
) -> dict[str, list[Pair]]:
    """FG-ARI and mBO of each row and kind of edges, by seed. ``training`` has a store, its name and settings by row."""
    rows: dict[str, list[Pair]] = {}
    runs: dict[tuple[str, int], Path] = {}

    def add(row: str, masks: Iterable[Tensor]) -> None:
        for edges, pair in scores(masks, split, videos, args.stride, args.plain, args.video).items():
            rows.setdefault(row + edges, []).append(pair)

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


def line(name: str, rows: dict[str, list[Pair]]) -> str:
    """A row of Markdown: FG-ARI/mBO, means over seeds and the spread of each."""
    cells = []
    for row, pairs in rows.items():
        if pairs:
            means, spreads = zip(
                *((statistics.fmean(x), max(x) - min(x)) for x in zip(*pairs, strict=True)), strict=True
            )
            cells.append(f"{row} {means[0]:.3f}/{means[1]:.3f} (±{spreads[0] / 2:.3f}/{spreads[1] / 2:.3f})")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
