"""Opens a folder of brain slices, or the embedded set, as three splits by subject.

In: `Config`. Out: `Data` with three `BrainSlices` over one memory map uint8 (N,256,256), which
is made once per source and kept in the cache. Prints what was found. Stops (exit 3) if a score
on these data would be wrong.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import Config, Exit, UserError
from loading import embedded
from loading.cache import cached, check_skipped, decoded, ends_by_series, remove_stale
from loading.decoding import Unreadable, peak_16bit, read_file
from loading.sources import PARTS, Item, assign_parts, find, stable_hash
from support import distributed
from support.messages import printable, say, warn

MAP = 64  # cells on a side of an index map
PIXELS = 4  # on a side of a cell
STEP, LEAST = 8, 32  # cells: a crop's sides are multiples of STEP, and at least LEAST
DARK = 32  # of 255: a slice with under 1 % of brighter pixels is blank or black
PRIVATE = "from private data, do not publish"
SLICE_SPLIT = "split by slice, not by subject: every score is inflated"


class BrainSlices(torch.utils.data.Dataset):
    """One split of slices, with subject and slice level.

    images: uint8 (N,256,256), memory map of the whole source, shared by the splits.
    rows: int64 (n,), this split's rows of `images`.
    subjects: (n,) str.
    levels: float32 (n,), 0 for a subject's lowest slice to 1 for its highest; NaN if unknown.
    """

    def __init__(self, images, rows, subjects, levels):
        self.images = images
        self.rows = np.asarray(rows, np.int64)
        self.subjects = np.asarray(subjects, np.str_)
        self.levels = np.asarray(levels, np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        """Return a slice, float32 (1,256,256) in [0,1], and its level."""
        return self.batch([index])[0], float(self.levels[index])

    def brightest(self) -> np.ndarray:
        """Return each pixel's largest value in at most 4,096 slices: uint8 (256,256)."""
        seen = np.zeros(self.images.shape[1:], np.uint8)
        for row in self.rows[evenly(len(self), 4096)]:
            np.maximum(seen, self.images[row], out=seen)
        return seen

    def batch(self, indices) -> torch.Tensor:
        """Return the slices of these indices, float32 (B,1,256,256) in [0,1]."""
        pixels = self.images[self.rows[np.asarray(indices, np.int64)]]
        return unit_range(torch.from_numpy(pixels))


def unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B,H,W) -> float32 (B,1,H,W) in [0,1]."""
    return pixels.unsqueeze(1).float().div_(255)


@dataclass
class Data:
    """What `open_data` returns: three splits, the data report, and the stamp for figures."""

    train: BrainSlices
    validation: BrainSlices
    test: BrainSlices
    images: np.ndarray
    fingerprint: str
    stamp: str  # printed on every report and figure; "" for the embedded set
    report: dict  # plain JSON types


def evenly(n: int, count: int) -> np.ndarray:
    """Return at most `count` distinct indices of range(n), evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


class Crop(NamedTuple):
    """The rectangle of cells that holds all heads. Training and drawing are limited to it."""

    top: int = 0
    left: int = 0
    height: int = MAP
    width: int = MAP

    @classmethod
    def around(cls, seen: torch.Tensor) -> "Crop":
        """The smallest crop with all cells in which `seen` (h, w) bool is true."""
        sides = []
        for line in (seen.any(1), seen.any(0)):
            where, n = line.nonzero().flatten().tolist() or [0, len(line) - 1], len(line)
            length = where[-1] + 1 - where[0]
            length = min(n, max(LEAST, math.ceil(length / STEP) * STEP))
            start = (where[0] + where[-1] + 1 - length) // 2
            sides.append((min(max(0, start), n - length), length))
        (top, height), (left, width) = sides
        return cls(top, left, height, width)

    @classmethod
    def around_heads(cls, brightest: np.ndarray) -> "Crop":
        """The crop around all heads, from `BrainSlices.brightest`.

        A cell counts if its code depends on a pixel that is not black: its own 4x4 pixels, and
        3 more on each side: 1 for the first convolution, 2 for the second, at half the size.
        """
        seen = torch.from_numpy(brightest)[None].float()
        lit = torch.nn.functional.max_pool2d(seen, PIXELS + 6, PIXELS, padding=3)[0] > 0
        return cls.around(lit)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in cells."""
        return self.height, self.width

    def cut(self, x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """The crop of maps (.., h, w), or of images with `scale` pixels to a cell."""
        top, left, height, width = (scale * n for n in self)
        return x[..., top : top + height, left : left + width]

    def paste(self, inside: torch.Tensor, background: int) -> torch.Tensor:
        """The inverse of `cut` for index maps: (B, height, width) -> (B, 64, 64)."""
        maps = inside.new_full((len(inside), MAP, MAP), background)
        self.cut(maps)[:] = inside
        return maps


def open_data(config: Config) -> Data:
    """Find, check, decode and split the data of `config.data` ('' is the embedded set).

    The first process decodes, then all read. Raises UserError: exit 3 if the data are unusable,
    7 if the cache cannot be written.
    """
    remove_stale(Path(config.cache))
    opened = _open_folder if config.data else _open_embedded
    return distributed.first_then_all(lambda: opened(config))


def _open_embedded(config: Config) -> Data:
    people = [(part, i) for part, count in enumerate(config.subjects) for i in range(count)]
    settings = [embedded.VERSION, config.split_seed, config.slices, list(config.subjects)]
    fingerprint = stable_hash("embedded", settings)
    report = {"source": "embedded set (MNI152)", "root": ""}
    say(f"data: {report['source']}")

    def make(person):
        return embedded.subject_slices(config.split_seed, *person, config.slices)

    try:
        images, _ = cached(config, fingerprint, people, make, "making subjects")
    except ImportError as problem:
        raise UserError(Exit.DATA, f"no embedded set: {problem}; or give --data") from None
    report["split"] = "by construction"
    subjects = np.repeat([f"{PARTS[part]}-{i:04d}" for part, i in people], config.slices)
    parts = np.repeat([PARTS[part] for part, _ in people], config.slices)
    return _data(config, images, fingerprint, subjects, parts, subjects, report)


def _open_folder(config: Config) -> Data:
    items, report = find(Path(config.data), config)
    say(f"data: {len(items):,} files in {report['root']}, {report['source']}")
    _say_notes(report["notes"])  # who is a person: before minutes of decoding
    images, fingerprint, kept, counts = _decoded(config, items, report)
    report["split"], notes = assign_parts(kept, config)
    _add_notes(report, *notes)
    _check_pixels(images)
    columns = [i.subject for i in kept], [i.part or "" for i in kept], [i.series for i in kept]
    rows = [np.repeat(column, counts) for column in columns]
    return _data(config, images, fingerprint, *rows, report)


def _decoded(config: Config, items: list[Item], report: dict):
    """Decode the items; return images, fingerprint, the items that can be read, their slices.

    The others are added to the report.
    """
    images, fingerprint, table = decoded(config, items)
    skipped = check_skipped(config, items, table)
    report["skipped"] = [{"file": printable(n), "reason": why} for n, why in skipped.items()]
    kept = [i for i, row in zip(items, table, strict=True) if not isinstance(row, str)]
    counts = [row for row in table if not isinstance(row, str)]
    if labels := len(items) - len(kept) - len(skipped):
        report["ignored"]["label maps"] = labels
    return images, fingerprint, kept, counts


def open_slices(path: Path, config: Config, subjects: bool = True) -> BrainSlices:
    """All slices below a folder as one split.

    subjects False: slices that show nobody, each for itself and without a level. Raises
    UserError (exit 3) if the data are unusable.
    """
    config = replace(config, data=str(path))
    items, report = find(path, config, subjects)
    images, _, kept, counts = _decoded(config, items, report)
    names = np.repeat([item.subject if subjects else item.name for item in kept], counts)
    series = np.repeat([item.series for item in kept], counts)
    levels = _levels(series) if subjects else np.full(len(images), np.nan)
    who = f" of {len(set(names.tolist())):,} subjects" if subjects else ""
    say(f"{printable(path)}: {len(images):,} slices{who}")
    _say_notes(report["notes"])
    _say_left_out(report)
    return BrainSlices(images, np.arange(len(images)), names, levels)


def _check_pixels(images: np.ndarray):
    """Look at 256 slices and warn of odd ones. Raises UserError if most of them are black."""
    seen = np.array(images[evenly(len(images), 256)])
    black = float(((seen > DARK).mean(axis=(1, 2)) < 0.01).mean())
    brightest = int(seen.max())
    if black > 0.5:
        raise UserError(
            Exit.DATA,
            f"{black:.0%} of the decoded slices are blank or black (brightest pixel "
            f"{brightest} of 255): raise the grey levels of the files, or check what they hold",
        )
    if black > 0.1:
        warn(f"{black:.0%} of the decoded slices are blank or black; see decoded.png")
    if brightest < 128:
        warn(
            f"the brightest pixel of the decoded slices is {brightest} of 255; see decoded.png"
        )
    lit = seen[::4] > 0
    after_first = np.maximum.accumulate(lit, 2)
    before_last = np.maximum.accumulate(lit[..., ::-1], 2)[..., ::-1]
    between = after_first & before_last
    holes = float((between & ~lit).sum() / max(1, between.sum()))
    if holes > 0.4:
        warn(f"{holes:.0%} of the pixels inside the heads are black; see decoded.png")


def _data(config: Config, images, fingerprint: str, subjects, parts, series, report) -> Data:
    """Make the splits from the subject, part and series of every row of `images`."""
    levels = _levels(series)
    splits = {}
    for part in PARTS:
        mine = np.flatnonzero(parts == part)
        splits[part] = BrainSlices(images, mine, subjects[mine], levels[mine])
    report = {"skipped": [], "ignored": {}, "notes": []} | report
    report |= {
        "subjects": {part: len(set(splits[part].subjects.tolist())) for part in PARTS},
        "slices": {part: len(splits[part]) for part in PARTS},
        "fingerprint": fingerprint,
    }
    stamp = PRIVATE if config.data else ""
    if report["split"].startswith("by slice"):
        stamp += f"; {SLICE_SPLIT}"
    else:
        report["names"] = {p: sorted(set(splits[p].subjects.tolist())) for p in PARTS}
    if len(images) >= 64 and np.isnan(levels).all():
        _add_notes(
            report,
            "no slice levels: no two files are slices of one series, so --level cannot be used",
        )
    _describe(report)
    if stamp:
        say(f"  {stamp}")
    return Data(**splits, images=images, fingerprint=fingerprint, stamp=stamp, report=report)


def _levels(series: np.ndarray) -> np.ndarray:
    """Return each slice's height in its series, 0 to 1: float32 (n,); NaN if it is alone."""
    _, which, sizes = np.unique(series, return_inverse=True, return_counts=True)
    order = np.argsort(which, kind="stable")
    ranks = np.empty(len(series))
    ranks[order] = np.arange(len(series)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    with np.errstate(invalid="ignore"):
        return (ranks / (sizes[which] - 1)).astype(np.float32)  # 0 / 0 is NaN


def _describe(report: dict):
    """Print the splits and what was left out."""
    parts = (
        f"{part} {report['slices'][part]:,} slices of {report['subjects'][part]:,} subjects"
        for part in PARTS
    )
    guessed = any(note.startswith("subjects guessed") for note in report["notes"])
    overlap = "no overlap, if subjects are guessed right" if guessed else "no overlap"
    say(f"  {', '.join(parts)}; split {report['split']}, {overlap}")
    _say_left_out(report)


def _add_notes(report: dict, *notes: str):
    """Add notes to the report and print them."""
    report["notes"] += notes
    _say_notes(notes)


def _say_notes(notes: Iterable[str]):
    for note in notes:
        say(f"  {note}")


def _say_left_out(report: dict):
    """Print which files are ignored or skipped."""
    if report["ignored"]:
        say("  ignored: " + ", ".join(f"{n:,} {kind}" for kind, n in report["ignored"].items()))
    for skipped in report["skipped"][:5]:
        warn(f"skipped {skipped['file']}: {skipped['reason']}")
    if len(report["skipped"]) > 5:
        warn(f"and {len(report['skipped']) - 5} more files; data_report.json lists all")


def read_slices(path: str | Path, config: Config) -> np.ndarray:
    """Return all slices of a file or folder, without splits or cache: uint8 (n,256,256).

    Raises UserError (exit 3) if a file cannot be read.
    """
    path = Path(path)
    if os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path)):
        if path.suffix.lower() == ".img":  # nibabel opens the header, which names the pixels
            path = path.with_suffix(".HDR" if path.suffix == ".IMG" else ".hdr")
        items = [Item(str(path.parent), path.name, series=path.name)]
    else:
        items, _ = find(path, config, subjects=False)
    try:
        peak = max(peak_16bit(item.path) for item in items)
        ends_of, axis = ends_by_series(items, config.axis), config.axis
        return np.concatenate(
            [read_file(i.path, config.slices, axis, peak, set(), ends_of(i)) for i in items]
        )
    except (Unreadable, OSError) as problem:
        raise UserError(Exit.DATA, f"{path}: {problem}") from None
