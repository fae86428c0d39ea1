"""Whether a store is what a protocol asks for, and if not, the extraction that would be."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from featcache.backbones.origin import Origin
from featcache.backbones.registry import input_size
from featcache.errors import FeatcacheError, IncompatibleError
from featcache.extraction.command import extract_command
from featcache.extraction.fit import fit_of
from featcache.sources import SAMPLE, layout_of, open_source, place_of
from featcache.sources.images import size_text
from featcache.sources.video import Size
from featcache.store.reading import Split
from slotlab.protocols.detections import require_evaluator
from slotlab.protocols.protocol import ANY, Protocol, Terms
from slotlab.protocols.published import Asked
from slotlab.protocols.scores import SCORES, DetectionScore

USUAL = {"overlaps": "ignored", "crowds": "ignored"}  # readings of a source that does not say


@dataclass(frozen=True)
class Applied:
    """A protocol on a split of a store."""

    protocol: Protocol
    terms: Terms
    data: str  # the layout that the terms are for, or ``ANY``
    size: Size  # height and width of the masks that are scored
    edition: str = ""  # of the data, where their source is there to tell

    @property
    def beside(self) -> str:
        """The papers whose numbers it may stand beside; empty for none."""
        known = self.edition and self.terms.editions
        return "" if known and self.edition not in self.terms.editions else self.terms.beside


def apply(protocol: Protocol, split: Split, data: str | None = None) -> Applied:
    """The protocol on a split, whose data are of the layout ``data``; None: of the store's source.

    ``IncompatibleError`` with what the store lacks, and with the command that makes one that has it; ``UsageError``
    where a package is missing.
    """
    source = split.store.spec.source
    layout = data or layout_of(source)
    known = layout if layout in protocol.on else ANY
    terms = protocol.on.get(known)
    if terms is None:
        named = f"{protocol.name}:{next(iter(protocol.on))}"
        this = layout or source or "a store that records no source"
        raise IncompatibleError(
            f"{split.path}: protocol {protocol.name} is for {', '.join(protocol.on)}, and this is {this}; "
            f"leave it out, or say that the videos are of such a data set: --protocol {named}"
        )
    if "frame" not in terms.scores and max(split.spec.lengths) == 1:
        raise IncompatibleError(
            f"{split.path}: protocol {protocol.name} scores videos, and these are single images; leave it out"
        )
    if lacking := list(_lacking(terms, split)):
        raise IncompatibleError(
            f"{split.path}: protocol {protocol.name} needs {', '.join(lacking)}; {_remedy(protocol, terms, split)}"
        )
    if any(isinstance(SCORES[key], DetectionScore) for keys in terms.scores.values() for key in keys):
        require_evaluator()
    edition = _edition(source) if terms.editions and known == layout_of(source) else ""
    return Applied(protocol, terms, known, _scored(terms, split.spec.frame_size), edition)


def _edition(source: str) -> str:
    """The edition of a source's data set; empty where it is gone or has none."""
    try:
        return open_source(source).edition
    except FeatcacheError:
        return ""


def apply_all(asked: Sequence[Asked], split: Split) -> tuple[list[Applied], dict[str, str]]:
    """The protocols on a split, and of those that need not be there what is missing, by name.

    Errors of :func:`apply` for those that are required.
    """
    applied, left_out = [], {}
    for each in asked:
        try:
            applied.append(apply(each.protocol, split, each.data))
        except FeatcacheError as error:
            if each.required:
                raise
            left_out[each.protocol.name] = str(error)
    return applied, left_out


def _scored(terms: Terms, stored: Size) -> Size:
    """The size of the masks that are scored, in the stored proportions."""
    if terms.masks is None:
        return stored
    shrink = terms.masks / min(stored)
    return round(stored[0] * shrink), round(stored[1] * shrink)


def _lacking(terms: Terms, split: Split) -> Iterator[str]:
    """What the terms want and the store has not."""
    spec, frame = split.store.spec, split.spec.frame_size
    if terms.fit and (fit := fit_of(spec.preprocessing)) != terms.fit:
        yield f"frames cut by {terms.fit} (these: {fit})"
    if terms.input:
        size = input_size(spec.preprocessing) if "size" in spec.preprocessing else None
        if size != (terms.input, terms.input):
            yield f"an input of {terms.input} px (this: {size_text(size) if size else 'not known'})"
    if terms.masks and min(frame) < terms.masks:
        yield f"masks of {terms.masks} px (these: {size_text(frame)})"
    elif terms.masks and (frame[0] == frame[1]) is (terms.fit == "squash"):
        yield f"{'unsqueezed' if terms.fit == 'squash' else 'square'} masks (these: {size_text(frame)})"
    if spec.frame_stride > 1 and terms.scores.keys() - {"frame"}:
        yield f"all frames of a video (these: one in {spec.frame_stride})"
    options = USUAL | dict(place_of(spec.source).options)
    for name, value in terms.read.items():
        if options.get(name) != value:
            yield f"a source read with {name}={value} (this: {options.get(name, 'without')})"


def _remedy(protocol: Protocol, terms: Terms, split: Split) -> str:
    """The extraction that the terms want."""
    spec = split.store.spec
    if "size" not in spec.preprocessing:
        return "it was imported: extract the features from their frames instead"
    if not spec.source:
        return "it records no source to make another store from: extract the features of its videos again"
    out = split.store.path.with_name(f"{split.store.path.stem}-{protocol.name}.zarr")
    origin = Origin.read(spec.model.get("weights_origin"))
    size = (terms.input, terms.input) if terms.input else input_size(spec.preprocessing)
    rows, columns = (terms.masks, terms.masks) if terms.masks else split.spec.frame_size
    command = extract_command(
        backbone=spec.backbone,
        taps=spec.taps,
        input_size=size,
        source=place_of(spec.source).adding(terms.read) if terms.read and spec.source != SAMPLE else spec.source,
        split=split.name,
        weights=origin.weights if origin and origin.kind in ("file", "random") else "",  # others are found
        fit=terms.fit or fit_of(spec.preprocessing),
        frame_size=terms.frame_size or f"{rows}x{columns}",
        dtype=spec.dtype,
        out=out,
    )
    next_one = f"score with --cache {shlex.quote(str(out))}"
    if size != input_size(spec.preprocessing):
        next_one = f"train on it: its grid is another ({protocol.name} has {terms.input} px)"
    return f"make it with: {command}; then {next_one}"
