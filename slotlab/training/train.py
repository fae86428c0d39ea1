"""The training loop. It reads top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from featcache.errors import DataError, UsageError
from featcache.store.reading import FeatureStore
from featcache.stream.stream import FeatureStream
from slotlab.config.schema import Config
from slotlab.models.base import Model
from slotlab.models.build import build_model
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import Draws, Share
from slotlab.runs import checkpoint
from slotlab.runs.folder import begun_from, check_run, create_run, keep_rows, write_summary
from slotlab.training.look import look, look_split
from slotlab.training.losses import losses, total
from slotlab.training.processes import Ranks, join
from slotlab.training.schedule import learning_rate, make_schedule, plain_state, update_average

Report = Callable[[dict[str, Any]], None]  # one row of metrics.jsonl
NEVER = torch.iinfo(torch.int64).max


def train(
    config: Config,
    store: FeatureStore,
    run: Path,
    *,
    resume: bool = False,
    init_from: Path | None = None,
    device: torch.device | str = "cpu",
    report: Report = lambda _: None,
) -> Path:
    """Train a slot model on cached features and leave a run folder.

    On the CPU a resumed run gives, bit for bit, what an unbroken one would have given. Under torchrun each
    rank takes its share of every batch, and the run is the one that a single process would have made, up to
    rounding. ``init_from`` is a run whose parameters are taken to start with. Raises ``UsageError`` when the
    run exists already (or does not, with ``resume``) or the batch cannot be shared, ``IncompatibleError`` when it
    was made with another configuration or store, or ``init_from`` with another model, ``DataError`` when the loss
    is not finite.
    """
    config = ModelInput.of(config, store).settle(config)
    split = look_split(config, store)
    if config.evaluate_every:
        split.require_complete()
    with join(device) as ranks:
        if ranks.leads:
            check_run(config, store, run, resume)
        if resume:
            init_from = begun_from(run, init_from)
        _train(config, store, run, resume, init_from, ranks, report)
        ranks.wait()
    return run


def _train(
    config: Config,
    store: FeatureStore,
    run: Path,
    resume: bool,
    init_from: Path | None,
    ranks: Ranks,
    report: Report,
) -> None:
    optim, device = config.optim, ranks.device
    if optim.batch_size % (ranks.count * optim.accumulate):
        raise UsageError(
            f"optim.batch_size {optim.batch_size} cannot be shared by {ranks.count} processes in {optim.accumulate} "
            "parts each; choose a multiple, or another optim.accumulate"
        )
    torch.manual_seed(config.seed)
    model = build_model(config, store).to(device)
    continues = resume and checkpoint.exists(run)  # a run that was stopped before its first checkpoint starts again
    if init_from is not None and not continues:
        checkpoint.load_parameters(init_from, model)
    average = deepcopy(model) if optim.ema else None
    optimizer = torch.optim.Adam(
        model.parameters(), lr=learning_rate(optim), weight_decay=optim.weight_decay, fused=True
    )
    schedule = make_schedule(optimizer, optim)
    stream = FeatureStream(
        store[config.data.train_split].require_complete(),
        ModelInput.of(config, store).tap,
        batch_size=optim.batch_size // ranks.count,
        clip=config.data.clip,
        seed=config.seed,
        device=device,
        residence=config.data.residence,
        rank=ranks.rank,
        world_size=ranks.count,
    )
    if ranks.leads and not resume:  # only now: what cannot be trained leaves no folder behind
        create_run(config, store, run, init_from)
    ranks.wait()
    step = 0
    if continues:
        checkpoint.load_model(run, model, checkpoint.MODEL)
        if average is not None:
            checkpoint.load_model(run, average, checkpoint.AVERAGE)
        checkpoint.load_optimizer(run, optimizer)
        state = checkpoint.state(run)
        step = state["step"]
        schedule.load_state_dict(state["schedule"])
        stream.load_state_dict(state["stream"])
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
    if not config.loss.reconstructs:
        freeze_unreached(model, config, store)
    forward: Any = DistributedDataParallel(model) if ranks.count > 1 else model
    if optim.compile:
        forward = torch.compile(forward, mode="reduce-overhead" if optim.cuda_graphs else "default")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bfloat16")
    spent = keep_rows(run / "metrics.jsonl", step) if ranks.leads else 0.0  # seconds
    bad_since = torch.full((), NEVER, device=device)  # the first step whose loss or gradient was not finite
    began = logged_at = time.perf_counter()
    waited, logged = stream.wait_seconds, step

    with (run / "metrics.jsonl").open("a") if ranks.leads else nullcontext() as log:
        for batch in stream:
            if step >= optim.steps:
                break
            optimizer.zero_grad(set_to_none=True)
            if optim.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            components: dict[str, torch.Tensor] = {}
            for part, features in enumerate(batch.features.chunk(optim.accumulate)):
                draws = Draws.of_step(
                    config.seed,
                    step,
                    Share(ranks.rank * optim.accumulate + part, ranks.count * optim.accumulate),
                )
                last = part == optim.accumulate - 1
                with nullcontext() if last or ranks.count == 1 else forward.no_sync():
                    with autocast:
                        found = losses(forward(features, draws), config.loss)
                    (total(found, config.loss) / optim.accumulate).backward()  # type: ignore[no-untyped-call]
                for name, value in found.items():
                    components[name] = components.get(name, 0.0) + value.detach() / optim.accumulate
            norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            rate = schedule.get_last_lr()[0]
            step += 1
            # Kept on the device: reading a value waits for it, and nothing is read between two logged steps.
            finite = torch.isfinite(norm) & torch.isfinite(total(components, config.loss))
            bad_since = torch.where(finite, bad_since, bad_since.clamp(max=step))

            saves = step % config.checkpoint_every == 0 or step == optim.steps
            looks = config.evaluate_every > 0 and step % config.evaluate_every == 0
            if saves or looks or step % config.log_every == 0 or step == 1:
                components = {name: ranks.mean(value) for name, value in components.items()}
                # Nothing is saved that was not found finite. A gradient is averaged over the ranks, so all see it.
                if (first := int(bad_since)) != NEVER:
                    rows = stream.rows_at((first - 1) * optim.batch_size).tolist()
                    raise DataError(
                        f"{run}: the loss or its gradient is not finite at step {first} (samples "
                        f"that begin at store rows {rows}); lower --set optim.learning_rate, or "
                        "check the store with slotlab verify"
                    )
                now = time.perf_counter()
                row: dict[str, Any] = {"step": step, "loss": total(components, config.loss).item()}
                row |= {name: value.item() for name, value in components.items()}
                row |= {
                    "grad_norm": norm.item(),
                    "learning_rate": rate,
                    "samples_per_second": (step - logged) * optim.batch_size / (now - logged_at),
                    "wait_share": (stream.wait_seconds - waited) / (now - logged_at),
                    "seconds": spent + now - began,
                }
            else:
                row = {}

            optimizer.step()
            schedule.step()
            if average is not None:
                update_average(average, model, optim, step)
            if row and ranks.leads:
                if looks:
                    row |= look(average if average is not None else model, config, store)
                assert log is not None
                log.write(json.dumps(row) + "\n")
                log.flush()
                report(row)
            if row:
                waited, logged, logged_at = stream.wait_seconds, step, time.perf_counter()
            if saves:  # what the update made is seen by no loss yet
                with torch.no_grad(), autocast:
                    after = total(losses(model(features, draws), config.loss), config.loss)
                if not bool(ranks.mean(after).isfinite()):
                    raise DataError(f"{run}: step {step} broke the model; lower --set optim.learning_rate")
            if saves and ranks.leads:
                state = {"step": step, "schedule": plain_state(schedule), "stream": stream.state_dict()}
                checkpoint.save(run, model, average, optimizer, state)
    if ranks.leads:
        write_summary(run, device, ranks.count)


def freeze_unreached(model: Model, config: Config, store: FeatureStore) -> None:
    """Take the parameters that no loss reaches out of training, such as a decoder's last layers: DDP waits for all."""
    split = store[config.data.train_split]
    clip = next(video for video in split.videos if split.spec.lengths[video] >= config.data.clip)
    frames = ModelInput.of(config, store).read(split, clip)[: config.data.clip]
    sample = (frames if config.data.clip > 1 else frames[0]).unsqueeze(0).to(next(model.parameters()).device)
    total(losses(model(sample, Draws(0)), config.loss), config.loss).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
