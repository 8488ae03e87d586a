"""Decodes a source once into a memory map of slices, uint8 (N,256,256), kept in the cache.

A cache is two files named after the data's fingerprint: all slices in one .npy file, and a
table with each source file's number of slices, or the reason why it cannot be read.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import Config, Exit, UserError
from loading.decoding import (
    LABELS,
    SIDE,
    Ends,
    Unreadable,
    check_head_size,
    open_volume,
    peak_16bit,
    read_file,
    series_ends,
)
from loading.sources import LAYOUTS, Item, stable_hash
from support.files import is_orphan, mapped, replacing, write_json, write_npy_header
from support.messages import printable, progress, warn

CACHE_FORMAT = 2  # raise it if the same files would decode to other pixels


def decoded(config: Config, items: list[Item]) -> tuple[np.ndarray, str, list]:
    """Return the memory map of all slices, its fingerprint, and a table with a row per item.

    A row is the item's number of slices, or the reason why it cannot be read. The fingerprint
    covers every byte of the source, so a copy elsewhere is the same data.
    Reading every byte takes seconds, so the cache also stores the fingerprint of each listing
    (names, sizes, times).
    """
    cache, root = Path(config.cache), Path(config.data).resolve()
    if cache.resolve().is_relative_to(root):
        problem = f"the cache {cache} is inside --data {config.data}; give another --cache"
        raise UserError(Exit.DATA, problem)
    # Slices in volume files share the window of their series.
    series = [i.series for i in items if i.is_volume and i.series != i.name]
    settings = [CACHE_FORMAT, config.slices, config.axis, *series]
    seen = cache / f"{stable_hash(settings, str(root), _listing(items))}.seen"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # unseen, or damaged
        fingerprint = json.loads(seen.read_text(encoding="utf-8"))["fingerprint"]
        valid = re.fullmatch("[0-9a-f]{32}", str(fingerprint))
        if valid and (found := _load(cache / f"{fingerprint}.npy", len(items))):
            return found[0], fingerprint, found[1]
    check_skipped(config, items, [_header_problem(item, config.axis) for item in items])
    digests, peaks = zip(*_pooled(items, _survey, "reading"), strict=True)
    names = [item.name for item in items]
    fingerprint = stable_hash(settings, list(zip(names, digests, strict=True)))
    peak, greys = max(peaks), set()
    ends_of = ends_by_series(items, config.axis)

    def read(item: Item):
        return read_file(item.path, config.slices, config.axis, peak, greys, ends_of(item))

    def check(table: list):
        check_skipped(config, items, table)
        if len(greys) <= 8:  # named like images, these must not be trained on
            raise UserError(
                Exit.DATA,
                f"--data {config.data}: at most 8 grey values in all files, so these are "
                f"segmentations, not slices; {LAYOUTS}",
            )

    images, table = cached(config, fingerprint, items, read, "decoding", check)
    write_json(seen, {"fingerprint": fingerprint})
    return images, fingerprint, table


def _listing(items: list[Item]) -> list:
    """Return name, size, time and mode of every file; None for a missing or private file."""
    found = []  # flat, since ten thousand small lists would trigger garbage collection
    for item in items:
        found.append(item.name)
        try:
            for status in map(os.stat, item.files):
                found += status.st_size, status.st_mtime_ns, status.st_mode
        except OSError:
            found.append(None)
    return found


def ends_by_series(items: list[Item], axis: int) -> Callable[[Item], Ends | None]:
    """Return a function: the window of an item's series, if volume files hold single slices."""
    scans = defaultdict(list)
    for item in items:
        if item.is_volume and item.series != item.name:
            scans[item.series].append(item.path)
    return lambda item: series_ends(tuple(s), axis) if (s := scans.get(item.series)) else None


def _header_problem(item: Item, axis: int) -> int | str:
    """Return why an item's header cannot be used, else 0."""
    if item.is_volume:
        try:
            check_head_size(open_volume(item.path, axis))
        except Unreadable as problem:
            return str(problem)
    return 0


def _survey(item: Item) -> tuple[str, int]:
    """Return the hash of an item's bytes, and the largest value of a 16-bit image, else 0."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in item.files:
            if not os.path.isfile(path):  # a device may have no end
                raise OSError(f"{path} is not a file")
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        peak = peak_16bit(item.path)
    except (OSError, Unreadable):
        peak = 0
    return digest.hexdigest(), peak


def cached(config, fingerprint, jobs, work, label, check=None) -> tuple[np.ndarray, list]:
    """Return the memory map and table of a fingerprint; make them first if they are missing.

    work: makes the slices of one job, or raises Unreadable. check: raises UserError if a new
    table must not be kept.
    """
    path = Path(config.cache) / f"{fingerprint}.npy"
    if found := _load(path, len(jobs)):
        return found
    if path.exists():
        warn(f"the cache {path} is damaged or of other data; making it again")
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = _write_slices(temporary, jobs, work, label)
        if check:
            check(table)
    write_json(path.with_suffix(".json"), {"fingerprint": fingerprint, "table": table})
    found = _load(path, len(jobs))
    assert found, f"{path} cannot be read back"
    return found


def _write_slices(path: Path, jobs: list, work: Callable, label: str) -> list[int | str]:
    """Write the slices of all jobs to one .npy file; return a table with a row per job."""

    def attempt(job):
        try:
            return work(job)
        except Unreadable as problem:
            return str(problem)

    table = []
    with open(path, "wb") as file:
        write_npy_header(file, np.uint8, (0, SIDE, SIDE))
        for result in _pooled(jobs, attempt, label):
            if not isinstance(result, str):
                file.write(result.tobytes())
            table.append(result if isinstance(result, str) else len(result))
        file.seek(0)
        write_npy_header(file, np.uint8, (_count(table), SIDE, SIDE))  # same length as before
    return table


def _count(table: list[int | str]) -> int:
    return sum(row for row in table if not isinstance(row, str))


def _load(path: Path, jobs: int) -> tuple[np.ndarray, list] | None:
    """Return memory map and table, or None if they are missing, truncated or of other data."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        images, table = mapped(path), meta["table"]
        whole = images.shape == (_count(table), SIDE, SIDE) and images.dtype == np.uint8
        ours = meta["fingerprint"] == path.stem and len(table) == jobs
        return (images, table) if whole and ours else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError):
        return None


def remove_stale(cache: Path):
    """Delete temporary files that killed processes left in the cache.

    Another run may be writing to the cache now. Whether a process on another host is still
    running cannot be checked here, so its files are deleted after an hour.
    """
    for stale in cache.glob(".*.tmp*"):
        with contextlib.suppress(OSError):  # deleted by another run, or a read-only cache
            if is_orphan(stale) or stale.stat().st_mtime < time.time() - 3600:
                stale.unlink()


def _pooled(jobs: list, work: Callable, label: str) -> Iterator:
    """Yield results in the order of the jobs. Threads help since decoders release the GIL."""
    threads = min(4, os.cpu_count() or 1)  # each may hold a volume in memory
    ahead = 16 * threads
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(jobs), ahead)
        results = (r for s in starts for r in pool.map(work, jobs[s : s + ahead]))
        yield from progress(results, total=len(jobs), label=label)


def check_skipped(config: Config, items: list[Item], table: list) -> dict[str, str]:
    """Return {name: reason} of the unreadable files. Label maps are not counted.

    Raises UserError if they are more than 1 % of all files, or if there are any with --strict.
    """
    pairs = zip(items, table, strict=True)
    skipped = {
        i.name: row for i, row in pairs if isinstance(row, str) and not row.startswith(LABELS)
    }
    if skipped and (config.strict or len(skipped) > 0.01 * len(items)):
        name, reason = next(iter(skipped.items()))
        allowed = "--strict allows none" if config.strict else "1 % may be skipped"
        raise UserError(
            Exit.DATA,
            f"{len(skipped):,} of {len(items):,} files cannot be read ({allowed}), such as "
            f"{printable(name)}: {reason}; repair or remove them",
        )
    return skipped
