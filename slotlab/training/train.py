"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.errors import DataError, UsageError
from featcache.store.durable import Lines
from featcache.store.reading import FeatureStore
from featcache.stream.stream import FeatureStream, batch_formats
from slotlab.config.schema import Config
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import Draws
from slotlab.runs import checkpoint
from slotlab.runs.folder import LOG, begun_from, check_run, create_run, keep_rows, write_summary
from slotlab.training.cost import count_step
from slotlab.training.look import look, look_split
from slotlab.training.losses import total
from slotlab.training.processes import Ranks, join
from slotlab.training.step import Taken, TrainStep

Report = Callable[[dict[str, Any]], None]  # one row of metrics.jsonl


def train(
    config: Config,
    store: FeatureStore,
    run: Path,
    *,
    resume: bool = False,
    init_from: Path | None = None,
    device: torch.device | str = "cpu",
    report: Report = lambda _: None,
    remark: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train a slot model on cached features and leave a run folder.

    On the CPU, a resumed run equals an unbroken one bit for bit. Under torchrun each rank takes its share of every
    batch, and the run equals that of a single process up to rounding. ``init_from`` is a run whose parameters are the
    start; ``report`` gets each logged row, and ``remark`` lines before the first step: where the features live, and
    why; how a resumed run differs from the version that began it.

    Raises ``UsageError`` if the run exists already (or, with ``resume``, does not) or the batch cannot be shared,
    ``IncompatibleError`` if the run was made with another configuration or store, or ``init_from`` with another model,
    ``DataError`` if the loss is not finite.
    """
    config = ModelInput.of(config, store).settle(config, store[config.data.train_split])
    split = look_split(config, store)
    if config.evaluate_every:
        split.require_complete()
    with join(device) as ranks:
        if ranks.leads:
            check_run(config, store, run, resume)
        if resume:
            init_from = begun_from(run, init_from)
        _train(config, store, run, resume, init_from, ranks, report, remark)
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
    remark: Callable[[str], None],
) -> None:
    optim = config.optim
    store[config.data.train_split].require_share(ranks.rank, ranks.count)
    ranks.agree(json.dumps([store.spec.identity(), store[config.data.train_split].spec.content]), str(store.path))
    continues = resume and checkpoint.exists(run)  # a run that stopped before its first checkpoint starts again
    step = TrainStep.fresh(config, store, ranks, None if continues else init_from)
    stream = training_stream(config, store, ranks)
    if ranks.leads:
        remark(stream.home.why)
    if ranks.leads and not resume:  # only now, so that a run that cannot be trained leaves no folder
        create_run(config, store, run, init_from)
    ranks.wait()
    if continues:
        stream.load_state_dict(step.load(run, remark if ranks.leads else lambda _: None))
    spent = keep_rows(run / LOG, step.count) if ranks.leads else 0.0  # seconds
    pace = Pace(config, step, stream, spent)

    with Lines(run / LOG, synced=False) if ranks.leads else nullcontext() as log:
        for batch in stream:
            if step.count >= optim.steps:
                break
            taken = step(batch.features)
            saves = step.count % config.checkpoint_every == 0 or step.count == optim.steps
            looks = config.evaluate_every > 0 and step.count % config.evaluate_every == 0
            if not (saves or looks or step.count % config.log_every == 0 or step.count == 1):
                continue  # read nothing from the device, so that nothing waits for it

            if (first := step.first_bad()) is not None:  # all ranks see it, as gradients are averaged
                rows = stream.rows_at((first - 1) * optim.batch_size).tolist()
                raise DataError(
                    f"{run}: the loss or its gradient is not finite at step {first} (samples "
                    f"that begin at store rows {rows}); lower --set optim.learning_rate, or "
                    "check the store with slotlab verify"
                )
            row = _row(taken, step) | pace.row()
            if log is not None:
                if looks:
                    row |= look(step.best, config, store)
                log.add(json.dumps(row))
                report(row)
            pace.restart()  # do not count the time of a look

            if saves:
                if not bool(ranks.mean(step.loss(batch.features)).isfinite()):  # no loss has seen the update yet
                    raise DataError(f"{run}: step {step.count} broke the model; lower --set optim.learning_rate")
                if ranks.leads:
                    step.save(run, stream.state_dict())
    if ranks.leads:
        write_summary(run, ranks.device, ranks.count)


def training_stream(config: Config, store: FeatureStore, ranks: Ranks) -> FeatureStream:
    """The stream of this rank's share of every batch.

    ``UsageError`` if batches cannot be shared equally, ``DataError`` if the split is incomplete.
    """
    data, optim = config.data, config.optim
    if optim.batch_size % (ranks.count * optim.accumulate):
        raise UsageError(
            f"optim.batch_size {optim.batch_size} cannot be shared by {ranks.count} processes in {optim.accumulate} "
            "parts each; choose a multiple, or another optim.accumulate"
        )
    if optim.batch_size % data.shares:
        raise UsageError(f"optim.batch_size {optim.batch_size} has no {data.shares} equal shares; choose a multiple")
    return FeatureStream(
        store[data.train_split].require_share(ranks.rank, ranks.count),
        ModelInput.of(config, store).stored,
        batch_size=optim.batch_size // ranks.count,
        clip=data.clip,
        frames=frames_drawn(config),
        seed=config.seed,
        device=ranks.device,
        residence=data.residence,
        reserve=_reserve(config, store, ranks),
        rank=ranks.rank,
        world_size=ranks.count,
        shares=data.shares,
    )


def _reserve(config: Config, store: FeatureStore, ranks: Ranks) -> int:
    """Bytes of the device that a step needs beside the batches, where they decide on the features' home."""
    if config.data.residence != "auto" or ranks.device.type != "cuda":
        return 0
    inputs = ModelInput.of(config, store)
    _, batch = batch_formats(store[config.data.train_split], inputs.stored, batch_samples(config, ranks.count))
    return count_step(config, inputs, batch, on_gpu=True).peak


def batch_samples(config: Config, ranks: int = 1) -> tuple[int, int]:
    """Samples of a rank's batch, and the frames that are read of each."""
    clip = config.data.clip
    frames = clip if clip == 1 else config.model.frames_a_step or clip
    return config.optim.batch_size // ranks, frames


def frames_drawn(config: Config) -> Callable[[int], npt.NDArray[np.int64]] | None:
    """A function from the number of samples seen to the frames of a clip that the next step reads; None: all.

    They are drawn by the step, like all else in it.
    """
    count, clip = config.model.frames_a_step, config.data.clip
    if count is None or clip == 1:
        return None

    def drawn(samples_seen: int) -> npt.NDArray[np.int64]:
        draws = Draws.of_step(config.seed, samples_seen // config.optim.batch_size)
        return draws.integers(clip, count).numpy()

    return drawn


def _row(taken: Taken, step: TrainStep) -> dict[str, Any]:
    """The values of a step, read from the device: the first part of its row in the log."""
    components = {name: step.ranks.mean(value) for name, value in taken.components.items()}
    return {
        "step": step.count,
        "loss": total(components, step.config.loss).item(),
        **{name: value.item() for name, value in components.items()},
        "grad_norm": taken.norm.item(),
        "learning_rate": taken.learning_rate,
    }


class Pace:
    """Measures the pace of a run from one logged step to the next."""

    def __init__(self, config: Config, step: TrainStep, stream: FeatureStream, spent: float) -> None:
        self._batch_size, self._step, self._stream = config.optim.batch_size, step, stream
        self._began = time.perf_counter() - spent  # includes the seconds trained before this process
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._from, self._waited, self._since = self._step.count, self._stream.wait_seconds, time.perf_counter()

    def row(self) -> dict[str, float]:
        """Samples per second and share of waiting time in the interval, and the seconds of the whole run."""
        now = time.perf_counter()
        taken = now - self._since
        return {
            "samples_per_second": (self._step.count - self._from) * self._batch_size / taken,
            "wait_share": (self._stream.wait_seconds - self._waited) / taken,
            "seconds": now - self._began,
        }
