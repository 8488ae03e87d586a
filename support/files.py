"""Files that are always whole: atomic writes, strict JSON, log.csv, figures.

A killed process or a full disk leaves the previous file intact.
"""

import contextlib
import csv
import io
import json
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from config import Exit, UserError
from support.messages import log, printable, warn


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, atomically.

    On failure the temporary file is removed and `path` stays as it was. Raises UserError
    (exit 7) if the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}@{socket.gethostname()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as problem:
        raise cannot_write(path, problem) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path):
    """Make a rename durable. Some network file systems cannot do that for a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(handle)
        finally:
            os.close(handle)


def mapped(path: Path) -> np.ndarray:
    """Return the array in a .npy file as a memory map, read-only in effect.

    Some FUSE mounts refuse shared mappings: there the pages are private copies.
    """
    try:
        return np.load(path, mmap_mode="r")
    except OSError:
        return np.load(path, mmap_mode="c")


def cannot_write(path: Path, problem: OSError, needed: int | None = None) -> UserError:
    """Return the error (exit 7) for a failed write, with free and `needed` bytes as MB."""
    space = ""
    with contextlib.suppress(OSError, AttributeError):
        stats = os.statvfs(path.parent)
        space = f", {stats.f_bavail * stats.f_frsize / 1e6:.1f} MB free"
    if needed is not None:
        space += f", {needed / 1e6:.1f} MB needed"
    return UserError(
        Exit.WRITE,
        f"cannot write {path}: {problem.strerror or problem}{space}; the previous file is "
        "intact. Make room, or choose another --out or --cache",
    )


def remove_temporaries(folder: Path):
    """Delete the temporary files that a killed process left in a results folder."""
    for place in ("", "figures/", "seed-*/", "seed-*/figures/"):
        for stale in folder.glob(f"{place}.*.tmp*"):
            stale.unlink(missing_ok=True)


def is_orphan(temporary: Path) -> bool:
    """Whether the process that began this temporary file ran on this host and has ended."""
    pid, _, host = temporary.name.rpartition(".tmp")[2].partition("@")
    if os.name != "posix" or host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)  # signal 0 only checks that the process exists
    except OSError as problem:
        return isinstance(problem, ProcessLookupError)
    return False


def write_npy_header(file, dtype, shape: tuple[int, ...]):
    """Begin a .npy file that is written in parts, never sparse: a full disk is an error."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_text(path: Path, text: str):
    """Write a UTF-8 text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")


def write_json(path: Path, values: dict):
    """Write strict JSON. A NaN would be a wrong score: it raises FloatingPointError."""
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except ValueError:
        raise FloatingPointError(f"{path}: a score is not finite") from None
    write_text(path, text + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError (exit 4) if there is none at `path`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(Exit.CHECKPOINT, f"{path}: {problem}; is this a run folder?") from None
    if not isinstance(values, dict):
        raise UserError(Exit.CHECKPOINT, f"{path}: not a JSON object; is this a run folder?")
    return values


@contextlib.contextmanager
def warning_only(what: str) -> Iterator[None]:
    """Turn a failure into a warning; its traceback goes to run.log. Figures never end a run."""
    try:
        yield
    except Exception as problem:
        warn(f"{what} failed: {type(problem).__name__}: {problem}")
        log(traceback.format_exc())


def save_figure(path: Path, make: Callable[[], object]):
    """Draw and save a matplotlib Figure. A failure is a warning."""
    with warning_only(f"drawing {path.name}"), replacing(path) as temporary:
        make().savefig(temporary, format="png")


class Log:
    """log.csv: one row per measurement, fixed columns; a cell may be empty."""

    def __init__(self, path: Path, columns: tuple[str, ...] = ()):
        self.path, self.columns = path, columns

    def rows(self) -> list[dict]:
        """Return all complete rows: numbers as float, empty cells as None."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a number that is cut short is still a number
        rows = []
        for row in csv.DictReader(io.StringIO(whole)):
            with contextlib.suppress(TypeError, ValueError):  # a full disk cut the row short
                numbers = {k: float(v) if v else None for k, v in row.items() if k != "stage"}
                if numbers.get("nimg") is not None:
                    rows.append({"stage": row["stage"], **numbers})
        return rows

    def keep(self, stage: str, nimg: int):
        """Drop the rows of `stage` after `nimg`: they will be measured again."""
        kept = [r for r in self.rows() if r["stage"] != stage or r["nimg"] <= nimg]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([self._printed(row) for row in kept])
        write_text(self.path, text.getvalue())

    def add(self, **values):
        """Append a row. If the disk is full, the row is lost with a warning."""
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writerow(self._printed(values))
        except OSError as problem:
            warn(f"a row of {self.path.name} was lost: {problem}")

    def _printed(self, row: dict) -> dict:
        return {k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()}


def check_writable(folder: Path):
    """Raise UserError (exit 7) before training if `folder` cannot be written.

    If the folder does not exist yet, its nearest existing parent is checked.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        probe = folder / f".probe.tmp{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as problem:
        raise cannot_write(folder / "results", problem) from None
