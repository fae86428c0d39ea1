"""What a finer grid buys: one configuration on the features of 224 px and of 448 px input, 16x16 and 32x32 patches.

    python -m benchmarks.resolution [--out runs/resolution] [--sizes 224 448] [--seeds 0 1 2]
                                    [--max-videos N] [--frame-stride N] [--preset default] [--steps N]
                                    [--refine guided] [--data SOURCE] [--backbone dinov2] [--device auto]

The same as, for each size,

    slotlab extract --backbone dinov2 --input-size SIZE --out OUT/SIZE.zarr
    slotlab train --cache OUT/SIZE.zarr --seed SEED --out OUT/SIZE-SEED
    slotlab eval OUT/SIZE-SEED --refine guided

and a table of the scores beside each grid's reference, with bytes and time. Resumes where it stopped. On one CPU core
the 448 px of a ViT-S/14 are one or two frames a second.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import report
from featcache.backbones.backbone import load_backbone
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.machine import pick_device
from featcache.sources import open_source
from featcache.store.reading import FeatureStore
from slotlab.commands.terminal import ExtractProgress, training_display
from slotlab.config.load import load_config
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.fine import outline_scores
from slotlab.training.train import train

SCORES = ("fg_ari", "mbo", "miou")


def extracted(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """The store of one input size, and what it took; extraction's time is kept beside it for a later call."""
    path, record = args.out / f"{size}.zarr", args.out / f"{size}.json"
    if not record.exists():
        source = open_source(args.data)
        backbone = load_backbone(args.backbone, args.weights, (), size, pick_device(args.device))
        options = ExtractOptions(
            splits=("train", "validation"), max_videos=args.max_videos, frame_stride=args.frame_stride
        )
        todo = plan(path, source, backbone, options)
        began = time.perf_counter()
        with ExtractProgress() as progress:
            store = extract(todo, source, backbone, progress)
        seconds = time.perf_counter() - began
        frames = sum(store[name].frames for name in store.splits)
        files = [file for name in store.splits for file in (path / name / "features").rglob("*") if file.is_file()]
        kept = {
            "frames": frames,
            "bytes_a_frame": round(sum(file.stat().st_size for file in files) / frames),
            # Of what this call extracted: a resumed one counts the rest alone.
            "frames_a_second": todo.frames_left / seconds,
        }
        record.write_text(json.dumps(kept))
    return dict(json.loads(record.read_text()))


def scored(size: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Scores of one seed on one size, trained first if it was not."""
    run = args.out / f"{size}-{seed}"
    store = FeatureStore.open(args.out / f"{size}.zarr")
    config = load_config(args.preset, None, args.override, optim__steps=args.steps, seed=seed)
    if not (run / "summary.json").exists():
        resume = (run / "config.toml").exists()
        with training_display(config.optim.steps) as show:
            train(config, store, run, resume=resume, device=pick_device(args.device), report=show)
    kept = run / "scores.json"
    if not kept.exists():
        loaded = load_run(run, store.path, pick_device(args.device))
        kept.write_text(json.dumps(evaluate(loaded).as_dict() | outline_scores(loaded, None, args.refine)))
    return dict(json.loads(kept.read_text())) | {"seconds": json.loads((run / "summary.json").read_text())["seconds"]}


def row(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Means over the seeds."""
    store, runs = extracted(size, args), [scored(size, seed, args) for seed in args.seeds]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    found = {key: mean([run[key] for run in runs]) for key in SCORES}
    found["boundary_f"] = mean([run["boundaries"]["boundary_f"] for run in runs])
    spread = {f"{key}_by_seed": [run[key] for run in runs] for key in SCORES[:2]}
    refined = {f"refined_{key}": mean([run["refined"][key] for run in runs]) for key in (*SCORES, "boundary_f")}
    reference = {f"reference_{key}": runs[0]["reference"][key] for key in SCORES}
    reference["reference_boundary_f"] = runs[0]["boundaries"]["reference"]["boundary_f"]
    seconds = mean([run["seconds"] for run in runs])
    return {"size": size, **found, **spread, **refined, **reference, **store, "training_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/resolution"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--backbone", default="dinov2")
    parser.add_argument("--weights")
    parser.add_argument("--data")
    parser.add_argument("--max-videos", type=int, help="largest number of videos of each split")
    parser.add_argument("--frame-stride", type=int, default=1)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", dest="override", action="append", default=[], help="setting as key=value")
    parser.add_argument("--refine", default="guided", choices=["guided", "crf"])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [row(size, args) for size in args.sizes]
    report("resolution", {"preset": args.preset, "steps": args.steps, "seeds": args.seeds, "rows": rows})
    print("\n| input | FG-ARI | mBO | boundary F | refined mBO | reference FG-ARI / mBO | KB a frame | frames/s | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [f"{r[key]:.3f}" for key in ("fg_ari", "mbo", "boundary_f", "refined_mbo")]
        cells += [f"{r['reference_fg_ari']:.3f} / {r['reference_mbo']:.3f}", f"{r['bytes_a_frame'] / 1e3:.0f}"]
        cells += [f"{r['frames_a_second']:.1f}", f"{r['training_seconds']:.0f}"]
        print(f"| {r['size']} px | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
