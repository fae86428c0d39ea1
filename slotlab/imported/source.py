"""How a source names its tensors, and the translation of a checkpoint into a model of ours by its table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featcache.errors import IncompatibleError
from slotlab.config.schema import Config
from slotlab.imported.published import Published
from slotlab.models.base import Model

Change = Callable[[Tensor], Tensor]
BLOCK = "{i}"  # in a name: the number of a block


@dataclass(frozen=True)
class Rule:
    """One row of a table: a tensor, or all tensors of a layer, by its name there and by its names here.

    A layer of theirs that is several of ours is cut along its rows, in the order of ``ours``; without any it is left
    out, for it is computed here.
    """

    theirs: str
    ours: tuple[str, ...]
    change: Change | None = None  # of the values, before they are cut


@dataclass(frozen=True)
class Derived:
    """What a checkpoint says of a configuration by its shapes."""

    preset: str  # for what the shapes do not tell, above all how to train on
    values: Mapping[str, Any]  # dotted key -> value
    assumed: tuple[str, ...]  # keys of ``values`` that are as in the source's configurations: no shape tells them
    needed: Mapping[str, str]  # keys that the user must set, and what the source's configurations have
    dim: int  # of a patch token
    patches: int
    absent: tuple[str, ...] = ()  # our layers that the model was trained without; they are set to zero


@dataclass(frozen=True)
class Source:
    """A public source of models: its table of names, and what its checkpoints say."""

    name: str
    repository: str  # and the commit that the table is made from
    derive: Callable[[Published], Derived]
    rules: Callable[[Config], Sequence[Rule]]
    backbone: str  # what the names of its ViT's parameters begin with
    others: tuple[str, ...] = ()  # and those of other tensors that the model does not need
    spelling: Callable[[str], str] = str  # of a name, where the source has several for one


@torch.no_grad()
def translate(source: Source, published: Published, derived: Derived, config: Config, model: Model) -> None:
    """Fill ``model`` with the published tensors. ``IncompatibleError`` names one that is missing, unknown or unfit."""
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("normaliser.")}
    absent = {name for name in ours if name.startswith(derived.absent)}
    rules, filled = source.rules(config), set()
    for name, tensor in published.tensors.items():
        if name.startswith((source.backbone, *source.others)):
            continue
        rule, targets = targets_of(rules, name)
        if rule is None:
            raise IncompatibleError(
                f"{published.path}: {published.names[name]}: no tensor of {source.name}'s models, or of a part of them "
                "that cannot be imported; is it of another source (--from)?"
            )
        if not rule.ours:
            continue
        wanted = [target for target in targets if target in ours and target not in absent]
        value = tensor if rule.change is None else rule.change(tensor)
        for target, part in zip(wanted, _cut(value, [ours[t] for t in wanted], name, published), strict=True):
            ours[target].copy_(part)
            filled.add(target)
    for name in absent:
        ours[name].zero_()
    if missing := [name for name in ours if name not in filled and name not in absent]:
        theirs = next(_sources(rules, missing[0]), missing[0])
        raise IncompatibleError(
            f"{published.path}: has no {theirs}; it is not whole, or of another model than --set says"
        )


def mlp_rules(theirs: str, layers: int) -> Iterator[Rule]:
    """An MLP broadcast decoder with that many hidden layers, whose last layer gives a token and a mask logit."""
    yield Rule(f"{theirs}.0", ("decode.first",))
    for layer in range(1, layers):
        yield Rule(f"{theirs}.{2 * layer}", (f"decode.hidden.{2 * layer - 1}",))
    yield Rule(f"{theirs}.{2 * layers}", ("decode.heads.tokens", "decode.heads.similarity", "decode.mask"))


def _cut(value: Tensor, targets: Iterable[Tensor], name: str, published: Published) -> tuple[Tensor, ...]:
    """The rows of a tensor of theirs for each of ours."""
    shapes = [target.shape for target in targets]
    if len(shapes) == 1 and value.numel() == shapes[0].numel() and _trim(value.shape) == _trim(shapes[0]):
        return (value.reshape(shapes[0]),)  # they keep dimensions of one for broadcasting
    rows = [shape[0] if shape else 0 for shape in shapes]
    if not shapes or value.ndim == 0 or sum(rows) != len(value) or any(s[1:] != value.shape[1:] for s in shapes):
        expected = " + ".join(str(tuple(shape)) for shape in shapes) or "nothing"
        raise IncompatibleError(
            f"{published.path}: {published.names[name]} has shape {tuple(value.shape)}, and {expected} would fit; "
            "name what the shapes do not tell with --set"
        )
    return torch.split(value, rows)


def _trim(shape: torch.Size) -> tuple[int, ...]:
    """A shape without leading ones."""
    sides = list(shape)
    while sides and sides[0] == 1:
        sides.pop(0)
    return tuple(sides)


def targets_of(rules: Iterable[Rule], name: str) -> tuple[Rule | None, list[str]]:
    """The rule for a tensor of theirs, and its names here."""
    for rule in rules:
        if found := _pattern(rule.theirs).fullmatch(name):
            return rule, [ours.replace(BLOCK, found["i"] or "") + found["rest"] for ours in rule.ours]
    return None, []


def _sources(rules: Iterable[Rule], name: str) -> Iterator[str]:
    """The names there of a tensor of ours."""
    for rule in rules:
        for ours in rule.ours:
            if found := _pattern(ours).fullmatch(name):
                yield rule.theirs.replace(BLOCK, found["i"] or "") + found["rest"]


def _pattern(name: str) -> re.Pattern[str]:
    """Matches a tensor, and those of a layer: ``i`` is the number of its block, ``rest`` what follows the layer."""
    block = r"(?P<i>\d+)" if BLOCK in name else r"(?P<i>)"
    before, _, after = name.partition(BLOCK)
    return re.compile(re.escape(before) + block + re.escape(after) + r"(?P<rest>(\.\w+)?)")
