"""Everything a run needs of the machine: devices, memory, checkpoints, run folders, logs, signals.

Nothing in here knows what an image is. Promises: a checkpoint on disk is whole or absent, a run
folder has one writer, and a script ends with the exit code that its ending has in `config.Exit`.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from config import Exit, UserError

# --- messages -----------------------------------------------------------------------------


def say(message: str, *, stream=None):
    """Print one line, on any terminal: characters that it lacks are replaced, never an error."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "ascii"
    print(str(message).encode(encoding, "replace").decode(encoding), file=stream, flush=True)
    for log in _LOGS:
        log.write(str(message) + "\n")
        log.flush()


def warn(message: str):
    """One line on stderr (and in run.log) about something odd that does not stop the run."""
    say(f"warning: {message}", stream=sys.stderr)


_LOGS: list = []  # open run.log files


def progress(items: Iterable, *, total: int, label: str, unit: str = "it", scale: int = 1):
    """Iterate with a tqdm bar on a terminal, and with a plain line now and then elsewhere."""
    raise NotImplementedError  # written below


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it becomes `path`, atomically.

    On failure the temporary file is removed and `path` is as it was. A full disk is exit 7.
    """
    raise NotImplementedError
