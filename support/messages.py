"""Messages to the terminal and to run.log, and progress bars. Only the first process prints."""

import contextlib
import datetime
import io
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from support import distributed

_open_logs: list[io.TextIOBase] = []


def printable(name: str | Path) -> str:
    """Return a path as text that can be written as UTF-8: bytes that are not UTF-8 become '?'.

    In an ASCII locale Python holds every non-ASCII byte of a path as a surrogate.
    """
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text.replace("\N{REPLACEMENT CHARACTER}", "?")


def say(message: str, *, stream=None):
    """Print one line and append it to run.log. stderr takes lines of every process."""
    if not (distributed.is_first() or stream is sys.stderr):
        return
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "ascii"
    text = str(message).encode(encoding, "replace").decode(encoding)
    with contextlib.suppress(OSError):  # a closed terminal must not end the training
        print(text, file=stream, flush=True)
    log(message)


def log(message: str):
    """Append one line to run.log. If the disk is full, the line is lost and the run goes on."""
    for file in _open_logs:
        with contextlib.suppress(OSError):
            file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")
            file.flush()


def warn(message: str):
    """Print and log one line about something odd that does not stop the run."""
    if distributed.is_first():
        say(f"warning: {message}", stream=sys.stderr)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append all messages to the file `path` (UTF-8), and the traceback if the block fails."""
    if not distributed.is_first():
        yield
        return
    file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    _open_logs.append(file)
    try:
        yield
    except Exception:
        log(traceback.format_exc())
        raise
    finally:
        _open_logs.remove(file)
        with contextlib.suppress(OSError):  # a full disk, as in `log`
            file.close()


class Progress:
    """A tqdm bar on a terminal; elsewhere a line every 30 seconds. Both say the time left."""

    def __init__(self, total: int, label: str, unit: str = "it", done: int = 0):
        from tqdm import tqdm

        self.total, self.label, self.unit, self.done = total, label, unit, done
        self.start, self.at_start, self.printed = time.monotonic(), done, time.monotonic()
        self.bar, self.silent = None, not distributed.is_first()
        if not self.silent and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=label, unit=f" {unit}", unit_scale=True,
                dynamic_ncols=True,
            )  # fmt: skip

    def add(self, n: int):
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif not self.silent and time.monotonic() - self.printed > 30:
            self.printed = time.monotonic()
            rate = (self.done - self.at_start) / (self.printed - self.start)
            left = (self.total - self.done) / rate if rate else 0
            line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.0f}/s, "
            with contextlib.suppress(OSError):  # a closed terminal, as in `say`
                print(line + f"{left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def progress(items: Iterable, *, total: int, label: str) -> Iterator:
    """Iterate over `items` and show the progress."""
    with contextlib.closing(Progress(total, label)) as shown:
        for item in items:
            yield item
            shown.add(1)
