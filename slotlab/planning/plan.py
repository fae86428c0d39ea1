"""A plan: what a data set and a configuration need on a device, and how long they take, counted before they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from featcache.backbones.backbone import Backbone
from featcache.errors import UsageError
from featcache.machine import readable
from featcache.stream.residence import SPARE, Home, choose_home, ring_bytes
from featcache.stream.stream import VIDEO
from featcache.words import Dtype
from slotlab.config.schema import Config
from slotlab.models.inputs import ModelInput
from slotlab.planning.bound import UTILISATION, Bound
from slotlab.planning.data import DataSet
from slotlab.planning.devices import DISK, Device
from slotlab.planning.extraction import ExtractionPlan, plan_extraction
from slotlab.training.cost import Cost, count_step
from slotlab.training.train import batch_samples

UNIT = 8  # largest batches are multiples of it


@dataclass(frozen=True)
class TrainingPlan:
    """Training on one stored form."""

    dtype: Dtype
    token_bytes: int  # on disk, of all splits and taps
    stream_bytes: int  # of them (or of the frames) those that are trained on, which live somewhere
    home: Home
    batch_size: int
    frames: int  # of a sample
    cost: Cost  # of a step
    ring: int  # bytes of the batches that are read ahead
    largest_batch: int | None  # that fits with the features where they live; 0: none; None: not looked for
    bound: Bound
    data: float  # seconds in which a batch's bytes arrive, at best
    data_by: str
    samples: int  # of an epoch
    steps: int

    @property
    def seconds(self) -> float:
        """Of a step, as expected: reading and computing overlap."""
        return max(self.bound.expected, self.data)

    @property
    def bound_by(self) -> str:
        return self.data_by if self.data > self.bound.expected else self.bound.by

    @property
    def frames_per_s(self) -> float:
        return self.batch_size * self.frames / self.seconds

    @property
    def hours(self) -> float:
        """Of all steps."""
        return self.steps * self.seconds / 3600

    @property
    def epoch_seconds(self) -> float:
        return self.samples / self.batch_size * self.seconds

    def as_dict(self) -> dict[str, Any]:
        found = {key: value for key, value in asdict(self).items() if key != "cost"}
        counted = ("flops", "bytes", "operations", "peak", "state", "parameters")
        derived = ("seconds", "bound_by", "frames_per_s", "hours", "epoch_seconds")
        step = {f"step_{key}": getattr(self.cost, key) for key in counted}
        return found | step | {key: getattr(self, key) for key in derived}


@dataclass(frozen=True)
class Plan:
    """What a data set and a configuration need on a device."""

    device: Device
    data: DataSet
    precision: str
    frame_bytes: int  # of frames and masks on disk, at most
    training: Sequence[TrainingPlan]
    extraction: ExtractionPlan | None

    @property
    def answer(self) -> str:
        """Does it fit, and with which batch: one line."""
        parts = []
        for form in self.training:
            what = f"as {form.dtype} its features ({readable(form.stream_bytes)})"
            where = {"device": "fit on the device", "host": "live on the host", "disk": "stay on the disk"}
            batches = f"batches of up to {form.largest_batch} fit" if form.largest_batch else "no batch fits"
            parts.append(f"{what} {where[form.home.residence]}, and {batches}")
        return f"{self.data.name} on {self.device.title}: {'; '.join(parts)}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": asdict(self.device),
            "data": self.data.name,
            "splits": {name: len(split.lengths) for name, split in self.data.held().items()},
            "frames": self.data.frames,
            "precision": self.precision,
            "utilisation": UTILISATION,
            "spare_bytes": SPARE,
            "disk_bytes_per_s": DISK,
            "frame_bytes_at_most": self.frame_bytes,
            "training": [form.as_dict() for form in self.training],
            "extraction": None if self.extraction is None else self.extraction.as_dict(),
            "answer": self.answer,
        }


def make_plan(
    config: Config,
    data: DataSet,
    device: Device,
    forms: Sequence[Dtype],
    backbone: Backbone | None = None,
    *,
    largest: bool = True,
) -> Plan:
    """Plan a training on some stored forms of the data, and, given a backbone, the extraction.

    Without ``largest``, the largest batch that fits is not looked for, which takes three times as long as the rest.

    ``UsageError`` for a split, a batch size or other settings that the data set or the model do not allow.
    """
    if config.data.train_split not in data.splits:
        raise UsageError(f"{data.name}: no split {config.data.train_split!r}; it has: {', '.join(data.splits)}")
    size, parts, ranks = config.optim.batch_size, config.optim.accumulate, data.ranks(config.data.train_split)
    if size % (parts * ranks):
        raise UsageError(f"optim.batch_size {size} has no {parts * ranks} equal parts ({ranks} ranks, {parts} of each)")
    return Plan(
        device,
        data,
        config.optim.precision,
        data.frame_bytes(),
        [_training(config, data.stored_as(dtype), device, largest) for dtype in forms],
        None if backbone is None else plan_extraction(backbone, data.frames, device),
    )


def _training(config: Config, data: DataSet, device: Device, largest: bool) -> TrainingPlan:
    split = config.data.train_split
    inputs = ModelInput.of(config, data.opened)
    config = inputs.fitted(config)
    size = data.stream_bytes(split, inputs.stored)
    sampled, frames = batch_samples(config, data.ranks(split))
    costs: dict[int, Cost] = {}

    def cost(batch: int) -> Cost:
        if batch not in costs:
            stored, decoded = data.formats(split, inputs.stored, (batch, frames))
            costs[batch] = count_step(config, inputs, decoded or stored[0], on_gpu=device.gpu)
        return costs[batch]

    def ring(batch: int) -> int:
        return ring_bytes(*data.formats(split, inputs.stored, (batch, frames)))

    def needs(batch: int) -> int:
        return cost(batch).peak + ring(batch)

    home = choose_home(size, needs(sampled), device.free, mapped=inputs.stored != VIDEO)
    memory = device.free.host if device.free.device is None else device.free.device
    room = memory - SPARE - (size if home.residence == "device" else 0)
    unit = math.lcm(UNIT, config.optim.accumulate)
    batch_bytes = sum(array.bytes for array in data.formats(split, inputs.stored, (sampled, frames))[0])
    arrives = {name: batch_bytes / rate for name, rate in device.arrival(home.residence).items()}
    data_by, seconds = max(arrives.items(), key=lambda item: item[1], default=("host link", 0.0))
    return TrainingPlan(
        dtype=data.spec.dtype,
        token_bytes=data.token_bytes(),
        stream_bytes=size,
        home=home,
        batch_size=sampled,
        frames=frames,
        cost=cost(sampled),
        ring=ring(sampled),
        largest_batch=largest_batch(needs, sampled, room, unit) if largest else None,
        bound=Bound.of(cost(sampled), device, config.optim.precision),
        data=seconds,
        data_by=data_by,
        samples=data.samples(split, config.data.clip),
        steps=config.optim.steps,
    )


def largest_batch(needs: Callable[[int], int], known: int, room: int, unit: int) -> int:
    """The largest multiple of ``unit`` whose needs fit into the room; they grow nearly in proportion. 0: not one."""
    base = -(-known // unit) * unit
    rise = max(1, needs(2 * base) - needs(base))  # for as many samples again
    guess = (base + (room - needs(base)) * base // rise) // unit * unit
    while guess >= unit and (over := needs(guess) - room) > 0:
        guess -= unit * math.ceil(over * base / (rise * unit))
    return max(0, guess)
