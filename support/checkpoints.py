"""Checkpoints: atomic saves, and loads that check everything and run no code from the file.

A checkpoint is one dict of tensors and plain values that `torch.load(weights_only=True)` reads.
"""

import contextlib
import errno
import io
import os
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from config import Exit, UserError
from support.device import is_out_of_memory
from support.files import cannot_write, replacing
from support.messages import warn

FORMAT = 4  # raised when this code could misread older checkpoints
OTHER_VERSION = "saved by another version of this project; choose another --out and train anew"


def save_checkpoint(path: Path, values: dict, keep_previous: bool = False):
    """Write a dict of tensors and plain values; `path` is a complete file at every moment.

    keep_previous: the file that was there becomes `<stem>_prev.pt`.
    Raises UserError: exit 6 if a number is not finite, exit 7 if the file cannot be written.
    """
    if name := _not_finite(values):
        raise UserError(
            Exit.DIVERGED, f"{path.name}: {name} is not finite; the last checkpoint is intact"
        )
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | values, buffer)
    try:
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # on disk before the old file is renamed
            try:
                _check_zip(temporary)
            except (ValueError, zipfile.BadZipFile):
                raise OSError(errno.EIO, "the written file reads back damaged") from None
            if keep_previous and path.exists():
                os.replace(path, previous_of(path))
    except UserError as problem:
        cause = problem.__cause__
        raise cannot_write(path, cause, buffer.getbuffer().nbytes) from cause


def previous_of(path: Path) -> Path:
    """Return the path of the checkpoint before: x_last.pt -> x_prev.pt."""
    return path.with_name(f"{path.stem.removesuffix('_last')}_prev{path.suffix}")


def load_checkpoint(path: Path, **expected) -> dict:
    """Read and check a checkpoint, which may be damaged or hostile. No code in it is run.

    expected: plain values that the file must hold. Raises UserError (exit 4) with the file and
    the reason: missing, cut short, a flipped byte, more than weights, another version, another
    run, or a value that is not finite.
    """
    try:
        _check_zip(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
        name = _not_finite(values)
        wrong = _mismatch(values, expected)
    except FileNotFoundError:
        raise UserError(
            Exit.CHECKPOINT, f"{path}: no such file; is the run finished? (driver.py continues)"
        ) from None
    except Exception as problem:
        if is_out_of_memory(problem):  # not the file's fault
            raise
        reason = " ".join(str(problem).split())[:120] or type(problem).__name__
        if "weights" in reason.lower():
            reason = "it holds more than tensors and plain values"
        raise UserError(Exit.CHECKPOINT, f"{path}: not a usable checkpoint: {reason}") from None
    if wrong or name:
        raise UserError(Exit.CHECKPOINT, f"{path}: {wrong or f'{name} is not finite'}")
    return values


def _mismatch(values, expected: dict) -> str:
    """Describe how a checkpoint differs from the expected values; "" if it matches."""
    if not isinstance(values, dict) or "format" not in values:
        return "not a checkpoint of this project"
    if values["format"] != FORMAT:
        return OTHER_VERSION
    for name, value in expected.items():
        if values.get(name) != value:
            return f"{name} is {differing(values.get(name), value)}"
    return ""


def load_last(path: Path, **expected) -> dict | None:
    """Load a stage's newest usable checkpoint: `path`, else the one before; None without files.

    A damaged file is renamed, with a warning. Raises UserError (exit 4) if files exist but none
    is usable.
    """
    problems = {}
    for candidate in (path, previous_of(path)):
        if not candidate.exists():
            continue
        try:
            values = load_checkpoint(candidate, **expected)
        except UserError as problem:
            problems[candidate] = str(problem)
            continue
        for damaged, reason in problems.items():
            kept = damaged.with_name(f"{damaged.stem}.damaged-{time.time_ns()}")
            os.replace(damaged, kept)
            warn(
                f"{reason}. Kept as {kept.name}; continuing from {candidate.name}, "
                f"{values.get('nimg', 0)} images seen"
            )
        return values
    if problems:
        reasons = "; ".join(problems.values())
        raise UserError(
            Exit.CHECKPOINT,
            f"{reasons}. Nothing was changed: move these files away to train the stage anew",
        )
    return None


def load_weights(module: torch.nn.Module, state: dict, path: Path) -> torch.nn.Module:
    """Load `state` into `module` and return it; exit 4 if the file does not fit."""
    with reading(path):
        module.load_state_dict(state)
    return module


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error about missing or ill-fitting contents of `path` into exit 4."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as problem:
        missing = "it lacks " if isinstance(problem, KeyError) else ""
        reason = missing + " ".join(str(problem).split())[:160]
        raise UserError(
            Exit.CHECKPOINT,
            f"{path}: its contents do not fit (saved by another version?): {reason}",
        ) from None


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file. It ties the files of one run to each other."""
    value = 0
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                value = zlib.crc32(part, value)
    except FileNotFoundError:
        raise UserError(
            Exit.CHECKPOINT, f"{path}: no such file; run the stage before"
        ) from None
    return value


def _check_zip(path: Path):
    """Raise ValueError unless the zip checksums are right: torch.load accepts flipped bytes.

    Compressed parts that unpack to more than the file's size could fill the memory.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its parts claim more bytes than it has")
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"checksum of {bad} is wrong")


def _tensors(values, name: str = "") -> Iterator[tuple[str, torch.Tensor | float]]:
    """Yield every tensor and float in nested dicts, lists and tuples, with its path."""
    if isinstance(values, torch.Tensor | float):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            yield from _tensors(value, f"{name}[{i}]")


def _not_finite(values) -> str:
    """Return the path of the first number that is not finite; "" if all are finite.

    Raises ValueError for a tensor that claims more numbers than are stored.
    """
    for name, value in _tensors(values):
        if isinstance(value, float):
            value = torch.tensor(value, dtype=torch.float64)
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} claims more numbers than it has")
        if value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return ""


def differing(found, wanted) -> str:
    """Describe the difference between two values, for an error message."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
        return "different in " + ", ".join(
            f"{k} ({found.get(k)!r} there, {wanted.get(k)!r} here)" for k in keys
        )
    return f"{found!r}, expected {wanted!r}"
