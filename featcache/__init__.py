"""featcache: run frozen vision backbones over videos once, and keep the features.

The package holds the data sources, the backbone registry, the extractor, the zarr store and the stream that
feeds a trainer. It knows nothing of slots. Everything heavy is imported where it is used.
"""

__version__ = "0.1.0"
