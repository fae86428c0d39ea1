"""What the fork server imports once (and runs nothing of: threads do not survive a fork)."""

import os

import timm  # noqa: F401

import featcache.extraction.distributed  # noqa: F401
import slotlab.experiments.worker  # noqa: F401
import tests.synthetic  # noqa: F401

os.fsync = lambda fd: None  # as in tests/conftest.py: a process that is killed loses nothing that it has written
