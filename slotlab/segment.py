"""Segments your own pictures: with a trained run, ``slotlab.load(RUN).segment(frames)``, or without any training,
``slotlab.training_free().segment(frames)``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import DataError, UsageError
from featcache.extraction.fit import MARGIN, Window, shown
from featcache.machine import pick_device
from featcache.moments import Moments, NonFiniteTokensError
from featcache.sources.video import Size
from featcache.store.reading import FeatureStore
from slotlab.config.schema import Config
from slotlab.masks.labels import UNSEEN, fine_labels, masks_to_labels
from slotlab.masks.refine import refine as refine_masks
from slotlab.models.base import Model
from slotlab.models.build import empty_model
from slotlab.models.inputs import FromFrames, ModelInput
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.segments import CUT, MOST, SHRINKAGE, soft_segments
from slotlab.models.whitening import natural
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


@dataclass(frozen=True)
class Future:
    """H frames to come, as a world model predicts them (:mod:`slotlab.forecast`), on the host."""

    slots: Tensor  # (H, K, S) float32, vectors as slotlab.models.dynamics.state has them
    masks: Tensor  # (H, K, height, width) float32, sum to one over the slots; of the frame that the model sees
    places: Tensor  # (H, K, 2) float32, row and column of each slot's centre in pixels of these masks
    features: Tensor  # (H, N, D) float32, in the units of the backbone's tokens
    active: Tensor  # (K,) bool: the slots that held anything in the seen frames


class Segmenter(ABC):
    """Finds slots in pictures outside any store. :func:`load` and :func:`training_free` make one."""

    def __init__(self, slots: int, preprocessing: Mapping[str, Any]) -> None:
        self.slots = slots  # the most that a frame can have
        self._preprocessing = preprocessing

    @abstractmethod
    def _found(self, pictures: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Slots (T, K, S) and masks on the grid (T, K, h, w) of pictures (T, H, W, 3)."""

    def segment(self, frames: Frames, *, refine: Refinement | None = None) -> Segmentation:
        """Masks and slots of pictures, or of the frames of one video, at their own resolution.

        Frames may have any size and proportions, and any form that :func:`slotlab.pictures.frames.as_frames` takes.
        They are squeezed, cropped or padded to the backbone's input (as those of the run's store were), and the masks
        brought back. A video model carries its slots from frame to frame; otherwise each frame is treated alone.
        ``refine`` aligns the masks with the frames' edges (:mod:`slotlab.masks.refine`). The same frames give the same
        result every time. Errors: those of ``as_frames``, and ``DataError`` if masks or tokens are not finite.
        """
        pictures, window = self._shown(frames)
        slots, masks = self._found(pictures)
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
        return Segmentation(fine, labels, slots.float().cpu())

    def label(self, frames: Frames, *, refine: Refinement | None = None) -> npt.NDArray[np.uint8]:
        """The slot of each pixel, (T, H, W), without holding the masks of all frames at the frames' resolution."""
        pictures, window = self._shown(frames)
        return window.put_back(fine_labels(self._found(pictures)[1], pictures, refine), UNSEEN)

    def _shown(self, frames: Frames) -> tuple[npt.NDArray[np.uint8], Window]:
        """The part (T, h, w, 3) of the frames that the model sees, and its window in them."""
        pictures = as_frames(frames)
        window = shown(self._preprocessing, (pictures.shape[1], pictures.shape[2]))
        return window.cut(pictures, self._preprocessing.get(MARGIN, 0)), window


class RunSegmenter(Segmenter):
    """A run's model with the backbone of its features."""

    def __init__(self, config: Config, model: Model, read: FromFrames, preprocessing: Mapping[str, Any]) -> None:
        super().__init__(model.slots, preprocessing)
        self.config, self.model = config, model
        self._read = read

    def rollout(self, frames: Frames, steps: int, actions: npt.ArrayLike | None = None) -> Future:
        """The frames after a video's, if this is a world model (:class:`slotlab.forecast.Forecaster`).

        ``UsageError`` for a run of another kind.
        """
        raise UsageError(
            f"a run of model.kind = {self.config.model.kind} predicts nothing; train a world model on its slots with "
            "slotlab train --preset dynamics --run RUN, and load that"
        )

    @torch.no_grad()
    def _found(self, pictures: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        output = self.model.segment(self._read(pictures).to(device), Draws.of_step(self.config.seed, 0))
        output = output.checked().showing(self.config.published_masks)
        return output.slots, output.masks_on_grid.float()


class TrainingFreeSegmenter(Segmenter):
    """Training-free segments (:mod:`slotlab.models.segments`) of a backbone's tokens.

    A slot is the mean whitened token of a segment. Segments are numbered by size, frame by frame, and follow no object
    through a video.
    """

    def __init__(
        self,
        read: FromFrames,
        whiten: Normaliser,
        measured: str,
        grid: Size,
        cut: float,
        preprocessing: Mapping[str, Any],
    ) -> None:
        super().__init__(MOST, preprocessing)
        self.measured = measured  # the pictures whose statistics whiten the tokens, in words
        self._read, self._whiten, self._grid, self._cut = read, whiten, grid, cut

    @torch.no_grad()
    def _found(self, pictures: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        tokens = self._whiten(self._read(pictures))
        masks = soft_segments(tokens, self._grid, self._cut)  # (T, K, N)
        slots = masks @ tokens / masks.sum(-1, keepdim=True).clamp_min(1e-6)
        return slots, masks.reshape(*masks.shape[:2], *self._grid)


def load(
    run: str | Path,
    *,
    input_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "auto",
    weights: str | None = None,
) -> RunSegmenter:
    """A segmenter from a run folder, for pictures outside any store. The run's own store need not exist.

    Args:
        run: folder made by ``slotlab train``.
        input_size: pixels that the backbone sees: a side, or rows and columns; a larger input gives finer masks. None:
            as many as in training. Others are for models that know nothing of places (``Config.any_grid``) alone.
        device: where backbone and model run.
        weights: checkpoint file of the backbone; None: where the run's store had it from.

    Raises:
        DataError: there is no run, or the backbone's weights are gone.
        IncompatibleError: the checkpoint is of another model, or the weights are not those of the run's features.
        UsageError: this machine lacks the device, the backbone's patch does not divide the input, or the model cannot
            change it.
    """
    run = Path(run)
    chosen = pick_device(str(device))
    config, spec = checkpoint.load_run_config(run), trained_spec(run)
    if input_size is not None:
        if not config.any_grid:
            raise UsageError(f"{run}: was trained on one grid of patches, so it has one input size; leave it out")
        spec = spec.at_size((input_size, input_size) if isinstance(input_size, int) else input_size)
    store = FeatureStore(run / STORE, spec)  # only its description is used: no data is read
    inputs = ModelInput.of(config, store)
    model = empty_model(config, inputs)
    checkpoint.load_model(run, model)
    read = inputs.from_frames(store, weights, chosen)
    return RunSegmenter(config, model.to(chosen).eval(), read, store.spec.preprocessing)


ENOUGH = 64  # own pictures from which they whiten about as well as natural ones; benchmarks/natural.py
_OWN, _FRAMES = 256, 8  # own pictures or videos that are measured at most, and frames of each


def training_free(
    own: Sequence[Frames] = (),
    *,
    backbone: str = "dinov2",
    input_size: int | tuple[int, int] | None = None,
    cut: float = CUT,
    device: str | torch.device = "auto",
    weights: str | None = None,
) -> TrainingFreeSegmenter:
    """A segmenter without a run: a backbone's tokens, whitened, and average linkage.

    The tokens are whitened by the statistics of ``own``, if these are ``ENOUGH``; else by those of natural pictures,
    which the package ships for DINOv2 ViT-S/14; else by those of ``own`` all the same.

    Args:
        own: pictures and videos like those to segment, or these themselves, each in a form that
            :func:`slotlab.pictures.frames.as_frames` takes. A video counts as one.
        backbone: short name, ``timm:NAME`` or ``open_clip:ARCH/TAG``.
        input_size: pixels that the backbone sees: a side, or rows and columns; a larger input gives finer masks.
        cut: a higher one gives fewer and larger segments.
        device: where the backbone runs.
        weights: checkpoint file of the backbone, or ``random``; None: where the backbone's weights are found.

    Raises:
        UsageError: unknown backbone, a size that its patch does not divide, or no statistics: nothing is shipped for
            this backbone, and ``own`` is empty.
        DataError: weights or pictures that cannot be read.
    """
    from featcache.backbones.backbone import load_backbone  # backbones take seconds to import
    from featcache.backbones.inference import choose_batch_size, forward

    model = load_backbone(backbone, weights, (), input_size, pick_device(str(device)))
    (tap,), batch = model.taps, choose_batch_size(model, "float32")

    def read(pictures: npt.NDArray[np.uint8]) -> Tensor:
        return forward(model, [pictures], batch, "float32")[0][tap]

    shipped = natural(model.spec.name, tap) if weights != "random" else None
    if len(own) >= ENOUGH or (own and shipped is None):
        moments = _moments(own, read, model.grid, model.dims[tap])
        whiten = Normaliser.from_moments("whiten", moments, SHRINKAGE, center="channel")
        few = "" if len(own) >= ENOUGH else f"; they are few: {ENOUGH} or more give better segments"
        measured = f"the {len(own)} given{few}"
    elif shipped is not None:
        whiten = Normaliser.from_statistics("whiten", shipped.mean, shipped.covariance, shrinkage=SHRINKAGE)
        measured = f"{shipped.pictures} natural pictures"
    else:
        raise UsageError(
            f"{backbone}: no statistics of natural pictures are shipped for {tap}; give pictures to measure, {ENOUGH} "
            "or more, or take --backbone dinov2"
        )
    return TrainingFreeSegmenter(read, whiten.to(model.device), measured, model.grid, cut, model.preprocessing)


def _moments(own: Sequence[Frames], read: FromFrames, grid: Size, dim: int) -> Moments:
    """Moments of the tokens of some pictures and videos, both spread evenly."""
    moments = Moments.empty(grid[0] * grid[1], dim)
    for frames in own[:: math.ceil(len(own) / _OWN)]:
        pictures = as_frames(frames)
        try:
            moments += Moments.from_tokens(read(pictures[:: math.ceil(len(pictures) / _FRAMES)]))
        except NonFiniteTokensError as error:
            raise DataError(f"the backbone's tokens are not finite ({error}); check its weights") from error
    return moments
