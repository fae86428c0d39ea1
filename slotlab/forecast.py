"""Predicts the frames that follow your own: ``slotlab.load(RUN).rollout(frames, steps)`` with a dynamics run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.machine import pick_device
from featcache.store.reading import FeatureStore
from slotlab.dynamics.tracks import tracks_of, weights_digest
from slotlab.models.build import empty_model
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.dynamics.motion import on_grid
from slotlab.models.dynamics.state import PLACE
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import Draws
from slotlab.pictures.frames import Frames
from slotlab.runs import checkpoint
from slotlab.runs.folder import STORE, trained_spec
from slotlab.segment import Future, RunSegmenter
from slotlab.segment import load as load_segmenter


class Forecaster(RunSegmenter):
    """A dynamics run, with the run whose slots it predicts: that one segments. :func:`load` makes one."""

    def __init__(self, dynamics: DynamicsModel, tracker: RunSegmenter) -> None:
        super().__init__(tracker.config, tracker.model, tracker._read, tracker._preprocessing)
        self.dynamics = dynamics

    @torch.no_grad()
    def rollout(self, frames: Frames, steps: int, actions: npt.ArrayLike | None = None) -> Future:
        """The ``steps`` frames after a video's.

        The video's slots are followed through all of its frames, and predicted from the last ``model.burn_in``: from
        fewer, if it has fewer. Frames take the forms of :func:`slotlab.pictures.frames.as_frames`. A model of actions
        needs ``actions`` (T + steps - 1, A), one for each frame before the last predicted one: that of a frame leads to
        the next. ``UsageError`` for less than one step or other actions, ``DataError`` if masks are not finite.
        """
        if steps < 1:
            raise UsageError(f"rollout of {steps} steps: ask for at least one")
        pictures, window = self._shown(frames)
        pushes = self._actions(actions, len(pictures), steps)
        tokens = self._read(pictures)
        device = self.dynamics.place.device
        output = self.model.segment(tokens.to(device), Draws.of_step(self.config.seed, 0))
        shown = output.checked().showing(self.config.published_masks)
        first = max(0, len(pictures) - self.dynamics.config.burn_in)  # of the frames to predict from
        edges = pictures[first:] if self.dynamics.config.refined else None
        known = shown.masks_on_grid[first:]
        tracks = tracks_of(known, tokens[first:].cpu(), self.dynamics.grid, frames=edges)
        seen = self.dynamics.see(tracks.unsqueeze(0).to(device))
        seen = replace(seen, actions=pushes[first:].unsqueeze(0).to(device))
        future = self.dynamics.roll_out(seen, steps)
        found = self.dynamics.decode(seen, future)
        masks = F.interpolate(on_grid(found.sharp[0], self.dynamics.grid), size=window.size, mode="bilinear")
        size = torch.tensor(window.size)
        places = future[0, ..., PLACE].cpu() * (size / torch.tensor(self.dynamics.grid)) + (size - 1) / 2
        dense = self.dynamics.normaliser(tokens[-1].to(device))
        features = found.features @ self.dynamics.basis.T + self.dynamics.texture(seen, future, dense)
        features = self.dynamics.normaliser.undone(features[0])
        return Future(future[0].cpu(), masks.cpu(), places, features.cpu(), seen.active[0].any(0).cpu())

    def _actions(self, given: npt.ArrayLike | None, frames: int, steps: int) -> Tensor:
        """Actions (T + steps - 1, A), checked; A is 0 for a model that reads none."""
        size, count = self.dynamics.actions, frames + steps - 1
        if given is None and not size:
            return torch.zeros(count, 0)
        values = torch.zeros(0) if given is None else torch.as_tensor(given, dtype=torch.float32)
        if values.shape != (count, size) or not bool(values.isfinite().all()):
            needs = f"actions of shape ({count}, {size}), finite" if size else "no actions: it was trained without"
            raise UsageError(f"rollout of {steps} steps after {frames} frames: the model needs {needs}")
        return values


def load(
    run: str | Path,
    *,
    input_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "auto",
    weights: str | None = None,
) -> RunSegmenter:
    """A run for your own pictures: a segmenter, or of a dynamics run a forecaster.

    Arguments and errors are those of :func:`slotlab.segment.load`. A forecaster also needs the run whose slots it was
    trained on: ``DataError`` if that is gone, ``IncompatibleError`` if it has other weights now.
    """
    run = Path(run)
    config = checkpoint.load_run_config(run)
    if config.model.kind != "dynamics":
        return load_segmenter(run, input_size=input_size, device=device, weights=weights)
    if input_size is not None:
        raise UsageError(f"{run}: predicts slots of one grid of patches, so it has one input size; leave it out")
    chosen, spec = pick_device(str(device)), trained_spec(run)
    source = Path(spec.source)
    if not source.is_dir():
        raise DataError(f"{run}: predicts the slots of {source}, which is not there; put that run back")
    tracker = load_segmenter(source, device=device, weights=weights)
    if tracker.config.model.kind == "pixel":
        raise UsageError(f"{source}: finds slots in pixels, and rollouts need features; score it with slotlab rollout")
    if weights_digest(tracker.model) != spec.model["weights"]:
        raise IncompatibleError(
            f"{source}: has other weights than when {run} was trained on its slots; train that again"
        )
    model = empty_model(config, ModelInput.of(config, FeatureStore(run / STORE, spec)))
    checkpoint.load_model(run, model)
    assert isinstance(model, DynamicsModel)
    return Forecaster(model.to(chosen).eval(), tracker)
