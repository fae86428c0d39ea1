"""Every preset on one store for the same wall time, or the same frames, several seeds: which gives the best masks?

``python -m benchmarks.peers --cache cache/dinov2.zarr --seconds 240 --seeds 3 --out peers``
``python -m benchmarks.peers --cache cache/dinov2.zarr --frames 9600 --seeds 3 --out peers-frames``

Each run takes one thread; ``--workers`` of them run side by side. A run's number of steps is what fits into the time,
by its own step time measured just before, or what sees ``--frames``; a cosine schedule ends with the run, an
exponential one keeps its published half-life. Finished runs are kept: a second call goes on, and more seconds are
another folder.

The published batches (64 to 512 frames) allow a CPU a handful of steps in such a time, so the peers get
``--peer-frames`` a step instead, on ``--peer-patches`` random patches of each frame (an unbiased estimate of their
loss) and in the faster of float32 and bfloat16, all of which serves them better. Their learning rate is the published
one of the published batch. ``--peer-set data.normalize=none`` and the like change all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotlab.config.load import load_config
from slotlab.config.model import MASKS
from slotlab.config.schema import Config

if TYPE_CHECKING:
    from slotlab.runs.loaded import LoadedRun

PRESETS = ("default", "dinosaur", "dinosaur-ar", "savi-dinosaur", "videosaur", "slotcontrast", "pixel")
SCORES = ("fg_ari", "mbo", "fg_ari_video", "mbo_video")
TRAINING_VIDEOS = 20  # that decide which masks a preset is scored by
MEASURED_STEPS = 6


@dataclass(frozen=True)
class Peers:
    """What a CPU can afford of them."""

    frames: int  # a step
    patches: int  # that are decoded of each frame
    changes: tuple[str, ...]  # KEY=VALUE


def seconds_a_step(config: Config, cache: Path) -> float:
    """Median time of a step, without the first."""
    from featcache.store.reading import FeatureStore
    from slotlab.training.train import train

    ends: list[float] = []
    brief = config.model_copy(
        update={"log_every": 1, "optim": config.optim.model_copy(update={"steps": MEASURED_STEPS})}
    )
    with tempfile.TemporaryDirectory() as folder:
        train(brief, FeatureStore.open(cache), Path(folder) / "run", report=lambda _: ends.append(time.perf_counter()))
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def configured(preset: str, seed: int, peers: Peers) -> Config:
    """A preset with a number of frames a step that a CPU can afford; ours as it is."""
    from slotlab.training.schedule import learning_rate

    config = load_config(preset, None, (), seed=seed)
    if preset == "default":
        return config
    batch = max(1, peers.frames // config.data.clip)
    rate = learning_rate(config.optim)  # at the published batch
    changes = [f"optim.learning_rate={rate}", f"optim.reference_batch={batch}", f"optim.batch_size={batch}"]
    if getattr(getattr(config.model, "decoder", None), "kind", None) in ("mlp", "mix", "slot_mixer"):
        changes.append(f"model.decoder.patches={peers.patches}")
    return load_config(preset, None, [*changes, *peers.changes], seed=seed)


def fitted(config: Config, cache: Path, seconds: float, precisions: Sequence[str]) -> Config:
    """As many steps as the time allows, in the precision that allows the most."""
    choices = [
        config.model_copy(update={"optim": config.optim.model_copy(update={"precision": precision})})
        for precision in precisions
    ]
    step, config = min(((seconds_a_step(choice, cache), choice) for choice in choices), key=lambda pair: pair[0])
    return of_steps(config, round(seconds / step))


def of_frames(config: Config, frames: int) -> Config:
    """As many steps as see that many frames, each counted as often as it is seen."""
    return of_steps(config, frames // (config.optim.batch_size * config.data.clip))


def of_steps(config: Config, steps: int) -> Config:
    steps = max(2, steps)
    # The warm-up keeps its share of a run that is shorter than the published one.
    warmup = min(config.optim.warmup_steps, steps // 10)
    optim = config.optim.model_copy(update={"steps": steps, "warmup_steps": warmup})
    return config.model_copy(update={"optim": optim, "log_every": 50, "checkpoint_every": 500})


def one(
    preset: str, seed: int, cache: Path, seconds: float, out: Path, peers: Peers, frames: int | None = None
) -> dict[str, Any]:
    """Train and score a run, of ``frames`` rather than ``seconds`` where they are given; a line of the table."""
    import torch

    from featcache.store.reading import FeatureStore
    from slotlab.runs.checkpoint import load_run_config
    from slotlab.runs.loaded import load_run
    from slotlab.scoring.evaluate import evaluate
    from slotlab.training.train import train

    torch.set_num_threads(1)
    run = out / f"{preset}-seed{seed}"
    done = run / "peer.json"
    if not done.exists():
        begun = (run / "config.toml").exists()
        if begun:
            config = load_run_config(run)
        elif frames is not None:
            config = of_frames(configured(preset, seed, peers), frames)
        else:
            precisions = ("float32",) if preset == "default" else ("float32", "bfloat16")
            config = fitted(configured(preset, seed, peers), cache, seconds, precisions)
        train(config, FeatureStore.open(cache), run, resume=begun)
        loaded = load_run(run)
        result = evaluate(loaded)
        summary = json.loads((run / "summary.json").read_text())
        seen = config.optim.steps * config.optim.batch_size * config.data.clip
        row = {"preset": preset, "seed": seed, "seconds": summary["seconds"], "frames": seen}
        row |= {"steps": config.optim.steps, "warnings": result.warnings}
        row |= {kind: {key: result.masks[kind].values[key] for key in SCORES} for kind in MASKS}
        row["training"] = on_training_videos(loaded)
        row["error"] = held_out_error(loaded)
        done.write_text(json.dumps(row))
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def on_training_videos(loaded: LoadedRun) -> dict[str, float]:
    """FG-ARI and mBO together, of each kind of masks."""
    from slotlab.scoring.follow import follow
    from slotlab.scoring.scores import Scores

    split = loaded.store[loaded.config.data.train_split]
    scores = {kind: Scores() for kind in MASKS}
    for followed in follow(loaded, split, split.spread(TRAINING_VIDEOS)):
        for kind, of in scores.items():
            of.add_video(followed.tables(kind), followed.video)
    summaries = {kind: of.summary().values for kind, of in scores.items()}
    return {kind: (found["fg_ari"] or 0.0) + (found["mbo"] or 0.0) for kind, found in summaries.items()}


def held_out_error(loaded: LoadedRun) -> float:
    """Squared error on the evaluation split, every patch decoded, over the mean square of its tokens.

    The latter is the error of always predicting the training mean, where the normalisation subtracts it. Of a model
    that is not trained to reconstruct it says nothing.
    """
    split = loaded.store[loaded.config.data.eval_split]
    error, size = 0.0, 0.0
    for video in split.videos:
        output = loaded.segment(split, video)
        error += float((output.reconstruction - output.target).square().mean())
        size += float(output.target.square().mean())
    return error / size


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and the lowest to the highest, as Markdown; of the masks that won on training videos first."""
    titles = ("preset", "seeds", "seconds", "frames seen", "masks", "FG-ARI", "mBO", "FG-ARI video", "mBO video")
    titles += ("other masks' FG-ARI", "mBO", "error")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for preset in dict.fromkeys(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]

        best = max(MASKS, key=lambda kind: statistics.mean(row["training"][kind] for row in mine))
        (other,) = set(MASKS) - {best}
        columns = [[row[best][key] for row in mine] for key in SCORES]
        columns += [[row[other][key] for row in mine] for key in SCORES[:2]]
        columns.append([row["error"] for row in mine])
        scores = " | ".join(map(spread, columns))
        seconds = statistics.mean(row["seconds"] for row in mine)
        frames = statistics.mean(row["frames"] for row in mine)
        lines.append(f"| {preset} | {len(mine)} | {seconds:.0f} | {frames:.0f} | {best} | {scores} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("cache/dinov2.zarr"))
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--frames", type=int, help="number of frames that each run sees, instead of a time")
    parser.add_argument("--peer-frames", type=int, default=8)
    parser.add_argument("--peer-patches", type=int, default=64)
    parser.add_argument("--peer-set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("peers"))
    options = parser.parse_args()
    peers = Peers(options.peer_frames, options.peer_patches, tuple(options.peer_set))
    rows = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(one, preset, seed, options.cache, options.seconds, options.out, peers, options.frames)
            for seed in range(options.seeds)
            for preset in options.presets
        ]
        for job in jobs:
            rows.append(job.result())
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
