"""Every source of slices, opened as one kind of data set.

In: a folder of images or volumes as users have them, or nothing (the embedded set). Out: three
`BrainSlices`, split by subject, over one memory map uint8 (N,256,256) of all slices, which is
made once per source and kept in the cache. Says what was found, and stops (exit 3) where the
data would make a score wrong. Knows nothing of models.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import embedded
from config import Config, Exit, UserError
from decoding import SIDE, Unreadable, peak_16bit, read_file
from runtime import is_orphan, progress, replacing, say, warn, write_json, write_npy_header
from sources import LAYOUTS, PARTS, Item, assign_parts, find, printable, stable_hash

CACHE_FORMAT = 1  # raise it when the same files would decode to other pixels
PRIVATE = "contains training data, do not publish"
SLICE_SPLIT = "split by slice, not by subject: every score is inflated"


class BrainSlices(torch.utils.data.Dataset):
    """One split: slices (1,256,256) float32 in [0,1], with subject and slice level.

    images: uint8 (N,256,256), a memory map of the whole source, shared by the splits.
    rows: int64 (n,), this split's rows in `images`.
    subjects: (n,) str. levels: float32 (n,), 0 lowest to 1 highest slice of its subject, NaN
    where unknown.
    """

    def __init__(self, images, rows, subjects, levels):
        self.images = images
        self.rows = np.asarray(rows, np.int64)
        self.subjects = np.asarray(subjects, np.str_)
        self.levels = np.asarray(levels, np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        """Slice float32 (1,256,256) in [0,1], and its level."""
        return self.batch([index])[0], float(self.levels[index])

    def batch(self, indices) -> torch.Tensor:
        """Slices float32 (B,1,256,256) in [0,1] by their numbers in this split."""
        pixels = self.images[self.rows[np.asarray(indices, np.int64)]]
        return unit_range(torch.from_numpy(pixels))


def unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B,H,W) -> float32 (B,1,H,W) in [0,1]."""
    return pixels.unsqueeze(1).float().div_(255)


@dataclass
class Data:
    """What `open_data` found: the three splits, and what must be said about them."""

    train: BrainSlices
    validation: BrainSlices
    test: BrainSlices
    images: np.ndarray
    fingerprint: str
    embedded: bool
    stamp: str  # what every report and figure must carry; "" for the embedded set
    report: dict  # plain JSON types


def evenly(n: int, count: int) -> np.ndarray:
    """At most `count` different items of range(n), evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


# --- opening ------------------------------------------------------------------------------


def open_data(config: Config) -> Data:
    """Find, check, decode once and split what `config.data` names ('' is the embedded set).

    Raises UserError: exit 3 if the data are unusable, 7 if the cache cannot be written.
    """
    _remove_stale(Path(config.cache))
    return _open_folder(config) if config.data else _open_embedded(config)


def _open_embedded(config: Config) -> Data:
    people = [(part, i) for part, count in enumerate(config.subjects) for i in range(count)]
    settings = [embedded.VERSION, config.split_seed, config.slices, list(config.subjects)]
    fingerprint = stable_hash("embedded", settings)

    def make(person):
        return embedded.subject_slices(config.split_seed, *person, config.slices)

    try:
        images, _ = _cached(config, fingerprint, people, make, "making subjects")
    except ImportError as problem:
        raise UserError(Exit.DATA, f"no embedded set: {problem}; or give --data") from None
    report = {"source": "embedded set (MNI152)", "root": "", "split": "by construction"}
    names = [f"{PARTS[part]}-{i:04d}" for part, i in people]
    parts = [PARTS[part] for part, _ in people]
    rows = [np.repeat(column, config.slices) for column in (names, parts, names)]
    return _data(config, images, fingerprint, rows, report)


def _open_folder(config: Config) -> Data:
    root = Path(config.data)
    _check_cache_outside(config, root)
    items, report = find(root, config)
    images, fingerprint, table = _decoded(config, root, items)
    skipped = _check_skipped(config, items, table)
    report["skipped"] = [
        {"file": printable(name), "reason": reason} for name, reason in skipped.items()
    ]
    kept = [item for item in items if item.name not in skipped]
    pairs = zip(items, table, strict=True)
    counts = [count for item, count in pairs if item.name not in skipped]
    report["split"], notes = assign_parts(kept, config)
    report["notes"] += notes
    columns = [i.subject for i in kept], [i.part or "" for i in kept], [i.series for i in kept]
    rows = [np.repeat(column, counts) for column in columns]
    return _data(config, images, fingerprint, rows, report)


def _data(
    config: Config, images, fingerprint: str, rows: list[np.ndarray], report: dict
) -> Data:
    """Subject, part and series of every row of the memory map -> the three splits."""
    subjects, parts, series = rows
    levels = _levels(series)
    splits = {}
    for part in PARTS:
        mine = np.flatnonzero(parts == part)
        splits[part] = BrainSlices(images, mine, subjects[mine], levels[mine])
    report = {"skipped": [], "ignored": {}, "notes": []} | report
    report |= {
        "subjects": {part: len(set(splits[part].subjects.tolist())) for part in PARTS},
        "slices": {part: len(splits[part]) for part in PARTS},
        "overlap": [],  # anything else has ended the run by now
        "fingerprint": fingerprint,
    }
    stamps = [PRIVATE] if config.data else []
    stamps += [SLICE_SPLIT] if report["split"].startswith("by slice") else []
    stamp = "; ".join(stamps)
    data = Data(
        **splits,
        images=images,
        fingerprint=fingerprint,
        embedded=not config.data,
        stamp=stamp,
        report=report,
    )
    _describe(data)
    return data


def _levels(series: np.ndarray) -> np.ndarray:
    """Height of each slice in its series, 0 to 1: float32 (n,); NaN where it is alone."""
    _, which, sizes = np.unique(series, return_inverse=True, return_counts=True)
    order = np.argsort(which, kind="stable")
    ranks = np.empty(len(series))
    ranks[order] = np.arange(len(series)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    with np.errstate(invalid="ignore"):
        return (ranks / (sizes[which] - 1)).astype(np.float32)  # 0 / 0 is NaN


def _describe(data: Data):
    """A few lines on what was found; the whole story is in the report."""
    report = data.report
    say(f"data: {report['source']}" + (f" in {report['root']}" if report["root"] else ""))
    parts = (
        f"{part} {report['slices'][part]:,} slices of {report['subjects'][part]:,} subjects"
        for part in PARTS
    )
    say(f"  {', '.join(parts)}; split {report['split']}, no overlap")
    for note in report["notes"]:
        say(f"  {note}")
    if report["ignored"]:
        say("  ignored: " + ", ".join(f"{n:,} {kind}" for kind, n in report["ignored"].items()))
    for skipped in report["skipped"][:5]:
        warn(f"skipped {skipped['file']}: {skipped['reason']}")
    if len(report["skipped"]) > 5:
        warn(f"and {len(report['skipped']) - 5} more files skipped, all in the data report")
    if data.stamp:
        say(f"  {data.stamp}")


def read_slices(path: str | Path, config: Config) -> np.ndarray:
    """All slices of a file or folder, without subjects, splits or cache: uint8 (n,256,256).

    Raises UserError (exit 3) if any file of it cannot be read.
    """
    path = Path(path)
    if os.path.isfile(path):
        if path.suffix.lower() == ".img":  # its header says how to read it
            path = path.with_suffix(".HDR" if path.suffix == ".IMG" else ".hdr")
        items = [Item(str(path.parent), path.name)]
    else:
        items, _ = find(path, config, subjects=False)
    try:
        peak = max(peak_16bit(item.path) for item in items)
        read = [read_file(item.path, config.slices, config.axis, peak, set()) for item in items]
        return np.concatenate(read)
    except (Unreadable, OSError) as problem:
        raise UserError(Exit.DATA, f"{path}: {problem}") from None


# --- cache --------------------------------------------------------------------------------


def _check_cache_outside(config: Config, root: Path):
    if Path(config.cache).resolve().is_relative_to(root.resolve()):
        raise UserError(
            Exit.DATA, f"the cache {config.cache} would lie inside --data {root}; give --cache"
        )


def _decoded(config: Config, root: Path, items: list[Item]) -> tuple[np.ndarray, str, list]:
    """Memory map of all slices, fingerprint, and per item its number of slices or its fault.

    The fingerprint covers every byte of the source, so that a copy elsewhere is the same data.
    Reading every byte takes seconds, so the cache remembers which listing (names, sizes, times)
    had which fingerprint.
    """
    settings = [CACHE_FORMAT, config.slices, config.axis]
    listing = stable_hash(settings, str(root.resolve()), _listing(items))
    note = Path(config.cache) / f"{listing}.seen"
    fingerprint = _remembered(note)
    if fingerprint and (known := _load(config, fingerprint, len(items))):
        return known[0], fingerprint, known[1]
    digests, peaks = zip(*_pooled(items, _survey, "reading"), strict=True)
    names = [item.name for item in items]
    fingerprint = stable_hash(settings, list(zip(names, digests, strict=True)))
    peak, greys = max(peaks), set()

    def read(item: Item):
        return read_file(item.path, config.slices, config.axis, peak, greys)

    def check(table: list):
        _check_skipped(config, items, table)
        _check_greys(config, greys)

    images, table = _cached(config, fingerprint, items, read, "decoding", check)
    write_json(note, {"fingerprint": fingerprint})
    return images, fingerprint, table


def _listing(items: list[Item]) -> list:
    """Name, size and time of every file; a file that is gone or may not be read has none."""
    found = []  # flat: ten thousand small lists would call the garbage collector
    for item in items:
        found.append(item.name)
        try:
            for status in map(os.stat, item.files):
                found += status.st_size, status.st_mtime_ns, status.st_mode
        except OSError:
            found.append(None)
    return found


def _remembered(note: Path) -> str | None:
    try:
        fingerprint = json.loads(note.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return fingerprint if re.fullmatch("[0-9a-f]{32}", str(fingerprint)) else None


def _survey(item: Item) -> tuple[str, int]:
    """Hash of an item's bytes, and the largest value of a 16-bit image (else 0)."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in item.files:
            if not os.path.isfile(path):  # a device may have no end
                raise OSError(f"{path} is no file")
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        peak = peak_16bit(item.path)
    except (OSError, Unreadable):
        peak = 0
    return digest.hexdigest(), peak


def _cached(config, fingerprint, jobs, work, label, check=None) -> tuple[np.ndarray, list]:
    """The memory map and table of this fingerprint, made by `work` on each job if need be.

    `check` looks at the table before the new cache is kept.
    """
    if found := _load(config, fingerprint, len(jobs)):
        return found
    path = _cache_file(config, fingerprint)
    if path.exists():
        warn(f"the cache {path} is damaged or not ours; making it again")
    _prepare(path.parent)
    with replacing(path) as temporary:
        table = _write_slices(temporary, jobs, work, label)
        if check:
            check(table)
    write_json(path.with_suffix(".json"), {"fingerprint": fingerprint, "table": table})
    found = _load(config, fingerprint, len(jobs))
    assert found, f"{path} cannot be read back"
    return found


def _write_slices(path: Path, jobs, work, label: str) -> list[int | str]:
    """Write the slices of all jobs as one .npy file; returns each job's count or fault."""
    table = []
    with open(path, "wb") as file:
        write_npy_header(file, np.uint8, (0, SIDE, SIDE))
        for result in _pooled(jobs, functools.partial(_attempt, work), label):
            if not isinstance(result, str):
                file.write(result.tobytes())
            table.append(result if isinstance(result, str) else len(result))
        file.seek(0)
        count = sum(row for row in table if not isinstance(row, str))
        write_npy_header(file, np.uint8, (count, SIDE, SIDE))  # it has room for a longer axis
    return table


def _attempt(work, job) -> np.ndarray | str:
    try:
        return work(job)
    except Unreadable as problem:
        return str(problem)


def _load(config: Config, fingerprint: str, jobs: int) -> tuple[np.ndarray, list] | None:
    """The cache of this fingerprint, or None if it is absent, truncated or foreign."""
    path = _cache_file(config, fingerprint)
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        images = np.load(path, mmap_mode="r")
        table = meta["table"]
        count = sum(row for row in table if not isinstance(row, str))
        whole = images.shape == (count, SIDE, SIDE) and images.dtype == np.uint8
        ours = meta["fingerprint"] == fingerprint and len(table) == jobs
        return (images, table) if whole and ours else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError):
        return None


def _cache_file(config: Config, fingerprint: str) -> Path:
    return Path(config.cache) / f"{fingerprint}.npy"


def _prepare(path: Path):
    """Make the cache folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            Exit.WRITE, f"cannot make the cache {path}: {problem.strerror}"
        ) from None


def _remove_stale(cache: Path):
    """Clear what a killed process left in the cache; another run may be filling it now.

    Whether a process of another machine still runs nobody knows here: it has an hour.
    """
    for stale in cache.glob(".*.tmp*"):
        with contextlib.suppress(OSError):  # gone by now, or a cache that is only read
            if is_orphan(stale) or stale.stat().st_mtime < time.time() - 3600:
                stale.unlink()


def _pooled(jobs: list, work: Callable, label: str) -> Iterator:
    """Results in the order of the jobs, by threads a few ahead (decoders release the GIL)."""
    threads = min(4, os.cpu_count() or 1)  # each may hold a volume

    def results():
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(jobs), 16 * threads):
                yield from pool.map(work, jobs[start : start + 16 * threads])

    return iter(progress(results(), total=len(jobs), label=label))


def _check_skipped(config: Config, items: list[Item], table: list) -> dict[str, str]:
    """Names and faults of unreadable files: up to 1 % are skipped, none with --strict."""
    pairs = zip(items, table, strict=True)
    skipped = {item.name: fault for item, fault in pairs if isinstance(fault, str)}
    if skipped and (config.strict or len(skipped) > 0.01 * len(items)):
        name, reason = next(iter(skipped.items()))
        allowed = "--strict allows none" if config.strict else "1 % may be skipped"
        raise UserError(
            Exit.DATA,
            f"{len(skipped):,} of {len(items):,} files cannot be read ({allowed}), such as "
            f"{printable(name)}: {reason}; mend or remove them",
        )
    return skipped


def _check_greys(config: Config, greys: set[int]):
    """Segmentations whose names do not tell must not be learnt as images."""
    if len(greys) <= 8:
        raise UserError(
            Exit.DATA,
            f"--data {config.data}: at most 8 grey values in the whole source: these are "
            f"segmentations, not brains; {LAYOUTS}",
        )
