"""Our presets beside the models of their public sources, with the same weights, noise and input: what differs.

Run by ``python -m benchmarks.source CHECKOUT --parity``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.names import NAMES, Names, parts
from benchmarks.sources import Pass, Source
from featcache.errors import DataError
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.models.build import empty_model
from slotlab.models.decoders import TransformerDecoder
from slotlab.models.inputs import Features
from slotlab.models.randomness import Draws, Request
from slotlab.models.slot_model import SlotModel
from slotlab.training.losses import losses, total

GRADIENT = "gradient of "
INVARIANT = 1e-6  # gradients below this share of the largest are rounding: the loss does not depend on the parameter


class SameDraws(Draws):
    """What the source draws from torch's global generator; and a scan of the patches by its number."""

    def __init__(self, scan: int) -> None:
        super().__init__(0)
        self.scan = scan

    def drawn(self, request: Request) -> Tensor:
        if request.kind == "integers":
            return torch.tensor([self.scan], device=request.device)
        return torch.randn(request.size).to(request.device)


def parity(source: Source, preset: str, shape: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """What differs in float32 and in float64; and the source from itself in float32, its input changed by rounding.

    Args:
        shape: samples, patches a side, and channels.
    """
    config = load_config(preset, None, ["data.normalize=none", *source.presets[preset]])
    single = compared(source, config, shape, device, itself=False)
    with in_float64():
        double = compared(source, config, shape, device, itself=False)
    itself = compared(source, config, shape, device, itself=True)
    return {"float32": single, "float64": double, "the source from itself": itself}


@contextmanager
def in_float64() -> Iterator[None]:
    """Within the context everything is float64, also what our models compute in float32 by themselves."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def compared(
    source: Source, config: Config, shape: tuple[int, int, int], device: torch.device, *, itself: bool
) -> dict[str, Any]:
    """The largest difference of each part of a training pass, and of each gradient, relative to the largest value."""
    batch, side, dim = shape
    clip = [config.data.clip] if config.data.clip > 1 else []
    generator = torch.Generator().manual_seed(1)
    features = torch.randn((batch, *clip, side**2, dim), generator=generator).to(device)
    torch.manual_seed(0)
    theirs, step = source.build(config, features)
    found: dict[str, float] = {}
    ours = empty_model(config, Features("", (side, side), dim)).to(device)
    for scan in scans(ours, theirs):
        if hasattr(theirs, "perm_ind"):
            theirs.perm_ind = [scan]  # SPOT chooses among these
        expected = of_source(theirs, step)
        if itself:
            as_it_was = features.clone()
            features *= (
                1 + torch.finfo(features.dtype).eps * torch.randn(features.shape, generator=generator).to(device).sign()
            )
            differences = between(of_source(theirs, step), expected)
            features.copy_(as_it_was)
        else:
            differences = between(of_ours(config, ours, theirs, features, NAMES[source.mark], scan), expected)
        found |= {name: max(value, found.get(name, 0.0)) for name, value in differences.items()}
    gradients = {name: value for name, value in found.items() if name.startswith(GRADIENT)}
    worst = max(gradients, key=lambda name: gradients[name])
    rows = {name: float(f"{value:.1e}") for name, value in found.items() if name not in gradients}
    return rows | {"gradients": len(gradients), worst: float(f"{gradients[worst]:.1e}")}


def scans(ours: nn.Module, theirs: nn.Module) -> Iterator[int]:
    """The scans of the patches by which a decoder is trained, ours put into the source's order; the only one, if so."""
    decoder = ours.decode if isinstance(ours, SlotModel) else None
    if not isinstance(decoder, TransformerDecoder) or len(decoder.orders) == 1:
        return iter([0])
    permutations: list[Tensor] = theirs.permutations  # type: ignore[assignment]
    if sorted(map(tuple, decoder.orders.tolist())) != sorted(map(tuple, torch.stack(permutations).tolist())):
        raise DataError("the scans of the patches differ")
    decoder.orders = torch.stack(permutations)
    return iter(range(len(permutations)))


def of_source(theirs: nn.Module, step: Callable[[], Pass]) -> dict[str, Tensor]:
    """What a training pass of the source gives: its parts, its loss, and by name the gradients."""
    theirs.zero_grad(set_to_none=True)
    random.seed(0)
    torch.manual_seed(0)
    taken = step()
    taken.loss.backward()  # type: ignore[no-untyped-call]
    gradients = {GRADIENT + name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return {**taken.parts, "loss": taken.loss, **gradients}


def of_ours(
    config: Config, ours: nn.Module, theirs: nn.Module, features: Tensor, names: Names, scan: int
) -> dict[str, Tensor]:
    """The same of ours with the source's weights, gradients under the source's names."""
    weights, here = dict(theirs.named_parameters()), dict(ours.named_parameters())
    with torch.no_grad():
        for name, rows in parts(names, config, weights, ours):
            here[name].copy_(rows.reshape(here[name].shape))
    ours.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = ours(features, SameDraws(scan))
    loss = total(losses(output, config.loss), config.loss)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    met = set()
    for name, rows in parts(names, config, gradients, ours):
        met.add(name)
        if (gradient := here[name].grad) is not None:
            rows.copy_(gradient.reshape(rows.shape))
    if missed := [name for name, parameter in here.items() if parameter.grad is not None and name not in met]:
        raise DataError(f"{missed[0]} has a gradient and nothing in the source that it is compared with")
    found = {"slots": output.slots, "attention": output.attention, "masks": output.masks, "loss": loss}
    found["reconstruction"] = output.reconstruction if output.similarity is None else output.similarity
    return found | {GRADIENT + name: gradient for name, gradient in gradients.items()}


def between(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over the largest value. ``DataError`` for a gradient that is not in ``found``."""
    largest = {name: float(value.detach().abs().max()) for name, value in expected.items()}
    floor = INVARIANT * max(value for name, value in largest.items() if name.startswith(GRADIENT))
    differences = {}
    for name, value in expected.items():
        difference = float((found[name].detach().reshape(value.shape) - value.detach()).abs().max())
        if math.isnan(difference):
            raise DataError(f"the source has a {name}, and ours has none")
        if not name.startswith(GRADIENT) or max(largest[name], difference) > floor:
            differences[name] = difference / largest[name]
    return differences
