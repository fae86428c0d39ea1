"""A process that reads HDF5 files for another one: on some damaged files libhdf5 ends the process.

Requests come pickled on standard input, answers go to standard output. It runs as a script and imports nothing of this
package, so that it starts in a fraction of a second. :mod:`featcache.sources.hdf5_file` starts it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any

import h5py


def answer(path: str, name: str, what: str, key: Any) -> Any:
    """One property of the group or array ``name`` of a file."""
    with h5py.File(path, "r") as file:
        if what == "kind":
            item = file[name] if name == "/" or name in file else None
            if isinstance(item, h5py.Group):
                return item.name, list(item)
            return (item.name, item.shape, item.dtype.str) if isinstance(item, h5py.Dataset) else None
        return file[name].attrs.get(key) if what == "attribute" else file[name][key]


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            found = True, answer(*request)
        except Exception as error:
            found = False, (type(error).__name__, str(error))
        pickle.dump(found, answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    main()
