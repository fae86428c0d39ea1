"""A trained run for other people's pictures: ``slotlab.load(RUN).segment(frames)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.backbones.inference import forward
from featcache.extraction.store_backbone import recorded_weights, store_backbone
from featcache.machine import pick_device
from featcache.store.reading import FeatureStore
from featcache.stream.stream import VIDEO
from slotlab.config.schema import Config
from slotlab.masks.labels import fine_labels, masks_to_labels
from slotlab.masks.refine import Method
from slotlab.masks.refine import refine as refine_masks
from slotlab.models.base import Model, Output, on_grid
from slotlab.models.build import empty_model
from slotlab.models.inputs import model_spec, model_tap
from slotlab.models.randomness import Draws
from slotlab.pictures.frames import Frames, as_frames
from slotlab.runs import checkpoint
from slotlab.runs.folder import trained_spec

Read = Callable[[npt.NDArray[np.uint8]], Tensor]  # frames (T, H, W, 3) to the model's input


@dataclass(frozen=True)
class Segmentation:
    """What a run sees in T frames of H x W pixels, on the host."""

    masks: Tensor  # (T, K, H, W) float32, sum to one over the slots at every pixel
    labels: Tensor  # (T, H, W) int64, the slot of each pixel: the largest mask
    slots: Tensor  # (T, K, S) float32


class Segmenter:
    """A run with the backbone that its features came from. Made by :func:`load`."""

    def __init__(self, config: Config, model: Model, read: Read) -> None:
        self.config, self.model = config, model
        self._read = read

    def segment(self, frames: Frames, *, refine: Method | None = None) -> Segmentation:
        """Masks and slots of pictures, or of the frames of one video, at their own resolution.

        Frames may be of any size and proportions (see :func:`slotlab.pictures.frames.as_frames` for what they may come
        as): whole frames are squeezed to the backbone's input, and the masks stretched back. A video model carries
        its slots from frame to frame; any other takes the frames apart. ``refine`` brings the masks to the frames'
        edges (:mod:`slotlab.masks.refine`). The same frames give the same result every time.
        """
        pictures = as_frames(frames)
        output, masks = self._output(pictures)
        if refine:
            fine = refine_masks(masks, torch.from_numpy(pictures), refine).cpu()
            labels = fine.argmax(1)
        else:
            fine = F.interpolate(masks, size=pictures.shape[1:3], mode="bilinear").cpu()
            labels = masks_to_labels(masks, (pictures.shape[1], pictures.shape[2])).cpu()
        return Segmentation(fine, labels, output.slots.float().cpu())

    def label(self, frames: Frames, *, refine: Method | None = None) -> npt.NDArray[np.uint8]:
        """The labels alone, (T, H, W), without ever holding the masks of all frames at the frames' resolution."""
        pictures = as_frames(frames)
        return fine_labels(self._output(pictures)[1], pictures, refine)

    @torch.no_grad()
    def _output(self, pictures: npt.NDArray[np.uint8]) -> tuple[Output, Tensor]:
        device = next(self.model.parameters()).device
        output = self.model.segment(self._read(pictures).to(device), Draws.of_step(self.config.seed, 0))
        output = output.checked().showing(self.config.published_masks)
        return output, on_grid(output.masks, self.model.grid).float()


def load(run: str | Path, *, device: str | torch.device = "auto", weights: str | None = None) -> Segmenter:
    """Open a run folder for pictures that are in no store. The store that it was trained on need not exist.

    Args:
        run: folder made by ``slotlab train``.
        device: where backbone and model run.
        weights: checkpoint file of the backbone; None takes it from where the run's store had it.

    Raises:
        DataError: no run there, or the backbone's weights are gone.
        IncompatibleError: a checkpoint of another model, or other weights than those of the run's features.
    """
    run = Path(run)
    chosen = pick_device(str(device))
    config = checkpoint.load_run_config(run)
    store = FeatureStore(run / "store.json", trained_spec(run))  # a description alone: nothing is read from it
    model = empty_model(config, model_spec(config, store))
    checkpoint.load_model(run, model)
    tap = model_tap(config, store)
    read: Read = torch.from_numpy if tap == VIDEO else _features(store, tap, weights, chosen)
    return Segmenter(config, model.to(chosen).eval(), read)


def _features(store: FeatureStore, tap: str, weights: str | None, device: torch.device) -> Read:
    """Frames to the tap's tokens, just as the store's own were made."""
    spec = store.spec
    backbone = store_backbone(store, (tap,), weights or recorded_weights(spec), str(device))
    # Half precision is emulated on a CPU; what a GPU rounded is within 1 % of the exact features.
    precision = "float32" if device.type == "cpu" and spec.precision == "float16" else spec.precision

    def read(pictures: npt.NDArray[np.uint8]) -> Tensor:
        tokens = forward(backbone, [pictures], max(spec.batch_size, 1), precision)[0][tap]
        return store.encoding.rounded(tokens)

    return read
