"""featcache: run frozen vision backbones over videos once, and keep the features.

The package holds the data sources, the backbone registry, the extractor, the zarr store and the stream that feeds a
trainer. It knows nothing of slots. Heavy modules are imported where they are used.

Importing it sets ``OMP_WAIT_POLICY=PASSIVE`` and ``GOMP_SPINCOUNT`` in the environment, unless the first is set
already: OpenMP's threads then sleep at a barrier soon, instead of spinning for milliseconds, because beside another
program spinning threads take cores from the very threads that they wait for. OpenMP reads both once, when torch is
loaded, so a program that imports torch before featcache or slotlab must set them itself.
"""

import os

TYPE_CHECKING = False  # typing's own takes longer to import than all that is here
if TYPE_CHECKING:  # imported when called for: `import featcache` stays fast
    from featcache.library import Cache, extract, open
    from featcache.sources.reading import Reading
    from featcache.stream.dataset import Batches, Clips

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:  # here, because every command and worker imports this package
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # GNU's libgomp lets this win: about 0.1 ms, what waking a thread costs. Asleep at once, a training that is alone
    # takes a tenth longer (docs/benchmarks-speed.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# What is public: it changes with a deprecation alone.
__all__ = ["Batches", "Cache", "Clips", "Reading", "__version__", "extract", "open"]

_HOMES = {
    "Batches": "featcache.stream.dataset",
    "Cache": "featcache.library",
    "Clips": "featcache.stream.dataset",
    "Reading": "featcache.sources.reading",
    "extract": "featcache.library",
    "open": "featcache.library",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
