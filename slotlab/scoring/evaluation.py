"""The result of an evaluation, and its JSON, which ``slotlab eval --json`` prints and run folders keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from featcache.errors import DataError
from slotlab.config.model import MASKS, Masks
from slotlab.scoring.collapse import NAMES
from slotlab.scoring.groups import Confidence, Groups
from slotlab.scoring.references import References
from slotlab.scoring.scores import Summary, Values

_FINE = ("boundaries", "refined", "binarised", "entropy", "protocols")
_DIAGNOSTICS = (*NAMES, "kept_slots")


@dataclass(frozen=True)
class Evaluation:
    """A run's scores and diagnostics on one split, of the masks that it publishes unless stated otherwise."""

    run: str
    cache: str
    split: str
    tap: str
    step: int  # of the checkpoint
    code: str  # digest of the code that made the numbers
    resolution: tuple[int, int]  # (H, W) in pixels, of frames and ground truth
    published_masks: Masks
    summary: Summary
    ignored_pixels: float | None  # share of the labelled frames' pixels without known truth; None: an earlier version
    masks: Mapping[Masks, Summary]  # scores of both kinds of masks
    references: References
    diagnostics: Mapping[str, float]  # means over the videos, and kept_slots
    diagnostics_by_frame: Mapping[str, Sequence[float]]  # (T,) each, means over the videos with such a frame
    largest_activation_by_slot: Sequence[float]  # (K,)
    warnings: Sequence[str]
    groups: Groups
    fine: Mapping[str, Any] = field(default_factory=dict)  # what was asked for: of scoring.fine, .entropy, protocols
    content: str = ""  # hash of the split's videos; "" in evaluations of earlier versions

    @property
    def values(self) -> Values:
        """The scores of the split, by key."""
        return self.summary.values

    @property
    def by_video(self) -> Mapping[str, Values]:
        """The scores of each video, by its name."""
        return self.groups.by_video

    @property
    def films(self) -> bool:
        """Whether a video has several frames; otherwise scores of whole videos equal those of frames."""
        return self.summary.frames > self.summary.videos

    @property
    def left_out(self) -> str:
        """What no score counts, in words; empty if every pixel's truth is known."""
        frames, labelled = self.summary.frames, self.summary.labelled_frames
        parts = [] if labelled in (frames, None) else [f"{labelled} of {frames} frames are labelled"]
        if self.ignored_pixels:
            parts.append(f"{self.ignored_pixels:.1%} of {'their' if parts else 'the'} pixels are ignored")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as JSON-able values. The keys are a contract."""
        groups = {
            key: {name: of.as_dict() for name, of in parts.items()} for key, parts in self.groups.summaries.items()
        }
        return {
            "run": self.run,
            "cache": self.cache,
            "split": self.split,
            **({"content": self.content} if self.content else {}),
            "tap": self.tap,
            "step": self.step,
            "code": self.code,
            "resolution": list(self.resolution),
            "published_masks": self.published_masks,
            **self.summary.as_dict(),
            **({} if self.ignored_pixels is None else {"ignored_pixels": self.ignored_pixels}),
            **{name: of.as_dict() for name, of in self.masks.items()},
            **self.references.as_dict(),
            **self.diagnostics,
            "diagnostics_by_frame": {name: list(values) for name, values in self.diagnostics_by_frame.items()},
            "largest_activation_by_slot": list(self.largest_activation_by_slot),
            "warnings": list(self.warnings),
            **groups,
            "by_video": {name: dict(values) for name, values in self.by_video.items()},
            "confidence": self.groups.confidence.as_dict(),
            **self.fine,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "evaluation") -> Self:
        """The evaluation of :meth:`as_dict`, by this version or an earlier one, which may have fewer keys.

        ``DataError`` if ``raw`` is not an evaluation; ``where`` names its file.
        """
        try:
            by_video = raw["by_video"]
            groups = {
                key: {name: Summary.from_dict(part) for name, part in parts.items()}
                for key, parts in raw.items()
                if key.startswith("by_") and key != "by_video"
            }
            return cls(
                run=raw["run"],
                cache=raw["cache"],
                split=raw["split"],
                tap=raw["tap"],
                step=raw["step"],
                code=raw.get("code", ""),
                resolution=(raw["resolution"][0], raw["resolution"][1]),
                published_masks=raw.get("published_masks", "decoder"),
                summary=Summary.from_dict(raw),
                ignored_pixels=raw.get("ignored_pixels"),
                masks={kind: Summary.from_dict(raw[kind]) for kind in MASKS if kind in raw},
                references=References.from_dict(raw),
                diagnostics={name: raw[name] for name in _DIAGNOSTICS if name in raw},
                diagnostics_by_frame=raw.get("diagnostics_by_frame", {}),
                largest_activation_by_slot=raw.get("largest_activation_by_slot", ()),
                warnings=raw.get("warnings", ()),
                groups=Groups(groups, by_video, Confidence.from_dict(raw.get("confidence", {}))),
                fine={key: raw[key] for key in _FINE if key in raw},
                content=raw.get("content", ""),
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{where}: damaged, or of an earlier version ({what}); score the run again") from error
