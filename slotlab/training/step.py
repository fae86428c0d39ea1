"""One step of training, for the loop, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featcache.machine import exact_convolutions, limited_executor
from featcache.store.reading import FeatureStore
from slotlab.config.schema import Config, LossConfig
from slotlab.models.base import Model
from slotlab.models.build import build_model
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import DrawnAhead, Draws, Request, Share
from slotlab.runs import checkpoint
from slotlab.runs.folder import check_store
from slotlab.training.losses import losses, total
from slotlab.training.processes import Ranks, before_compiling
from slotlab.training.schedule import learning_rate, make_schedule, plain_state, update_average

NEVER = torch.iinfo(torch.int64).max

# Where a thread draws what the next step needs while this one is computed. On a CPU the cores are the trainer's.
DRAWN_BESIDE = ("cuda",)


@dataclass(frozen=True)
class Taken:
    """The values of one step: scalars on the device, for this rank's share of the batch."""

    components: dict[str, Tensor]  # the losses, without their weights
    norm: Tensor  # of the gradient, before clipping
    learning_rate: float


class Objective(nn.Module):
    """A model and its losses: what is differentiated, what ranks exchange gradients of, and what is compiled as one."""

    def __init__(self, model: Model, config: LossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, features: Tensor, draws: Draws) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of stored features (B, ...), without their weights, and their weighted sum, all scalars."""
        found = losses(self.model(features, draws), self.config)
        return found, total(found, self.config)


class TrainStep:
    """The step, and all that it changes: weights, their average, optimiser, schedule, the number of steps taken.

    Nothing in it waits for the device: it notes there whether losses and gradients were finite, and :meth:`first_bad`
    reads that. Random draws depend on the step's number, so that a resumed run draws the same as an unbroken one.

    Args:
        config: configuration of the run.
        model: the model to train in place, on the device of ``ranks``.
        ranks: the processes. Each takes the step on its share of the batch, and gets the gradient of the whole batch.
    """

    def __init__(self, config: Config, model: Model, ranks: Ranks) -> None:
        optim = config.optim
        self.config, self.model, self.ranks = config, model, ranks
        self.count = 0  # steps taken
        self.average = deepcopy(model) if optim.ema else None
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=learning_rate(optim), weight_decay=optim.weight_decay, fused=True
        )
        self.schedule = make_schedule(self.optimizer, optim)
        self.source: type[Draws] = Draws  # of what a step draws
        self.as_written = Objective(model, config.loss)
        self.forward: Any = self.as_written
        if ranks.count > 1:  # buffers are measured on the store: all ranks have the same
            self.forward = DistributedDataParallel(self.as_written, broadcast_buffers=False)
        if optim.compile:
            model.before_compiling()
            if ranks.count > 1:
                before_compiling()
            self.forward = torch.compile(self.forward, mode="reduce-overhead" if optim.cuda_graphs else "default")
        self._requests: list[Request] | None = None  # draws of a forward pass, once they are known
        self._drawing = limited_executor("slotlab-draws") if ranks.device.type in DRAWN_BESIDE else None
        self._drawn: dict[tuple[int, int], Future[Draws]] = {}  # by step and part
        self._share = torch.full((), 1 / optim.accumulate, device=ranks.device)  # of a part in the gradient
        self._bad_since = torch.full((), NEVER, device=ranks.device)

    @classmethod
    def fresh(cls, config: Config, store: FeatureStore, ranks: Ranks, init_from: Path | None = None) -> TrainStep:
        """The step of a new model, drawn by the seed, or with the parameters of the run ``init_from``.

        The directions that parameters are in go with them. ``IncompatibleError`` if that run has another model.
        """
        torch.manual_seed(config.seed)
        begun = None if init_from is None else checkpoint.directions(init_from, config.data)
        if init_from is not None and begun is not None:
            # Directions of other features would fit as well, and mean nothing.
            check_store(init_from, store, any_grid=True)
        model = build_model(config, store, begun).to(ranks.device)
        if init_from is not None:
            checkpoint.load_parameters(init_from, model)
        if not config.loss.reconstructs:
            freeze_unreached(model, config, _sample(config, store).to(ranks.device), Draws(0))
        return cls(config, model, ranks)

    @property
    def best(self) -> Model:
        """The weights to evaluate: averaged ones, if there are any."""
        return self.model if self.average is None else self.average

    def __call__(self, features: Tensor) -> Taken:
        """Train on this rank's share of a batch, stored features (B, ...). Returns before the device has finished."""
        optim = self.config.optim
        components, whole = self.gradients(features)
        # Named, as torch takes the slow way for tensors of other classes, such as fake ones.
        foreach = self.ranks.device.type != "mps" or None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip_norm, foreach=foreach)
        taken = Taken(components, norm, float(self.schedule.get_last_lr()[0]))
        self.count += 1
        finite = (norm + whole).abs() < torch.inf  # nor NaN
        self._bad_since = torch.where(finite, self._bad_since, self._bad_since.clamp(max=self.count))
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            update_average(self.average, self.model, optim, self.count)
        grown = self.model.grow(self.count, optim.steps, Draws.of_step(self.config.seed, -self.count), self.ranks.mean)
        if grown and self.average is not None:
            self.average.load_state_dict(self.model.state_dict())  # it starts anew
        return taken

    def gradients(self, features: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of a batch and their weighted sum, computed in parts. Sets the parameters' gradients to that of
        the sum."""
        optim = self.config.optim
        if len(features) % optim.accumulate:  # parts of different sizes would count equally
            raise ValueError(f"a batch of {len(features)} has no {optim.accumulate} equal parts")
        self.optimizer.zero_grad(set_to_none=True)
        if optim.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        parts: list[dict[str, Tensor]] = []
        wholes: list[Tensor] = []
        if optim.compile and self.forward is not self.as_written and self._requests is None:
            self._requests = self._rehearse(features)
        for part, some in enumerate(features.chunk(optim.accumulate)):
            last = part == optim.accumulate - 1  # ranks exchange gradients once, with the last part
            apart = nullcontext() if last or self.ranks.count == 1 else self.forward.no_sync()
            draws = self._draws(part)
            with apart, matrix_products(optim.precision):
                with self._autocast():
                    found, whole = self.forward(some, draws)
                whole.backward(self._share)
            if optim.cuda_graphs:  # the next step's graph writes to the same memory
                found = {name: value.clone() for name, value in found.items()}
            parts.append({name: value.detach() for name, value in found.items()})
            wholes.append(whole.detach())
        if self._drawing is not None:
            if self._requests is None:
                self._requests = draws.requests
            following = [(self.count + 1, part) for part in range(optim.accumulate)]
            self._drawn = {which: self._drawing.submit(self._draw, *which) for which in following}
        return {name: _mean([part[name] for part in parts]) for name in parts[0]}, _mean(wholes)

    @torch.no_grad()
    def loss(self, features: Tensor) -> Tensor:
        """The weighted sum of the losses, a scalar, for the first part of a batch with the present weights."""
        some = features.chunk(self.config.optim.accumulate)[0]
        with matrix_products(self.config.optim.precision), self._autocast():
            whole: Tensor = self.as_written(some, self._draws(0))[1]
            return whole

    @torch.no_grad()
    def _rehearse(self, features: Tensor) -> list[Request]:
        """The draws of a pass, found by one that is not compiled; they depend only on shapes."""
        draws = Draws(0)
        with self._autocast():
            self.as_written(features.chunk(self.config.optim.accumulate)[0], draws)
        return draws.requests

    def first_bad(self) -> int | None:
        """The first step whose loss or gradient was not finite, counted from 1. Waits for the device."""
        first = int(self._bad_since)
        return None if first == NEVER else first

    def _autocast(self) -> torch.autocast:
        bfloat16 = self.config.optim.precision == "bfloat16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=bfloat16)

    def _draws(self, part: int) -> Draws:
        """What a part of this step draws, each value given once."""
        ahead = self._drawn.pop((self.count, part), None)
        return self._draw(self.count, part) if ahead is None else ahead.result()

    def _draw(self, step: int, part: int) -> Draws:
        parts = self.config.optim.accumulate
        share = Share(self.ranks.rank * parts + part, self.ranks.count * parts)
        draws = self.source.of_step(self.config.seed, step, share)
        return draws if self._requests is None else DrawnAhead(draws, self._requests)

    # -- checkpoints -----------------------------------------------------------------------------------

    def save(self, run: Path, stream: dict[str, int]) -> None:
        """Write a checkpoint of all that a step changes, and of the stream's state, to the run folder."""
        state = {"step": self.count, "schedule": plain_state(self.schedule), "stream": stream}
        checkpoint.save(run, self.model, self.average, self.optimizer, state)

    def load(self, run: Path, remark: Callable[[str], None] = lambda _: None) -> dict[str, int]:
        """Load the run's checkpoint, and return the state of its stream.

        ``remark`` gets a line for each difference from the version that made the run.
        """
        for differs in checkpoint.load_model(run, self.model, checkpoint.MODEL):
            remark(f"{run}: {differs}")
        if self.average is not None:
            checkpoint.load_model(run, self.average, checkpoint.AVERAGE)
        checkpoint.load_optimizer(run, self.optimizer)
        state = checkpoint.state(run)
        self.count = state["step"]
        self.schedule.load_state_dict(state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        stream: dict[str, int] = state["stream"]
        return stream


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Computes float32 products and convolutions as ``optim.precision`` says, backward passes included: a context.

    ``tf32`` is TensorFloat-32: NVIDIA GPUs since Ampere multiply it several times faster, with ten bits of mantissa.
    Other processors, and code outside the context, use float32.
    """
    if precision != "tf32":
        with exact_convolutions():
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def freeze_unreached(model: Model, config: Config, features: Tensor, draws: Draws) -> None:
    """Freeze parameters that no loss reaches, such as a decoder's last layers: DDP waits for every gradient.

    features (B, ...): any batch.
    """
    Objective(model, config.loss)(features, draws)[1].backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _mean(values: list[Tensor]) -> Tensor:
    """Of scalars; a single one is not copied."""
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def _sample(config: Config, store: FeatureStore) -> Tensor:
    """A batch of one sample, (1, ...) as stored."""
    split = store[config.data.train_split]
    clip = next(video for video in split.videos if split.spec.lengths[video] >= config.data.clip)
    frames = ModelInput.of(config, store).read(split, clip)[: config.data.clip]
    return (frames if config.data.clip > 1 else frames[0]).unsqueeze(0)
