"""Words of options, without torch, so that the command line starts quickly."""

from __future__ import annotations

from typing import Literal

Refinement = Literal["guided", "crf"]  # methods of slotlab.masks.refine

MaskFormat = Literal["png", "rle", "overlay-png", "overlay-mp4", "overlay-gif"]  # files of slotlab.pictures.files
Floors = Literal["usual", "all"]  # floors that an evaluation measures
SlotFormat = Literal["zarr", "npz", "hdf5"]
ModelSource = Literal["videosaur", "slotcontrast", "spot", "oclf"]  # tables of slotlab.imported
