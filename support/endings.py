"""How a script ends: signals, exit codes, and one line on stderr that says what to do."""

import errno
import gc
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable

import torch

from config import Exit, UserError
from support import distributed
from support.device import is_out_of_memory, tame_malloc
from support.messages import say

OLDEST_TORCH = (2, 10)  # as in requirements.txt
TERMINATING = [signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # Slurm's usual warning; Windows does not have it
    TERMINATING.append(signal.SIGUSR1)
UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


class Interrupted(BaseException):
    """A signal ended the script after a save. No `except Exception` catches it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.code = Exit.INTERRUPTED if signum == signal.SIGINT else Exit.TERMINATED


class Signals:
    """While entered, the first signal or Ctrl-C sets a flag; the second Ctrl-C ends at once.

    A training loop calls `check` after every step, when it is safe to save and end.
    """

    def __enter__(self) -> "Signals":
        self.received: int | None = None
        caught = *TERMINATING, signal.SIGINT
        self.previous = {signum: signal.signal(signum, self._handle) for signum in caught}
        return self

    def __exit__(self, kind, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        if self.received is not None and kind is None:  # it came after the last check
            raise Interrupted(self.received)

    def _handle(self, signum, frame):
        if self.received is not None and signum == signal.SIGINT:
            os._exit(Exit.INTERRUPTED)  # safe: the last checkpoint is complete at any time
        self.received = signum

    def check(self, save: Callable[[], None]):
        """Save and raise Interrupted if a signal came to any process of the run."""
        if distributed.agreed(self.received is not None):
            save()
            raise Interrupted(self.received or signal.SIGTERM)


def run_script(main: Callable[[], None]):
    """Run `main` and exit with the code that fits its outcome.

    Errors that the user can fix are one line on stderr; a bug prints its traceback.
    """
    tame_malloc()
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow: a denoiser step took 1.35x
    gc.freeze()  # later collections skip all imported objects
    for signum in TERMINATING:
        signal.signal(signum, _terminated)
    code = int(_ending(main))
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # full or closed: Python would change the exit code to 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _terminated(signum, frame):
    raise Interrupted(signum)


def check_torch(version: str):
    """Raise UserError (exit 2) if this torch version is too old."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(
            Exit.USAGE, f"torch {version} is too old; {oldest} or newer is needed: "
            f"pip install --upgrade 'torch>={oldest}'",
        )  # fmt: skip


def _ending(main) -> Exit:
    """Run `main`, print the error if it fails, and return the exit code."""
    try:
        check_torch(torch.__version__)
        main()
        return Exit.DONE
    except distributed.Told as problem:
        return problem.code
    except UserError as problem:
        return _fail(problem.code, str(problem))
    except Interrupted as end:
        command = shlex.join(["python", *sys.argv])
        if distributed.count() > 1:
            command = "the same torchrun command"
        if distributed.is_first():
            say(f"stopped by {end}. To continue: {command}", stream=sys.stderr)
        return end.code
    except FloatingPointError as problem:
        return _fail(Exit.DIVERGED, f"{problem}; nothing was written")
    except KeyboardInterrupt:
        return _fail(Exit.INTERRUPTED, "interrupted")
    except Exception as problem:
        if isinstance(problem, OSError):
            if problem.errno in UNWRITABLE:
                name = problem.filename or "a temporary file"
                where = f"cannot write {name}: {problem.strerror}"
                return _fail(Exit.WRITE, f"{where}; make room or choose another --out")
        elif is_out_of_memory(problem):
            message = f"out of memory ({problem}); use a smaller batch or fewer samples"
            return _fail(Exit.MEMORY, message)
        say(traceback.format_exc(), stream=sys.stderr)
        return Exit.BUG


def _fail(code: Exit, message: str) -> Exit:
    who = "" if distributed.is_first() else f"process {distributed.rank()}: "
    say("error: " + who + " ".join(message.split()), stream=sys.stderr)
    return code
