"""Errors that a user can act on.

Each message is one line: what is wrong, where, and what to do next. The command line prints that line
and leaves with the class's exit code; a traceback appears only under ``--debug``.
"""

from __future__ import annotations


class FeatcacheError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 1


class UsageError(FeatcacheError):
    """The command, an option or a configuration value is wrong."""

    exit_code = 2


class DataError(FeatcacheError):
    """Input data or weights are missing, truncated or corrupt."""

    exit_code = 3


class IncompatibleError(FeatcacheError):
    """A store or checkpoint is sound, but does not fit what was asked of it."""

    exit_code = 4
