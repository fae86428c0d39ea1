"""Devices that a plan is made for: by their data sheets, or as measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featcache.backbones.inference import fast_precision
from featcache.errors import UsageError
from featcache.machine import free_memory, machine, pick_device, timed
from featcache.stream.residence import Free
from featcache.stream.staging import page_locked
from featcache.words import Residence
from slotlab.training.speed import convolution_rate, matmul_rate

GIB = 1 << 30

# The driver, torch's context and kernels, and a display take the rest of a GPU's memory: about 1.5 GB of 32, or more
# under Windows.
USABLE = 0.9

# Bytes a second of random clips from a disk that no cache holds: an NVMe drive of PCIe 4.0 reaches 5 to 7 GB/s in
# sequence, and less so. `slotlab bench stream` measures yours.
DISK = 3e9

HALF = (torch.bfloat16, torch.float16)

COPIED = 1 << 27  # bytes of the array that the memory's rate is measured on


@dataclass(frozen=True)
class Device:
    """What bounds a step: rates a second of the device at its best, and the memory that torch can have."""

    name: str
    title: str
    free: Free  # bytes; the host's are those of the machine that plans
    bandwidth: float  # bytes of its memory, read or written
    flops: Mapping[str, float]  # of dense products by their precision, as optim.precision names it
    link: float | None  # bytes from the host's memory, one way; None: it computes in that memory
    source: str  # of these figures
    cuda_name: str = ""  # torch's name of it
    convolutions: float | None = None  # FLOPs in float32; None: as of products

    @property
    def gpu(self) -> bool:
        return self.link is not None

    def rate(self, dtype: torch.dtype | None, convolution: bool, precision: str) -> float:
        """FLOPs a second of an operation whose float32 products have this ``optim.precision``."""
        if dtype in HALF:
            return self.flops["bfloat16"]
        if convolution and self.convolutions is not None:
            return self.convolutions
        return self.flops["tf32" if precision == "tf32" else "float32"]

    def arrival(self, residence: Residence) -> dict[str, float]:
        """What a batch passes on its way from where the features live, and the bytes a second of each.

        A batch of resident features is gathered within the device's memory, which is part of the step's own bytes.
        """
        link = {"host link": self.link or self.bandwidth / 2}
        return {"device": {}, "host": link, "disk": link | {"disk": DISK}}[residence]


def _gpu(
    name: str,
    title: str,
    cuda_name: str,
    gib: int,
    bandwidth: float,
    flops: tuple[float, float, float],
    pcie: int,
    source: str,
) -> Device:
    """Memory in GiB, bandwidth in GB/s, TFLOP/s of dense products in float32, tf32 and bfloat16 (half of what is
    printed for sparse matrices; summed in float32), generation of its 16 PCIe lanes."""
    rates = dict(zip(("float32", "tf32", "bfloat16"), (1e12 * rate for rate in flops), strict=True))
    link = {4: 31.5e9, 5: 63.0e9}[pcie]
    free = Free(host=0, device=round(USABLE * gib * GIB))
    return Device(name, title, free, 1e9 * bandwidth, rates, link, source, cuda_name)


# The documents themselves were not opened. Addresses and figures agree with what others cite of them, except the tf32
# rates of the GeForce cards, of which no citation was found: half of bfloat16's, as on the other cards.
# fmt: off
DEVICES: Mapping[str, Device] = {device.name: device for device in (
    _gpu(
        "rtx5090", "NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 5090", 32, 1792, (104.8, 104.8, 209.5), 5,
        "NVIDIA RTX Blackwell GPU Architecture, appendix A: "
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    ),
    _gpu(
        "rtx4090", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", 24, 1008, (82.6, 82.6, 165.2), 4,
        "NVIDIA Ada GPU Architecture, appendix A: "
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    _gpu(
        "a100-80", "NVIDIA A100 SXM 80GB", "NVIDIA A100-SXM4-80GB", 80, 2039, (19.5, 156, 312), 4,
        "NVIDIA A100 Tensor Core GPU, data sheet: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
        "a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    _gpu(
        "h100", "NVIDIA H100 SXM", "NVIDIA H100 80GB HBM3", 80, 3350, (66.9, 494.7, 989.4), 5,
        "NVIDIA H100 Tensor Core GPU Architecture: "
        "https://resources.nvidia.com/en-us-data-center-overview/gtc22-whitepaper-hopper; memory's rate: data sheet, "
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    ),
    _gpu(
        "h200", "NVIDIA H200 SXM", "NVIDIA H200", 141, 4800, (66.9, 494.7, 989.4), 5,
        "NVIDIA H200, memory and its rate: https://www.nvidia.com/en-us/data-center/h200/; products as H100 SXM",
    ),
)}
# fmt: on

HERE = ("here", "cpu")  # measured


def find_device(name: str, precision: str) -> Device:
    """A device by its name, in a machine with as much free memory as this one; ``here`` is the fastest of this machine,
    and ``cpu`` its processor, both measured in that precision. ``UsageError`` for an unknown one."""
    if name in DEVICES:
        known = DEVICES[name]
        return replace(known, free=replace(known.free, host=free_memory()))
    if name not in HERE:
        raise UsageError(f"--device {name}: not known to a plan; choose one of {', '.join((*HERE, *DEVICES))}")
    return measured(pick_device("auto" if name == "here" else name), precision)


def present(device: torch.device, *precisions: str) -> Device:
    """A device of this machine, with the memory that is free now: by its data sheet if a plan knows one of its name,
    else measured in these precisions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known in DEVICES.values():
            if known.cuda_name == name:
                return replace(known, free=Free.now(device))
    return measured(device, *precisions)


def measured(device: torch.device, *precisions: str) -> Device:
    """A device of this machine, by what it reaches of a large product, a convolution and a copy: a second or two."""
    flops = {kind: matmul_rate(device, kind)() for kind in {*precisions, "float32", *_halved(device)}}
    values = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(values)

    def copy() -> int:
        target.copy_(values)
        return 2 * values.nbytes

    timed(copy, device)
    bandwidth, link = max(timed(copy, device) for _ in range(3)), None
    if device.type == "cuda":
        held = page_locked(COPIED)
        link = _send_rate(torch.ones(COPIED, dtype=torch.uint8) if held is None else held, device)
    made = Device(device.type, machine(device), Free.now(device), bandwidth, flops, link, "measured here, now")
    return replace(made, convolutions=convolution_rate(device)())


def _halved(device: torch.device) -> tuple[str, ...]:
    """The precision, if any, that an extraction takes there beside float32; float16 is as fast as bfloat16."""
    return ("bfloat16",) if fast_precision(device) != "float32" else ()


def _send_rate(held: Tensor, device: torch.device) -> float:
    target = torch.empty_like(held, device=device)

    def send() -> int:
        target.copy_(held, non_blocking=True)
        return held.nbytes

    return max(timed(send, device) for _ in range(3))
