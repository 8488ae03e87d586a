"""What a run needs of the machine: devices, memory, checkpoints, run folders, logs, signals.

Nothing in here knows what an image is. Its promises: a checkpoint on disk is whole or absent, a
run folder has one writer, and a script ends with the exit code that `config.Exit` names.
"""

import collections
import contextlib
import csv
import ctypes
import datetime
import errno
import functools
import gc
import io
import json
import os
import platform
import re
import shlex
import signal
import socket
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import processes
from config import Config, Exit, UserError

OLDEST_TORCH = (2, 10)  # as in requirements.txt
FORMAT = 1  # of checkpoints; raised when an older one could be misread

# --- messages -----------------------------------------------------------------------------

_open_logs: list[io.TextIOBase] = []


def say(message: str, *, stream=None):
    """One line to stdout and to run.log; characters that a terminal lacks become '?'."""
    if not (processes.is_first() or stream is sys.stderr):
        return
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "ascii"
    with contextlib.suppress(BrokenPipeError, OSError):  # a closed terminal ends no training
        print(
            str(message).encode(encoding, "replace").decode(encoding), file=stream, flush=True
        )
    log(message)


def log(message: str):
    """One line to run.log alone. A full disk loses the line, not the run."""
    for file in _open_logs:
        with contextlib.suppress(OSError):
            file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")
            file.flush()


def warn(message: str):
    """One line on stderr and in run.log about something odd that does not stop the run."""
    if not processes.is_first():
        return
    say(f"warning: {message}", stream=sys.stderr)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append every message to the file `path` (UTF-8) as well: those of the first process."""
    if not processes.is_first():
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
        with contextlib.suppress(OSError):  # of a full disk, as in `log`
            file.close()


class Progress:
    """A tqdm bar with ETA on a terminal; elsewhere a plain line every 30 seconds."""

    def __init__(self, total: int, label: str, unit: str = "it", done: int = 0):
        from tqdm import tqdm

        self.total, self.label, self.unit, self.done = total, label, unit, done
        self.start, self.at_start, self.spoken = time.monotonic(), done, time.monotonic()
        self.bar, self.silent = None, not processes.is_first()
        if not self.silent and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=label, unit=f" {unit}", unit_scale=True,
                dynamic_ncols=True,
            )  # fmt: skip

    def add(self, n: int):
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif not self.silent and time.monotonic() - self.spoken > 30:
            self.spoken = time.monotonic()
            rate = (self.done - self.at_start) / (self.spoken - self.start)
            left = (self.total - self.done) / rate if rate else 0
            line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.0f}/s, "
            with contextlib.suppress(OSError):  # as in `say`
                print(line + f"{left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def progress(items: Iterable, *, total: int, label: str, unit: str = "it") -> Iterator:
    """Iterate over `items` and show how far it is."""
    shown = Progress(total, label, unit)
    try:
        for item in items:
            yield item
            shown.add(1)
    finally:
        shown.close()


# --- endings ------------------------------------------------------------------------------


class Interrupted(BaseException):
    """A signal asked for an end, and all is saved. No `except Exception` catches it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.code = Exit.TERMINATED if signum == signal.SIGTERM else Exit.INTERRUPTED


class Signals:
    """While entered, the first SIGTERM or Ctrl-C only raises a flag; the second Ctrl-C kills.

    A training loop asks `check` after every step, when it is safe to save and leave.
    """

    def __enter__(self) -> "Signals":
        self.received: int | None = None
        self.previous = {
            s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, kind, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        if self.received is not None and kind is None:  # it came after the last look
            raise Interrupted(self.received)

    def _handle(self, signum, frame):
        if self.received is not None and signum == signal.SIGINT:
            os._exit(Exit.INTERRUPTED)  # the last checkpoint on disk is whole at any time
        self.received = signum

    def check(self, save: Callable[[], None]):
        """If a signal came, to this process or another of the run: save, raise Interrupted."""
        if processes.agreed(self.received is not None):
            save()
            raise Interrupted(self.received or signal.SIGTERM)


def run_script(main: Callable[[], None]):
    """Call `main` and end the process with the exit code of its ending.

    A mistake that the reader can mend is one line on stderr; a bug keeps its traceback.
    """
    tame_malloc()
    torch.set_flush_denormal(True)  # below 1e-38 a processor counts slowly: a denoiser's step
    # took 1.35 times as long, for probabilities that are nothing
    gc.freeze()  # what is imported stays: a data set's many names need no search through torch
    signal.signal(signal.SIGTERM, _terminated)
    with contextlib.suppress(AttributeError):  # an ASCII terminal prints '?', not a traceback
        sys.stdout.reconfigure(errors="replace")
        sys.stderr.reconfigure(errors="replace")
    code = int(_ending(main))
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # full or closed: Python would make the exit code 120 of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _terminated(signum, frame):
    raise Interrupted(signum)


UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def check_torch(version: str):
    """Raise UserError (exit 2) for a torch older than the code was written for."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(
            Exit.USAGE, f"torch {version} is too old, needed is {oldest}: "
            f"pip install --upgrade 'torch>={oldest}'",
        )  # fmt: skip


def _ending(main) -> Exit:
    try:
        check_torch(torch.__version__)
        main()
        return Exit.DONE
    except processes.Told as problem:
        return problem.code
    except UserError as problem:
        return _fail(problem.code, str(problem))
    except Interrupted as end:
        command = shlex.join(["python", *sys.argv])
        if processes.count() > 1:
            command = "the same torchrun command"
        if processes.is_first():
            say(f"stopped by {end}. To continue: {command}", stream=sys.stderr)
        return end.code
    except FloatingPointError as problem:
        return _fail(Exit.DIVERGED, f"{problem}; nothing was written")
    except KeyboardInterrupt:
        return _fail(Exit.INTERRUPTED, "interrupted")
    except OSError as problem:
        if problem.errno in UNWRITABLE:
            name = problem.filename or "a temporary file"
            where = f"cannot write {name}: {problem.strerror}"
            return _fail(Exit.WRITE, f"{where}; make room or choose another --out")
        return _bug()
    except Exception as problem:
        if is_out_of_memory(problem):
            return _fail(Exit.MEMORY, f"out of memory ({problem}); give less at a time")
        return _bug()


def is_out_of_memory(problem: Exception) -> bool:
    """torch has an error of its own for a GPU, and a RuntimeError for everything else."""
    words = ("can't allocate memory", "out of memory", "bad_alloc", "Insufficient memory")
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or any(
        word in str(problem) for word in words
    )


def _fail(code: Exit, message: str) -> Exit:
    who = "" if processes.is_first() else f"process {processes.rank()}: "
    say("error: " + who + " ".join(message.split()), stream=sys.stderr)
    return code


def _bug() -> Exit:
    say(traceback.format_exc(), stream=sys.stderr)
    return Exit.BUG


# --- processor and memory -----------------------------------------------------------------


def tame_malloc():
    """Let glibc keep large freed blocks instead of returning them to the kernel.

    A training step frees and asks for the same tens of megabytes again and again; the page
    faults of getting them back zeroed were half of its time. Does nothing elsewhere.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


def release_memory():
    """Hand free memory back after a stage, or each stage's peak would add up."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def choose_device(name: str) -> torch.device:
    """'auto' takes a GPU if there is one. Raises UserError (exit 2) for an absent one.

    Of several processes on one machine, each has a GPU of its own, or none has one.
    """
    if processes.count() > 1:
        mine = f"cuda:{processes.local()}"
        if name not in ("auto", "cuda", "cpu", mine):
            raise UserError(
                Exit.USAGE, f"--device {name}: several processes take cuda (one each) or cpu"
            )
        if name != "cpu" and torch.cuda.is_available():
            name = mine
        elif name == "auto":
            name = "cpu"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        mps = getattr(torch.backends, "mps", None)
        return torch.device("mps" if mps is not None and mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            Exit.USAGE,
            f"--device {name}: not available here; use cpu, or auto to take what there is"
            + ("" if torch.version.cuda else " (this torch was built without CUDA)"),
        ) from None
    return device


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of passes in `Config.precision`: a training step's, the denoiser's."""
    low = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False)


class Recorded:
    """A training step; on a GPU it is recorded, as a CUDA graph, and from then on replayed.

    These networks are small: launching their kernels one by one takes longer than running them.
    step(*inputs, **given): inputs are tensors of the same shapes in each call, and are copied
    to where the record reads them; each `given`, plain values, has a record of its own. All
    else that the step reads (weights, optimisers' state and rates, by `train.set_lr`) must stay
    where it lies. It asks the device for nothing, and draws no random numbers there. What it
    returns is overwritten by the next call. Elsewhere, or with several processes, it is just
    called.
    """

    WARM = 3  # calls before a record: libraries start up, optimisers make their state

    def __init__(self, step: Callable):
        self.step, self.calls, self.records = step, collections.Counter(), {}
        self.stream = None

    def __call__(self, *inputs: torch.Tensor, **given):
        if inputs[0].device.type != "cuda" or processes.count() > 1:
            return self.step(*inputs, **given)
        key = tuple(given.items())
        self.calls[key] += 1
        if self.calls[key] <= self.WARM:
            return self.aside(inputs, given)
        if key not in self.records:
            self.records[key] = self.record(inputs, given)
        places, graph, values = self.records[key]
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return values

    def aside(self, inputs, given):
        """The step on a stream of its own, as a record wants what came before it."""
        here = torch.cuda.current_stream()
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            values = self.step(*inputs, **given)
        here.wait_stream(self.stream)
        return values

    def record(self, inputs, given):
        """Where the inputs are to be copied to, the graph, and where its values will lie."""
        places, graph = [torch.empty_like(x) for x in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # runs nothing
            values = self.step(*places, **given)
        return places, graph, values


# --- files --------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, atomically.

    On failure the temporary file is removed and `path` is as it was. Raises UserError (exit 7)
    if the disk is full or not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}@{socket.gethostname()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as problem:
        raise _cannot_write(path, problem) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path):
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _cannot_write(path: Path, problem: OSError, needed: int | None = None) -> UserError:
    free = None
    with contextlib.suppress(OSError, AttributeError):
        stats = os.statvfs(path.parent)
        free = stats.f_bavail * stats.f_frsize
    space = f", {free / 1e6:.1f} MB free" if free is not None else ""
    space += f", {needed / 1e6:.1f} MB needed" if needed is not None else ""
    return UserError(
        Exit.WRITE,
        f"cannot write {path}: {problem.strerror or problem}{space}; what was there is intact. "
        "Make room, or choose another --out or --cache",
    )


def remove_temporaries(folder: Path):
    """Delete what a killed process left half-written in a folder of results or of one seed."""
    for place in ("", "figures/", "seed-*/", "seed-*/figures/"):
        for stale in folder.glob(f"{place}.*.tmp*"):
            stale.unlink(missing_ok=True)


def is_orphan(temporary: Path) -> bool:
    """Whether the process that began this file of `replacing` ran here and has ended."""
    pid, _, host = temporary.name.rpartition(".tmp")[2].partition("@")
    if os.name != "posix" or host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)  # asks, and sends nothing
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def write_npy_header(file, dtype, shape: tuple[int, ...]):
    """Begin a .npy file that is written part by part, never sparse: a full disk is an error."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_text(path: Path, text: str):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict):
    """Strict JSON: a NaN in it would be a wrong score, and is a FloatingPointError."""
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except ValueError:
        raise FloatingPointError(f"{path}: a score is not finite") from None
    write_text(path, text + "\n")


def read_json(path: Path) -> dict:
    """Raises UserError (exit 4) if `path` is missing or is not a JSON object."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(Exit.CHECKPOINT, f"{path}: {problem}; is this a run folder?") from None
    if not isinstance(values, dict):
        raise UserError(Exit.CHECKPOINT, f"{path}: not a JSON object; is this a run folder?")
    return values


@contextlib.contextmanager
def warning_only(what: str) -> Iterator[None]:
    """Pictures and pages never end a run: a failure is a warning, its traceback in run.log."""
    try:
        yield
    except Exception as problem:
        warn(f"{what} failed: {type(problem).__name__}: {problem}")
        log(traceback.format_exc())


def save_figure(path: Path, make: Callable[[], object]):
    """Draw and save a matplotlib Figure; a failure is a warning."""
    with warning_only(f"drawing {path.name}"), replacing(path) as temporary:
        make().savefig(temporary, format="png")


class Log:
    """log.csv: one row per measurement, columns fixed, empty where nothing was measured."""

    def __init__(self, path: Path, columns: tuple[str, ...] = ()):
        self.path, self.columns = path, columns

    def rows(self) -> list[dict]:
        """All whole rows; numbers as float, empty cells as None."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # half of a last number would be a number, too
        rows = [self._parsed(row) for row in csv.DictReader(io.StringIO(whole))]
        return [row for row in rows if row is not None]

    def _parsed(self, row: dict) -> dict | None:
        """None for a row that a full disk cut short."""
        try:
            numbers = {k: float(v) if v else None for k, v in row.items() if k != "stage"}
        except (TypeError, ValueError):
            return None
        return {"stage": row["stage"], **numbers} if numbers.get("nimg") is not None else None

    def keep(self, stage: str, nimg: int):
        """Drop the rows of `stage` after `nimg`: they will be measured again."""
        kept = [r for r in self.rows() if r["stage"] != stage or r["nimg"] <= nimg]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([self._printed(row) for row in kept])
        write_text(self.path, text.getvalue())

    def add(self, **values):
        """Append a row. A full disk loses the row with a warning, not the run."""
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(
                    self._printed(values)
                )
        except OSError as problem:
            warn(f"a row of {self.path.name} was lost: {problem}")

    def _printed(self, row: dict) -> dict:
        return {k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()}


# --- checkpoints --------------------------------------------------------------------------


def save_checkpoint(path: Path, values: dict, keep_previous: bool = False):
    """Write a dict of tensors and plain types so that `path` is whole at every moment.

    keep_previous: the file that was there becomes `<stem>_prev.pt`.
    Raises UserError: exit 6 if a number is not finite, 7 if it cannot be written.
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
                os.fsync(file.fileno())  # before the old one is renamed
            try:
                _check_zip(temporary)
            except (ValueError, zipfile.BadZipFile):
                raise OSError(errno.EIO, "what was written reads back damaged") from None
            if keep_previous and path.exists():
                os.replace(path, previous_of(path))
    except UserError as problem:
        cause = problem.__cause__
        raise _cannot_write(path, cause, buffer.getbuffer().nbytes) from cause


def previous_of(path: Path) -> Path:
    return path.with_name(f"{path.stem.removesuffix('_last')}_prev{path.suffix}")


def load_checkpoint(path: Path, **expected) -> dict:
    """Read a checkpoint that may be damaged or hostile; no code in it is run.

    expected: plain values that the file must hold. Raises UserError (exit 4) that names the
    file and the reason: missing, cut short, a flipped byte, not weights only, another format,
    another kind of run, or a value that is not finite.
    """
    try:
        _check_zip(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
        name = _not_finite(values)
        wrong = _other_values(values, expected)
    except FileNotFoundError:
        raise UserError(
            Exit.CHECKPOINT,
            f"{path}: no such file; is the run finished? (driver.py continues)",
        ) from None
    except Exception as problem:
        if is_out_of_memory(problem):  # no fault of the file
            raise
        reason = " ".join(str(problem).split())[:120] or type(problem).__name__
        if "weights" in reason.lower():
            reason = "it holds more than tensors and plain values"
        raise UserError(Exit.CHECKPOINT, f"{path}: not a usable checkpoint: {reason}") from None
    if wrong or name:
        raise UserError(Exit.CHECKPOINT, f"{path}: {wrong or f'{name} is not finite'}")
    return values


def _other_values(values, expected: dict) -> str:
    """In what a checkpoint differs from what is wanted; "" if in nothing."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return "not a checkpoint of this version"
    for name, value in expected.items():
        if values.get(name) != value:
            return f"{name} is {_differing(values.get(name), value)}"
    return ""


def load_last(path: Path, **expected) -> dict | None:
    """The newest usable checkpoint of a training stage: `path`, else its predecessor.

    None if there is neither. A damaged file is kept under another name, with a warning.
    Raises UserError (exit 4) if files are there but none is usable.
    """
    problems = []
    for candidate in (path, previous_of(path)):
        if not candidate.exists():
            continue
        try:
            values = load_checkpoint(candidate, **expected)
        except UserError as problem:
            problems.append((candidate, str(problem)))
            continue
        for damaged, reason in problems:
            kept = damaged.with_name(f"{damaged.stem}.damaged-{time.time_ns()}")
            os.replace(damaged, kept)
            warn(
                f"{reason}. Kept as {kept.name}; continuing from {candidate.name}, "
                f"{values.get('nimg', 0)} images seen"
            )
        return values
    if problems:
        raise UserError(
            Exit.CHECKPOINT,
            "; ".join(reason for _, reason in problems)
            + ". Nothing was changed: move these files away to train the stage anew",
        )
    return None


def load_weights(module: torch.nn.Module, state: dict, path: Path) -> torch.nn.Module:
    """`load_state_dict` whose failure is exit 4 and names the file; returns the module."""
    with reading(path):
        module.load_state_dict(state)
    return module


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A checkpoint of the right kind may still lack a part, or hold another one: exit 4."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as problem:
        lacks = "it lacks " if isinstance(problem, KeyError) else ""
        reason = lacks + " ".join(str(problem).split())[:160]
        raise UserError(
            Exit.CHECKPOINT,
            f"{path}: what it holds does not fit (made by another version?): {reason}",
        ) from None


def checksum(path: Path) -> int:
    """CRC-32 of a file: ties the files of one run to each other."""
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
    """torch.load takes a flipped byte for granted; the zip container has checksums.

    Parts that together are larger than the file would fill the memory.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its parts claim more bytes than it has")
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"checksum of {bad} is wrong")


def _tensors(values, name: str = "") -> Iterator[tuple[str, torch.Tensor | float]]:
    """Every tensor and float in nested dicts, lists and tuples, with its path."""
    if isinstance(values, torch.Tensor | float):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            yield from _tensors(value, f"{name}[{i}]")


def _not_finite(values) -> str:
    """The path of the first number that is not finite; "" if all are.

    Raises ValueError for a tensor that claims more numbers than are stored.
    """
    for name, value in _tensors(values):
        value = torch.as_tensor(
            value, dtype=torch.float64 if isinstance(value, float) else None
        )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} claims more numbers than it has")
        if value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return ""


def _differing(found, wanted) -> str:
    """What differs between two values, for an error message."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
        return "different in " + ", ".join(
            f"{k} ({found.get(k)!r} there, {wanted.get(k)!r} here)" for k in keys
        )
    return f"{found!r}, expected {wanted!r}"


# --- run folders --------------------------------------------------------------------------


@contextlib.contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder`, or raise UserError (exit 5) that names the other one.

    Of several processes of one run, the first one is it.

    The lock is the kernel's, on a file that names its owner: a killed owner's lock is free.
    """
    file = processes.first_alone(lambda: _locked(folder))
    if file is None:
        yield
        return
    try:
        before = file.read()
        if before:
            say(f"took over the lock of a process that ended: {before.strip()}")
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()
        remove_temporaries(folder)
        yield
    finally:
        file.seek(0)
        file.truncate()  # an empty file: nobody's
        file.close()


NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # some networked file systems


def _locked(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock.json"
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, held for the run's duration
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in NO_LOCKS:
            warn(f"{path}: this file system has no locks; let one process write here at a time")
            return file
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            Exit.BUSY, f"{path.parent} is being written by {owner}; wait for it or use --out"
        ) from None
    file.seek(0)
    return file


def results_folder(config: Config, data: str, seed_given: bool) -> tuple[Path, int]:
    """Where this command's results go, and its first seed.

    With `--out`: that folder, if it is new or of equal configuration and data. Without: the
    newest unfinished folder of equal configuration and data; if there is none, a new one, and
    the next seed unless one was given. Raises UserError (exit 4) for a folder of another
    configuration or other data.
    """
    mine = {"config": config.identity(), "data": data}
    if config.out:
        folder, seed = Path(config.out), config.seed
        if (folder / "config.json").exists():
            found = _unless_another(folder, mine)
            return folder, seed if seed_given else found["seed"]
        folder.mkdir(parents=True, exist_ok=True)
    else:
        alike = _folders_alike(Path("runs"), mine)
        for folder, found in alike:
            open_end = not _is_finished(folder, config.runs)
            if open_end and (not seed_given or found["seed"] == config.seed):
                say(f"continuing {folder}; a new run: --out runs/NAME")
                return folder, found["seed"]
        seeds = [_last_seed(folder) for folder, _ in alike]
        seed = config.seed if seed_given else max(seeds, default=-1) + 1
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{config.preset}"
        folder = new_folder(Path("runs"), name)
    write_json(folder / "config.json", {**mine, "seed": seed, "preset": config.preset})
    return folder, seed


def check_out(config: Config):
    """Raise UserError before data are made if `--out` cannot take this run.

    Exit 4 for a folder of another configuration, 5 for one of other files, 7 if it cannot be
    written. A cache may be made in it later.
    """
    folder = Path(config.out or "runs")
    check_writable(folder)
    if config.out and (folder / "config.json").exists():
        _unless_another(folder, {"config": config.identity()})
    elif (
        config.out
        and folder.is_dir()
        and any(_is_foreign(path, Path(config.cache)) for path in folder.iterdir())
    ):
        raise UserError(Exit.BUSY, f"{folder} holds other files; choose another --out")


def _unless_another(folder: Path, mine: dict) -> dict:
    """config.json of a results folder. UserError (exit 4) if it differs from `mine`."""
    found = read_json(folder / "config.json")
    if "stamp" in found:
        raise UserError(
            Exit.CHECKPOINT,
            f"{folder} is the folder of one seed; give the results folder, {folder.parent}",
        )
    wrong = [
        f"{k} is {_differing(found.get(k), v)}" for k, v in mine.items() if found.get(k) != v
    ]
    if wrong:
        raise UserError(
            Exit.CHECKPOINT,
            f"{folder} holds another run: {'; '.join(wrong)}. Choose another --out",
        )
    return found


def _is_foreign(path: Path, cache: Path) -> bool:
    """Whether a file in a folder without config.json is somebody's.

    A killed start leaves others, and the cache may lie there.
    """
    ours = path.name == "lock.json" or (path.name.startswith(".") and ".tmp" in path.name)
    return not ours and not cache.resolve().is_relative_to(path.resolve())


def _folders_alike(parent: Path, mine: dict) -> list[tuple[Path, dict]]:
    """Results folders of equal configuration and data, the newest first."""
    alike = []
    paths = sorted(parent.glob("*/config.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in paths:
        with contextlib.suppress(UserError):
            found = read_json(path)
            if {key: found.get(key) for key in mine} == mine and isinstance(
                found.get("seed"), int
            ):
                alike.append((path.parent, found))
    return alike


def _is_finished(folder: Path, runs: int) -> bool:
    with contextlib.suppress(UserError):
        results = read_json(folder / "results.json")
        ended = [row for row in results.get("runs", []) if row.get("status") != "unfinished"]
        return bool(results.get("finished")) and len(ended) >= runs
    return False


def _last_seed(folder: Path) -> int:
    names = [p.name.removeprefix("seed-") for p in folder.glob("seed-*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def check_writable(folder: Path):
    """Raise UserError (exit 7) now rather than after hours of training.

    A folder that does not exist yet is tried in its nearest parent that does.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        probe = folder / f".probe.tmp{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as problem:
        raise _cannot_write(folder / "results", problem) from None


def new_folder(parent: Path, name: str) -> Path:
    """Make `parent/name`, or `parent/name-2` ... if it exists; safe against a race."""
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as problem:
            raise _cannot_write(folder, problem) from None
    raise UserError(Exit.WRITE, f"no free name for {parent / name}")


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB (0 where it cannot be known)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
