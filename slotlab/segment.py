"""Segments your own pictures with a trained run: ``slotlab.load(RUN).segment(frames)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.extraction.fit import MARGIN, Window, shown
from featcache.machine import pick_device
from featcache.store.reading import FeatureStore
from slotlab.config.schema import Config
from slotlab.masks.labels import UNSEEN, fine_labels, masks_to_labels
from slotlab.masks.refine import refine as refine_masks
from slotlab.models.base import Model, Output
from slotlab.models.build import empty_model
from slotlab.models.inputs import FromFrames, ModelInput
from slotlab.models.randomness import Draws
from slotlab.pictures.frames import Frames, as_frames
from slotlab.runs import checkpoint
from slotlab.runs.folder import STORE, trained_spec
from slotlab.words import Refinement


@dataclass(frozen=True)
class Segmentation:
    """Masks, labels and slots of T frames of H x W pixels, on the host."""

    masks: Tensor  # (T, K, H, W) float32, sum to one over the slots at every pixel; zero where the model saw nothing
    labels: Tensor  # (T, H, W) int64, the slot of each pixel: the largest mask; 255 where the model saw nothing
    slots: Tensor  # (T, K, S) float32


class Segmenter:
    """A run's model with the backbone of its features. :func:`load` makes one."""

    def __init__(self, config: Config, model: Model, read: FromFrames, preprocessing: Mapping[str, Any]) -> None:
        self.config, self.model = config, model
        self._read, self._preprocessing = read, preprocessing

    def segment(self, frames: Frames, *, refine: Refinement | None = None) -> Segmentation:
        """Masks and slots of pictures, or of the frames of one video, at their own resolution.

        Frames may have any size and proportions, and any form that :func:`slotlab.pictures.frames.as_frames` takes.
        They are squeezed, cropped or padded to the backbone's input as those of the run's store were, and the masks
        brought back. A video model carries its slots from frame to frame; other models treat each frame alone.
        ``refine`` aligns the masks with the frames' edges (:mod:`slotlab.masks.refine`). The same frames give the same
        result every time. Errors: those of ``as_frames``, and ``DataError`` if the model's masks are not finite.
        """
        pictures, window = self._shown(frames)
        output, masks = self._output(pictures)
        if refine:
            fine = refine_masks(masks, torch.from_numpy(pictures), refine).cpu()
            labels = fine.argmax(1)
        else:
            fine = F.interpolate(masks, size=window.size, mode="bilinear").cpu()
            labels = masks_to_labels(masks, window.size).cpu()
        if not window.is_frame:
            last = fine.permute(0, 2, 3, 1).numpy()  # (T, H, W, K)
            fine = torch.from_numpy(window.put_back(last, 0.0)).permute(0, 3, 1, 2).contiguous()
            labels = torch.from_numpy(window.put_back(labels.numpy(), UNSEEN))
        return Segmentation(fine, labels, output.slots.float().cpu())

    def label(self, frames: Frames, *, refine: Refinement | None = None) -> npt.NDArray[np.uint8]:
        """The slot of each pixel, (T, H, W), without holding the masks of all frames at the frames' resolution."""
        pictures, window = self._shown(frames)
        return window.put_back(fine_labels(self._output(pictures)[1], pictures, refine), UNSEEN)

    def _shown(self, frames: Frames) -> tuple[npt.NDArray[np.uint8], Window]:
        """The part (T, h, w, 3) of the frames that the model sees, and its window in them."""
        pictures = as_frames(frames)
        window = shown(self._preprocessing, (pictures.shape[1], pictures.shape[2]))
        return window.cut(pictures, self._preprocessing.get(MARGIN, 0)), window

    @torch.no_grad()
    def _output(self, pictures: npt.NDArray[np.uint8]) -> tuple[Output, Tensor]:
        device = next(self.model.parameters()).device
        output = self.model.segment(self._read(pictures).to(device), Draws.of_step(self.config.seed, 0))
        output = output.checked().showing(self.config.published_masks)
        return output, output.masks_on_grid.float()


def load(run: str | Path, *, device: str | torch.device = "auto", weights: str | None = None) -> Segmenter:
    """A segmenter from a run folder, for pictures outside any store. The run's own store need not exist.

    Args:
        run: folder made by ``slotlab train``.
        device: where backbone and model run.
        weights: checkpoint file of the backbone; None: where the run's store had it from.

    Raises:
        DataError: there is no run, or the backbone's weights are gone.
        IncompatibleError: the checkpoint is of another model, or the weights are not those of the run's features.
        UsageError: this machine lacks the device.
    """
    run = Path(run)
    chosen = pick_device(str(device))
    config = checkpoint.load_run_config(run)
    store = FeatureStore(run / STORE, trained_spec(run))  # only its description is used: no data is read
    inputs = ModelInput.of(config, store)
    model = empty_model(config, inputs)
    checkpoint.load_model(run, model)
    read = inputs.from_frames(store, weights, chosen)
    return Segmenter(config, model.to(chosen).eval(), read, store.spec.preprocessing)
