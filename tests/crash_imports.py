"""What the fork server imports once (and runs nothing of: threads do not survive a fork)."""

import timm  # noqa: F401

import featcache.extraction.distributed  # noqa: F401
import tests.synthetic  # noqa: F401
