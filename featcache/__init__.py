"""featcache: run frozen vision backbones over videos once, and keep the features.

The package holds the data sources, the backbone registry, the extractor, the zarr store and the stream that feeds a
trainer. It knows nothing of slots. Heavy modules are imported where they are used.

Importing it sets ``OMP_WAIT_POLICY=PASSIVE`` in the environment, unless the variable is set already: OpenMP's threads
then sleep at a barrier instead of spinning, because beside another program spinning threads take cores from the very
threads that they wait for. OpenMP reads the variable once, when torch is loaded, so a program that imports torch
before featcache or slotlab must set it itself. In libgomp ``GOMP_SPINCOUNT`` overrides it.
"""

import os

__version__ = "0.1.0"

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # here, because every command and worker imports this package
