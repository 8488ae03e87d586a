"""Results folders: which one a command writes to, which seeds it trains, one writer at a time.

A results folder holds config.json (settings, data fingerprint, first seed) and a folder seed-N
for each seed.
"""

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from config import Config, Exit, UserError
from support import distributed
from support.checkpoints import FORMAT, OTHER_VERSION, differing, reading
from support.files import check_writable, read_json, remove_temporaries, write_json
from support.messages import say, warn

RUNS = Path("runs")  # parent of the results folders of commands without --out
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # some network file systems

# --- one writer ---------------------------------------------------------------------------


@contextlib.contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Lock `folder` for this run, or raise UserError (exit 5) that names the present writer.

    The kernel holds the lock, so it ends with its process. lock.json names the owner. In a
    distributed run the first process holds the lock for all.
    """
    file = distributed.first_alone(lambda: _locked(folder))
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
        file.truncate()  # an empty file has no owner
        file.close()


def _locked(folder: Path):
    """Return the open and locked file lock.json, at its start."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock.json"
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, it stays open during the run
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


# --- which folder, which seeds ------------------------------------------------------------


def results_folder(
    config: Config, data_fingerprint: str, seed_given: bool = False, runs_given: bool = False
) -> tuple[Path, range]:
    """Return this command's results folder, made if it is new, and the seeds to train.

    Without --out the folder is runs/<preset>, or runs/<preset>-<hash> if runs/<preset> holds
    another run. With --seed, --runs or --out the seeds are fixed, so that the same command
    continues them. Otherwise it is one seed: the unfinished one, else the next one.
    Raises UserError (exit 4) if --out holds a run of other settings, data or version.
    """
    mine = {"config": config.identity(), "data": data_fingerprint}
    folder = Path(config.out) if config.out else _default_folder(config, mine)
    if (folder / "config.json").exists():
        first = _unless_another(folder, mine)["seed"]
    else:
        first = config.seed
        folder.mkdir(parents=True, exist_ok=True)
        about = {"seed": first, "preset": config.preset, "format": FORMAT}
        write_json(folder / "config.json", mine | about)
    if seed_given:
        first = config.seed
    elif not (config.out or runs_given):
        first = _next_seed(folder, first)
    return folder, range(first, first + config.runs)


def _default_folder(config: Config, mine: dict) -> Path:
    """Return runs/<preset>, or runs/<preset>-<hash> if other files or another run are there."""
    text = json.dumps(mine, sort_keys=True)
    short = hashlib.blake2b(text.encode()).hexdigest()[:6]
    folder, hashed = RUNS / config.preset, RUNS / f"{config.preset}-{short}"
    if hashed.exists():  # its runs continue there, even if runs/<preset> was deleted
        return hashed
    with contextlib.suppress(UserError):
        if (folder / "config.json").exists():
            _unless_another(folder, mine)
        else:
            _unless_foreign(folder, config)
        return folder
    return hashed


def _next_seed(folder: Path, first: int) -> int:
    """Return the lowest unfinished seed in the folder, else the seed after the highest one."""
    seeds, failed = seeds_in(folder), diverged(folder)
    for seed in seeds:
        if seed not in failed and not (folder / f"seed-{seed}" / "metrics.json").exists():
            say(f"continuing seed {seed} in {folder}")
            return seed
    if not seeds:
        return first
    say(f"the runs in {folder} are finished; adding seed {seeds[-1] + 1}")
    return seeds[-1] + 1


def seeds_in(folder: Path) -> list[int]:
    """Return the numbers of the seed-* folders in a results folder, in order."""
    names = [path.name.removeprefix("seed-") for path in folder.glob("seed-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def diverged(folder: Path) -> dict[int, dict]:
    """Return the rows of the seeds that diverged before; they would diverge again."""
    path = folder / "results.json"
    with contextlib.suppress(UserError), reading(path):
        rows = [row for row in read_json(path)["runs"] if row["status"] == "diverged"]
        return {row["seed"]: {"status": "diverged", "why": row["why"]} for row in rows}
    return {}


def check_out(config: Config):
    """Raise UserError if the results folder cannot take this run, before data are decoded.

    Exit 3 if it lies in --data (its figures would become data), 4 if --out holds another run, 5
    if it holds other files, 7 if it cannot be written.
    """
    folder = Path(config.out) if config.out else RUNS
    if config.data and folder.resolve().is_relative_to(Path(config.data).resolve()):
        raise UserError(
            Exit.DATA,
            f"the results {folder} are inside --data {config.data}; give another --out",
        )
    check_writable(folder)
    if config.out and (folder / "config.json").exists():
        _unless_another(folder, {"config": config.identity()})
    elif config.out:
        _unless_foreign(folder, config)


def _unless_another(folder: Path, mine: dict) -> dict:
    """Return a results folder's config.json. UserError (exit 4) if it differs from `mine`."""
    found = read_json(folder / "config.json")
    if "stamp" in found:
        raise UserError(
            Exit.CHECKPOINT,
            f"{folder} is the folder of one seed; give the results folder, {folder.parent}",
        )
    settings = found.get("config")
    same = isinstance(settings, dict) and settings.keys() == mine["config"].keys()
    same = same and found.get("format") == FORMAT and isinstance(found.get("seed"), int)
    if not same:
        raise UserError(Exit.CHECKPOINT, f"{folder / 'config.json'}: {OTHER_VERSION}")
    wrong = [
        f"{k} is {differing(found.get(k), v)}" for k, v in mine.items() if found.get(k) != v
    ]
    if wrong:
        raise UserError(
            Exit.CHECKPOINT,
            f"{folder} holds another run: {'; '.join(wrong)}. Choose another --out",
        )
    return found


def _unless_foreign(folder: Path, config: Config):
    """Raise UserError (exit 5) if a folder without config.json holds files of somebody else.

    A start that was killed leaves lock.json or temporary files. The cache may lie inside.
    """
    cache = Path(config.cache).resolve()
    for path in folder.iterdir() if folder.is_dir() else ():
        ours = path.name == "lock.json" or (path.name.startswith(".") and ".tmp" in path.name)
        if not ours and not cache.is_relative_to(path.resolve()):
            raise UserError(Exit.BUSY, f"{folder} holds other files; choose another --out")


def new_folder(parent: Path, name: str) -> Path:
    """Make and return `parent/name`, or `parent/name-2` ... if it exists. Safe in a race."""
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise UserError(Exit.WRITE, f"no free name for {parent / name}; choose another --out")
