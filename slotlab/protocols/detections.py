"""AP and AR of class-agnostic masks, by COCO's own evaluator (pycocotools).

Each slot of a frame is a detection: the pixels where it wins. Its confidence is the mean of its soft mask, weighted by
the mask itself: 1 for a slot that shares no patch. Pixels whose truth is not known count in neither mask.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from featcache.errors import UsageError

Masks = npt.NDArray[np.bool_]  # (N, H, W)


def require_evaluator() -> None:
    """``UsageError`` where pycocotools is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "AP and AR are computed by pycocotools, which is missing: pip install 'slotlab[coco]'"
        ) from error


def confidence(masks: Tensor) -> Tensor:
    """Confidence (..., K) of soft masks (..., K, h, w)."""
    flat = masks.double().flatten(-2)
    return flat.square().sum(-1) / flat.sum(-1).clamp_min(1e-12)


class Detections:
    """Collects frames, and evaluates all of them at once."""

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(
        self, found: npt.NDArray[np.integer], truth: npt.NDArray[np.integer], confidences: npt.NDArray[Any]
    ) -> None:
        """Add one frame: the slot of each pixel (H, W), its truth (H, W), negative where not known, and (K,)."""
        height, width = truth.shape
        image = len(self._images) + 1
        self._images.append({"id": image, "height": height, "width": width})
        known = truth >= 0
        for number in np.unique(truth[truth > 0]):
            encoded, area = _encoded(truth == number)
            this = {"id": len(self._truth) + 1, "iscrowd": 0, "area": area, "segmentation": encoded}
            self._truth.append({"image_id": image, "category_id": 1, **this})
        for slot in np.unique(found[known]):
            encoded, area = _encoded((found == slot) & known)
            this = {"id": len(self._found) + 1, "iscrowd": 0, "area": area, "segmentation": encoded}
            score = float(confidences[slot])
            self._found.append({"image_id": image, "category_id": 1, "score": score, **this})

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._images)

    def stats(self) -> list[float | None]:
        """``COCOeval.stats``: twelve numbers in [0, 1]; None where there is nothing to score."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            sides = []
            for annotations in (self._truth, self._found):
                side = COCO()
                side.dataset = {"images": self._images, "categories": [{"id": 1}], "annotations": annotations}
                side.createIndex()
                sides.append(side)
            evaluation = COCOeval(*sides, iouType="segm")
            evaluation.params.useCats = 0
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return [None if value < 0 else float(value) for value in evaluation.stats]


def _encoded(mask: npt.NDArray[np.bool_]) -> tuple[Any, float]:
    """Run lengths of a mask (H, W), and its pixels."""
    from pycocotools import mask as runs

    return runs.encode(np.asfortranarray(mask.astype(np.uint8))), float(mask.sum())
