"""What a backbone's passes over a data set cost a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from featcache.backbones.backbone import Backbone
from featcache.backbones.inference import CPU_BATCH, GPU_BATCH, autocast, fast_precision
from featcache.words import Precision
from slotlab.planning.bound import Bound
from slotlab.planning.devices import Device
from slotlab.training.cost import Cost, Tally

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ExtractionPlan:
    """All frames of a data set through a backbone; reading and decoding the videos is left out."""

    backbone: str
    precision: Precision
    frames: int
    batch_size: int  # frames
    cost: Cost  # of a batch
    bound: Bound

    @property
    def frames_per_s(self) -> float:
        return self.batch_size / self.bound.expected

    @property
    def hours(self) -> float:
        return self.frames / self.frames_per_s / 3600

    def as_dict(self) -> dict[str, Any]:
        found = {key: value for key, value in asdict(self).items() if key != "cost"}
        counted = {f"batch_{key}": getattr(self.cost, key) for key in ("flops", "bytes", "operations", "peak")}
        return found | counted | {"frames_per_s": self.frames_per_s, "hours": self.hours}


def plan_extraction(backbone: Backbone, frames: int, device: Device) -> ExtractionPlan:
    """Of that many frames by an :func:`featcache.backbones.backbone.outline`."""
    precision: Precision = "float16" if device.gpu else fast_precision(CPU)
    batch = GPU_BATCH if device.gpu else CPU_BATCH
    cost = count_pass(backbone, batch, precision)
    return ExtractionPlan(backbone.spec.name, precision, frames, batch, cost, Bound.of(cost, device, "float32"))


def count_pass(backbone: Backbone, frames: int, precision: Precision) -> Cost:
    """The forward pass of a backbone's outline on a batch of frames, brought to its input before."""
    tally = Tally()
    with FakeTensorMode(allow_non_fake_inputs=True), tally, torch.no_grad(), backbone.emptied(CPU):
        state = tally.live
        images = torch.empty(frames, 3, *backbone.input_size)
        tally.restart()
        with autocast(CPU, precision):
            backbone(images)
        return tally.cost(tally.peak - images.nbytes, state)
