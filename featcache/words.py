"""Words of the configuration, without torch, so that a command line can be built from them at once."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float16", "int8"]  # of the stored tokens

Precision = Literal["float32", "float16", "bfloat16"]  # the backbone ran in


Residence = Literal["auto", "disk", "host", "device"]

Fit = Literal["squash", "crop", "pad"]  # what a backbone is shown of frames that have not its input's proportions

FramesAs = Literal["video", "images"]  # what numbered images beside each other are
