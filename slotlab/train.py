"""The training loop. It reads top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store import FeatureStore, flatten
from featcache.stream import FeatureStream
from slotlab import checkpoint
from slotlab.config import Config, OptimConfig
from slotlab.draws import Draws
from slotlab.losses import losses, total
from slotlab.models.registry import build_model

Report = Callable[[dict[str, Any]], None]  # one row of metrics.jsonl


def train(
    config: Config,
    store: FeatureStore,
    run: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    report: Report = lambda _: None,
) -> Path:
    """Train a slot model on cached features and leave a run folder.

    On the CPU a resumed run gives, bit for bit, what an unbroken one would have given. Raises ``UsageError``
    when the run exists already (or does not, with ``resume``), ``IncompatibleError`` when it was made with
    another configuration or store, ``DataError`` when the loss is not finite.
    """
    device = torch.device(device)
    tap = store.tap(config.data.tap)
    split = store[config.data.train_split].require_complete()
    prepare_run(config, store, run, resume)

    torch.manual_seed(config.seed)
    model = build_model(config, store).to(device)
    optim = config.optim
    optimizer = torch.optim.Adam(
        model.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=True
    )
    schedule = make_schedule(optimizer, optim)
    stream = FeatureStream(
        split,
        tap,
        batch_size=optim.batch_size,
        clip=config.data.clip,
        seed=config.seed,
        device=device,
        residence=config.data.residence,
    )
    step = 0
    if resume and checkpoint.exists(run):  # a run that was stopped before its first checkpoint starts again
        checkpoint.load_model(run, model)
        checkpoint.load_optimizer(run, optimizer)
        state = checkpoint.state(run)
        step = state["step"]
        schedule.load_state_dict(state["schedule"])
        stream.load_state_dict(state["stream"])
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
    keep_rows(run / "metrics.jsonl", step)
    forward: Callable[..., Any] = torch.compile(model) if optim.compile else model
    began, waited, logged = time.perf_counter(), stream.wait_seconds, step

    with (run / "metrics.jsonl").open("a") as log:
        for batch in stream:
            if step >= optim.steps:
                break
            with torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
                components = losses(forward(batch.features, Draws.of_step(config.seed, step)), config.loss)
                loss = total(components, config.loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            rate = schedule.get_last_lr()[0]
            step += 1

            saves = step % config.checkpoint_every == 0 or step == optim.steps
            if saves or step % config.log_every == 0 or step == 1:
                # Reading a value waits for the device, so nothing is read between two logged steps; and nothing
                # is saved that was not read and found finite.
                row: dict[str, Any] = {"step": step, "loss": loss.item()}
                row |= {name: value.item() for name, value in components.items()}
                if not math.isfinite(row["loss"]) or not math.isfinite(norm.item()):
                    raise DataError(
                        f"{run}: loss {row['loss']} at step {step} (samples {batch.samples_seen} to "
                        f"{batch.samples_seen + len(batch.rows)}, store rows {batch.rows.min()}-{batch.rows.max()}); "
                        "lower --set optim.learning_rate, or check the store with slotlab verify"
                    )
                now = time.perf_counter()
                row |= {"grad_norm": norm.item(), "learning_rate": rate}
                row |= {
                    "samples_per_second": (step - logged) * optim.batch_size / (now - began),
                    "wait_share": (stream.wait_seconds - waited) / (now - began),
                }
                began, waited, logged = now, stream.wait_seconds, step
                log.write(json.dumps(row) + "\n")
                log.flush()
                report(row)

            optimizer.step()
            schedule.step()
            if saves:
                state = {"step": step, "schedule": _plain(schedule), "stream": stream.state_dict()}
                checkpoint.save(run, model, optimizer, state)
    return run


def make_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig) -> LRScheduler:
    """Linear warm-up, then a cosine down to the final learning rate."""
    warmup = min(optim.warmup_steps, optim.steps - 1)
    cosine = CosineAnnealingLR(optimizer, max(1, optim.steps - warmup), optim.final_learning_rate)
    if not warmup:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])


def prepare_run(config: Config, store: FeatureStore, run: Path, resume: bool) -> None:
    """Create the run folder, or check that the one to resume is of this configuration and store."""
    trained_on = {"path": str(store.path), "identity": store.spec.identity()}
    if not resume:
        if (run / "config.toml").exists():
            raise UsageError(f"{run}: exists already; add --resume to continue it, or choose another --out")
        run.mkdir(parents=True, exist_ok=True)
        (run / "store.json").write_text(json.dumps(trained_on, indent=1))
        (run / "config.toml").write_text(config.to_toml())
        return
    if not (run / "config.toml").exists():
        raise UsageError(f"{run}: nothing to resume; leave out --resume")
    before, now = (flatten(c.model_dump()) for c in (checkpoint.load_run_config(run), config))
    changed = [f"{key}: {before[key]} then, {now[key]} now" for key in now if before[key] != now[key]]
    if changed:
        raise IncompatibleError(f"{run}: was made with another configuration ({'; '.join(changed)})")
    check_store(run, store)


def check_store(run: Path, store: FeatureStore) -> None:
    """``IncompatibleError`` unless the store holds the same kind of features that the run was trained on."""
    then = json.loads((run / "store.json").read_text())["identity"]
    now = json.loads(json.dumps(store.spec.identity()))
    ignored = ("dtype", "precision", "frame_stride", "taps.")  # how, and what else, is stored; not what it means
    changed = [
        f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and not key.startswith(ignored)
    ]
    if changed:
        raise IncompatibleError(f"{store.path}: not the features that {run} was trained on ({'; '.join(changed)})")


def keep_rows(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a run resumes from."""
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def _plain(schedule: LRScheduler) -> dict[str, Any]:
    """State of the schedule as JSON can hold it."""
    state = dict(schedule.state_dict())
    if "_schedulers" in state:
        state["_schedulers"] = [dict(inner) for inner in state["_schedulers"]]
    return dict(json.loads(json.dumps(state, default=lambda value: None)))
