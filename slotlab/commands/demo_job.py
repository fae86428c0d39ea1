"""The demo's work on the embedded sample: extract, statistics, train, evaluate, and a picture of the masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from featcache.backbones.backbone import load_backbone
from featcache.extraction.extract import Progress, extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources import open_source
from featcache.store.reading import FeatureStore
from slotlab.config.schema import Config
from slotlab.pictures.sheet import draw_sheet
from slotlab.pictures.still import Stills, pick_videos
from slotlab.runs import checkpoint
from slotlab.runs.folder import write_result
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.training.train import Report, train


@dataclass(frozen=True)
class DemoResult:
    store: FeatureStore
    run: Path
    scores: Evaluation
    sheet: Path


def extract_sample(cache: Path, device: torch.device, progress: Progress) -> FeatureStore:
    """The store of the embedded sample's DINOv2 ViT-S/14 features; extracts or resumes only if needed."""
    source = open_source(None)
    backbone = load_backbone("dinov2_vits14", device=device)
    return extract(plan(cache, source, backbone, ExtractOptions()), source, backbone, progress)


def train_and_score(config: Config, store: FeatureStore, out: Path, device: torch.device, report: Report) -> DemoResult:
    """Train a run (or resume it), evaluate it, and draw its masks."""
    run = out / f"seed{config.seed}-steps{config.optim.steps}"
    train(config, store, run, resume=(run / checkpoint.CONFIG).exists(), device=device, report=report)
    loaded = load_run(run, store.path, device)
    split = loaded.split()
    stills = Stills(pick_videos(split))
    scores = evaluate(loaded, split.name, also=[stills.add])
    write_result(run, scores.as_dict())
    sheet = draw_sheet(split, stills.result(), out / "masks.png")
    return DemoResult(store, run, scores, sheet)
