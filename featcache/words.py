"""Words of options and settings, without torch, so that the command line starts quickly."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float16", "int8"]  # stored forms of a token

Precision = Literal["float32", "float16", "bfloat16"]  # number formats of the backbone

Residence = Literal["auto", "disk", "host", "device"]  # places of the features while they stream

Fit = Literal["squash", "crop", "pad"]  # ways to bring frames of other proportions to the input

FramesAs = Literal["video", "images"]  # readings of numbered images in one folder

StoreFormat = Literal["zarr", "hdf5"]  # formats of a copy
