"""A learnt upsampler of soft masks beside guided edges and finer grids: what each is worth on each set, at what cost.

    python -m benchmarks.upsampler RUN [RUN ...] --learn STORE:SPLIT ... --sets NAME=STORE[:SPLIT] ...
        [--fine NAME=STORE[:SPLIT] ...] [--first NAME=N ...] [--last NAME=N ...] [--stride NAME=N ...] [--json]

The upsampler is in the manner of JAFAR (Couairon et al. 2025, arXiv:2506.11136): a value at a point of the frame is a
mean of the values on the grid, weighted by attention from what a few convolutions see at that point to the mean of
what they see in each patch. As in AnyUp (Wimmer et al. 2025, arXiv:2510.12764) a point attends to the patches near it
alone, and the weights do not depend on the values: so what is learnt on tokens serves masks, which stay masks. It
learns without labels from the frames and tokens in a store: means of tokens over 2 x 2 or 4 x 4 patches have to give
the tokens of the patches.

``--sets`` are scored with each way of upsampling, every N-th frame by ``--stride`` and the first or last videos alone;
``--fine``, stores of the same frames on a finer grid, with the ways that need no training, all frames. FG-ARI, mBO (as
in benchmarks/sets.py) and boundary F are means over frames, then runs; milliseconds a frame are of one thread, and do
not count what else runs on the machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import report
from benchmarks.sets import mean_scores, split_of
from featcache.store.reading import Split
from slotlab.masks.labels import masks_to_labels
from slotlab.masks.refine import Guided, refine
from slotlab.models.normalise import Normaliser
from slotlab.models.segments import SHRINKAGE
from slotlab.runs.loaded import load_run
from slotlab.scoring.boundaries import BoundaryScores
from slotlab.scoring.follow import follow
from slotlab.scoring.tables import count_labels, ground_truth, labelled_frames, require_truth

PIXELS = 8  # of a patch's side, that the convolutions see


class Upsampler(nn.Module):
    """Values on a grid to ``cells`` times the grid, as means of those of the 5 x 5 patches around, by the frame."""

    def __init__(self, width: int = 32, radius: int = 2) -> None:
        super().__init__()
        self.radius = radius
        self.see = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.query, self.key = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))  # of likeness, log
        self.reach = nn.Parameter(torch.tensor(0.0))  # of the squared distance in patches, log

    def forward(self, values: Tensor, frames: Tensor, cells: int) -> Tensor:
        """Values (B, C, h, w) and frames (B, 3, H, W) in [0, 1] to values (B, C, h * cells, w * cells)."""
        rows, columns = values.shape[-2:]
        seen = self.see(_resized(frames, (rows, columns)) - 0.5)
        query = F.adaptive_avg_pool2d(self.query(seen), (rows * cells, columns * cells))
        query = F.normalize(query, dim=1).unflatten(3, (columns, cells)).unflatten(2, (rows, cells))
        query = query.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # (B, h * w, cells^2, width)
        key = F.normalize(F.adaptive_avg_pool2d(self.key(seen), (rows, columns)), dim=1)
        logits = self.scale.exp() * (query @ self._around(key).transpose(-1, -2))  # (B, h * w, cells^2, near)
        logits = logits - self.reach.exp() * self._distances(cells)
        inside = self._around(values.new_ones(1, 1, rows, columns))[..., 0].unsqueeze(2) > 0  # (1, h * w, 1, near)
        weights = logits.masked_fill(~inside, -torch.inf).softmax(-1)
        fine = weights @ self._around(values)  # (B, h * w, cells^2, C)
        fine = fine.unflatten(2, (cells, cells)).unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4)
        return fine.flatten(4, 5).flatten(2, 3)

    def _around(self, x: Tensor) -> Tensor:
        """What lies in the patches around each patch, (B, h * w, near, C), of (B, C, h, w); 0 outside the frame."""
        side = 2 * self.radius + 1
        return F.unfold(x, side, padding=self.radius).unflatten(1, (x.shape[1], side**2)).permute(0, 3, 2, 1)

    def _distances(self, cells: int) -> Tensor:
        """Squared distance in patches of each cell of a patch from the centres around, (cells^2, near)."""
        inside = (torch.arange(cells) + 0.5) / cells - 0.5
        near = torch.arange(-self.radius, self.radius + 1.0)
        along = (inside[:, None] - near).square()  # (cells, side)
        return (along[:, None, :, None] + along[None, :, None, :]).flatten(2).flatten(0, 1)


Way = Callable[[Tensor, Tensor], Tensor]  # masks (T, K, h, w) and frames (T, H, W, 3) uint8 to finer masks
Row = tuple[float, float, float, float]  # FG-ARI, mBO, boundary F, milliseconds a frame

STEPS, BATCH, RATE, DIMS = 600, 16, 2e-3, 128
CELLS = 3  # of a patch's side in use: the grid that the guided filter is fitted on


def learn(splits: list[Split], frames: int) -> Upsampler:
    """An upsampler trained on the splits' tokens, whitened by their own statistics, of about so many frames."""
    torch.manual_seed(0)
    known, pictures = [], []
    for split in splits:
        tap = next(iter(split.store.spec.taps))
        grid = split.store.spec.taps[tap].grid
        whiten = Normaliser.from_moments(f"whiten={DIMS}", split.statistics(tap), SHRINKAGE, "channel")
        every = max(1, sum(each.frames for each in splits) // frames)
        for video in split.videos:
            known.append(whiten(split.tokens(tap, video)[::every]).unflatten(1, grid).permute(0, 3, 1, 2))
            pictures.append(_resized(as_guide(torch.from_numpy(split.video(video)[::every])), grid))
    tokens, guides = torch.cat(known), torch.cat(pictures)
    model = Upsampler()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for step in range(STEPS):
        chosen = torch.randint(len(tokens), (BATCH,))
        flips = [3] if step % 3 == 0 else []
        truth, cells = tokens[chosen].flip(flips), (2, 4)[step % 2]
        fine = model(F.avg_pool2d(truth, cells), guides[chosen].flip(flips), cells)
        loss = F.mse_loss(fine, truth) + 1 - F.cosine_similarity(fine, truth, dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def as_guide(frames: Tensor) -> Tensor:
    """Frames (T, H, W, 3) uint8 as (T, 3, H, W) in [0, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 255


def _resized(guide: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(guide, size=(grid[0] * PIXELS, grid[1] * PIXELS), mode="area")


def ways_of(model: Upsampler) -> dict[str, Way]:
    """The ways to upsample that are compared; scores upsample what is left bilinearly."""

    def learnt(masks: Tensor, frames: Tensor) -> Tensor:
        return model(masks, as_guide(frames), CELLS)

    usual = Guided()
    # The same windows, in pixels: what is upsampled has finer patches.
    after = Guided(
        scales=tuple(scale // CELLS for scale in usual.scales), radius=CELLS * usual.radius, votes=CELLS * usual.votes
    )
    return {
        "plain": lambda masks, frames: masks,
        "guided": lambda masks, frames: refine(masks, frames, "guided"),
        "learnt": learnt,
        "learnt, guided": lambda masks, frames: refine(learnt(masks, frames), frames, "guided", after),
    }


def measured(run: Path, split: Split, videos: list[int], stride: int, ways: Mapping[str, Way]) -> dict[str, Row]:
    """The row of each way, of every ``stride``-th labelled frame of some videos."""
    loaded, labels, size = load_run(run, split.store.path), count_labels(split), split.spec.frame_size
    outlines = {name: BoundaryScores(size) for name in ways}
    tables: dict[str, list[Tensor]] = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for followed in follow(loaded, split, videos):
        truth = ground_truth(split, followed.video)
        known = labelled_frames(truth).nonzero().flatten()[::stride]
        frames = torch.from_numpy(split.video(followed.video))
        for at in known.tolist():
            masks = followed.masks[at : at + 1].float()
            masks = masks[:, (masks > 0).flatten(2).any(2)[0]]  # slots without a patch get no pixel
            for name, way in ways.items():
                began = time.process_time()
                fine = way(masks, frames[at : at + 1])
                seconds[name] += time.process_time() - began
                found = masks_to_labels(fine, size)
                tables[name].extend(outlines[name].add(found, truth[at : at + 1], fine.shape[1], labels))
    rows = {}
    for name, of_frames in tables.items():
        f = outlines[name].mean_f()
        rows[name] = (*mean_scores(of_frames), math.nan if f is None else f, 1e3 * seconds[name] / len(of_frames))
    return rows


def line(rows: list[Row]) -> str:
    """Means over runs, and half the range of each score."""
    means = [statistics.fmean(values) for values in zip(*rows, strict=True)]
    halves = [(max(values) - min(values)) / 2 for values in zip(*rows, strict=True)]
    told = [f"{mean:.3f} (±{half:.3f})" for mean, half in zip(means, halves, strict=True)]
    return f"{' '.join(told[:3])}, {means[3]:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--learn", nargs="+", required=True, metavar="STORE:SPLIT")
    parser.add_argument("--frames", type=int, default=1440, help="number of frames to learn from")
    for option in ("--sets", "--fine", "--first", "--last", "--stride"):
        parser.add_argument(option, nargs="*", default=[], metavar="NAME=...")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = (args.sets, args.fine, args.first, args.last, args.stride)
    sets, fine, first, last, stride = (dict(pair.split("=", 1) for pair in pairs) for pairs in options)
    began = time.process_time()
    ways = ways_of(learn([split_of(place) for place in args.learn], args.frames))
    learning = time.process_time() - began
    print(f"learnt in {learning:.0f} s of one thread", flush=True)
    free = {name: way for name, way in ways.items() if "learnt" not in name}
    found: dict[str, dict[str, list[Row]]] = {}
    for places, those in ((sets, ways), (fine, free)):
        for name, place in places.items():
            split = require_truth(split_of(place))
            videos = list(split.videos)[: int(first.get(name, len(split.videos)))][-int(last.get(name, 0)) :]
            every = int(stride.get(name, 1)) if places is sets else 1
            runs = [measured(run, split, videos, every, those) for run in args.runs]
            grid = "x".join(map(str, next(iter(split.store.spec.taps.values())).grid))
            for way in those:
                found.setdefault(name, {})[f"{grid} {way}"] = rows = [each[way] for each in runs]
                print(f"{name}, {grid}, {way}: {line(rows)}", flush=True)
    if args.json:
        report("upsampler", {"learning_seconds": learning, "sets": found})


if __name__ == "__main__":
    main()
