"""What lies below a folder: which files are slices, whose they are, and in which split.

In: a folder as users have it. Out: `Item`s in natural order, each with its subject and split,
and the beginning of a report. Looks at names alone, never at pixels. Stops (exit 3) where a
person would be in two splits, or where nobody can tell.
"""

import functools
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config import Config, Exit, UserError
from decoding import IMAGES, VOLUMES

PARTS = ("train", "validation", "test")
SLICE_KEY = "slice:"  # begins the stand-in for a subject that is unknown
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_NUMBER = re.compile(r"(\d+)")
_LAST_NUMBER = re.compile(r"(.*\D)?\d+(\D*)", re.S)  # and what lies before and after it
LAYOUTS = """accepted are folders that hold, at any depth,
  PNG or JPEG slices whose path names the subject (case_001_slice_0.nii.png, OAS1_0001_...,
    sub-01_..., or one folder per subject), with or without train/validate/test folders;
  OASIS-1 sessions (OAS1_*/PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr with .img);
  NIfTI volumes (*.nii, *.nii.gz), as in OASIS-3, BIDS or neurite trees.
Segmentations do not count."""
SHEETS = ("grid.png", "strip.png", "comparison.png")  # of predict.py, beside its slices


@dataclass(slots=True)
class Item:
    """One file that holds an image or a volume, and what its path says."""

    root: str
    name: str  # relative to the root, with slashes
    subject: str | None = None
    part: str | None = None  # from a folder named train, validate, test ...

    @property
    def path(self) -> Path:
        return Path(self.root, self.name)

    @property
    def is_volume(self) -> bool:
        return self.name.lower().endswith(VOLUMES)

    @property
    def series(self) -> str:
        """What the slices of a scan share: the volume, or the path without its last number."""
        if self.is_volume or self.subject.startswith(SLICE_KEY):
            return self.name
        match = _LAST_NUMBER.fullmatch(self.name)
        return (match[1] or "") + match[2] if match else self.name

    @property
    def files(self) -> list[str]:
        """The file, and the pixels beside it where a header (.hdr) has its own file."""
        path = f"{self.root}/{self.name}"
        if not path.lower().endswith(".hdr"):
            return [path]
        return [path, path[:-4] + (".IMG" if path.endswith(".HDR") else ".img")]


def printable(name: str | Path) -> str:
    """A path that any log can hold: bytes that are not UTF-8 become '?'."""
    return str(name).encode("utf-8", "replace").decode("utf-8")


def stable_hash(*parts) -> str:
    """A short name for plain values: the same on every machine."""
    text = json.dumps(parts, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- finding ------------------------------------------------------------------------------

_JUNK = re.compile(r"\.|__macosx$|thumbs\.db$|desktop\.ini$", re.I)
_SEGMENTATION = re.compile(
    r"(?<![a-z])(?:[adf]?seg(?:s|ment\w*)?|probseg|labels?|(?:brain)?masks?|aparc)\d*(?![a-z])",
    re.I,
)
_SEGMENTATION_WORDS = ("seg", "label", "mask", "aparc")  # one of which each match contains
_SESSION = re.compile(r"OAS1_\d{4}_MR\d", re.I)
# Where a tree holds several versions of each scan, the first of these that occurs is used.
_PREFERRED = (
    ("OASIS-1 in Talairach space", re.compile(r"_t88_masked_gfc\.hdr$", re.I)),
    ("T1-weighted volumes (BIDS)", re.compile(r"_T1w\.nii(\.gz)?$", re.I)),
    ("neurite OASIS volumes", re.compile(r"(^|/)aligned_norm\.nii(\.gz)?$", re.I)),
    ("neurite OASIS slices", re.compile(r"(^|/)slice_norm\.nii(\.gz)?$", re.I)),
)


def find(root: Path, config: Config, subjects: bool = True) -> tuple[list[Item], dict]:
    """Images or volumes below `root` in natural order, and the beginning of the report."""
    if not os.path.isdir(root):  # Path.is_dir raises where a folder above may not be read
        there = os.path.exists(root)
        problem = "is a file, not a folder" if there else "does not exist, or may not be read"
        if root.suffix.lower() in ARCHIVES:
            problem += ": unpack it, and give the folder"
        raise UserError(Exit.DATA, f"--data {printable(root)} {problem}; {LAYOUTS}")
    ignored, sessions = Counter(), set()
    names = sorted(sorted(_walk(root, ignored, sessions)), key=_natural)  # ties: z1, z01
    names, kind = _choose(names, ignored)
    if not names:
        there = ", ".join(f"{n:,} {kind}" for kind, n in ignored.items()) or "nothing"
        raise UserError(Exit.DATA, f"no slices in --data {root} (it holds {there}); {LAYOUTS}")
    items = [Item(str(root), name, part=_part(name.rpartition("/")[0])) for name in names]
    if subjects:
        assign_subjects(items, config)
    notes = []
    if kind.startswith("OASIS-1"):
        found = {match.group().upper() for match in map(_SESSION.search, names) if match}
        notes.append(f"found {len(found)} of {len(sessions | found)} sessions")
    ignored = {printable(what): count for what, count in ignored.items()}
    report = {"source": kind, "root": printable(root), "ignored": ignored, "notes": notes}
    return items, report


def _walk(root: Path, ignored: Counter, sessions: set) -> Iterator[str]:
    """Names of the images and volumes below `root`; everything else is counted in `ignored`."""
    seen, folders = set(), [("", False)]
    while folders:
        folder, is_segmentation = folders.pop()
        place = root / folder
        try:
            status = place.stat()
        except OSError:  # a path that is too long, or gone
            ignored["unreadable folders"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:  # a loop of symbolic links
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(place, ignored):
            name, lower = entry.name, entry.name.lower()
            segmentation = is_segmentation or _is_segmentation(lower)
            below = f"{folder}/{name}" if folder else name
            if _JUNK.match(name):
                ignored["system files"] += 1
            elif _is_folder(entry):
                folders.append((below, segmentation))
                sessions.update(match.upper() for match in _SESSION.findall(name))
            elif not lower.endswith(IMAGES + VOLUMES):
                if not lower.endswith(".img"):  # counted with its .hdr
                    ignored[f"{Path(lower).suffix or 'other'} files"] += 1
            elif _is_device(entry):  # a pipe would be waited for forever
                ignored["devices and pipes"] += 1
            elif segmentation:
                ignored["segmentations"] += 1
            elif name in SHEETS:
                ignored["contact sheets"] += 1
            else:
                yield below


def _is_segmentation(lower: str) -> bool:
    """Whether a name says so. A look for the words alone spares most names the pattern."""
    for word in _SEGMENTATION_WORDS:
        if word in lower:
            return bool(_SEGMENTATION.search(lower))
    return False


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_device(entry: os.DirEntry) -> bool:
    try:  # what a plain file is the folder's listing says, without a look at the file
        return not (entry.is_file(follow_symlinks=False) or stat.S_ISREG(entry.stat().st_mode))
    except OSError:  # a link to nowhere: as a file that cannot be read
        return False


def _entries(folder: Path, ignored: Counter) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        ignored["unreadable folders"] += 1
        return []


def _choose(names: list[str], ignored: Counter) -> tuple[list[str], str]:
    """One version of every scan, and what the source is called."""
    volumes = [name for name in names if name.lower().endswith(VOLUMES)]
    chosen, kind = (volumes, "volumes") if volumes else (names, "images")
    for preferred, pattern in _PREFERRED:
        if matching := [name for name in volumes if pattern.search(name)]:
            chosen, kind = matching, preferred
            break
    if len(chosen) < len(names):
        ignored["other versions of the scans"] += len(names) - len(chosen)
    chosen, runs = _first_runs(chosen), len(chosen)
    if len(chosen) < runs:
        ignored["repeated runs of a session"] += runs - len(chosen)
    return chosen, kind


def _first_runs(names: list[str]) -> list[str]:
    """BIDS runs of one session are the same head again: keep the first."""
    first = {}
    for name in names:
        without = re.sub(r"_run-\w+?(?=_)", "", name) if "_run-" in name else name
        first.setdefault(without, name)
    return list(first.values())


def _natural(name: str) -> list:
    """slice_2 before slice_10."""
    parts = _NUMBER.split(name)  # texts and numbers in turn
    parts[1::2] = map(int, parts[1::2])
    return parts


# --- subjects and splits ------------------------------------------------------------------

_SUBJECT = re.compile(
    r"(?<![a-z0-9])(?:(?:sub-)?(OAS[12]_\d{4}|OAS[34]\d{4})|(sub-[a-z0-9]+)"
    r"|((?:subject|subj|sub|patient|case)[-_ ]?\d+))",
    re.I,
)
_PART = re.compile(
    r"(?:^|[-_ ])(?:(train(?:ing)?)|(val(?:id(?:ate|ation)?)?)|(test(?:ing)?))(?=$|[-_ ])", re.I
)


@functools.cache
def _part(folders: str) -> str | None:
    """The split that a folder of the path is named after."""
    for folder in folders.split("/"):
        if match := _PART.search(folder):
            return PARTS[match.lastindex - 1]
    return None


def assign_subjects(items: list[Item], config: Config):
    """Give every item its subject, from the path alone.

    The same person scanned twice (MR1, MR2, sessions, runs, repeats) is one subject.
    """
    for way, least in _ways(config):
        keys = [way(item) for item in items]
        if all(keys) and len(set(keys)) >= least:
            break
    else:
        if not config.allow_slice_split:
            pairs = zip(items, keys, strict=True)
            lost = next((item for item, key in pairs if not key), items[0])
            raise UserError(
                Exit.DATA,
                f"cannot tell the subject of {printable(lost.name)}: give --subject-pattern, a "
                r"regular expression with one group such as '(patient\d+)', or "
                "--allow-slice-split, which inflates every score",
            )
        keys = [f"{SLICE_KEY}{item.name}" for item in items]
    for item, key in zip(items, keys, strict=True):
        item.subject = key


def _ways(config: Config) -> list[tuple[Callable[[Item], str | None], int]]:
    """How to read a subject from a path, surest first, and how many each must tell apart."""
    if config.subject_pattern:
        return [(_pattern_key(config), 1)]
    return [(_known_key, 1), (_folder_key, 3), (_head_key, 3), (_any_folder_key, 3)]


def _pattern_key(config: Config) -> Callable[[Item], str | None]:
    try:
        pattern = re.compile(config.subject_pattern)
    except re.error as problem:
        raise UserError(Exit.USAGE, f"--subject-pattern: {problem}") from None
    if not pattern.groups:
        raise UserError(Exit.USAGE, "--subject-pattern needs a group, such as '(patient\\d+)'")

    def key(item: Item) -> str | None:
        match = pattern.search(item.name)
        return match.group(1) if match else None

    return key


def _known_key(item: Item) -> str | None:
    match = _SUBJECT.search(item.name)
    if not match:
        return None
    return match[1].upper() if match[1] else match[0].lower()


def _folder_key(item: Item) -> str | None:
    """The folder, if it looks like a person (has a digit) and not like a class or a disc."""
    folder = item.name.rpartition("/")[0].rpartition("/")[2]
    grouping = re.match(
        r"(class|stage|grade|fold|group|batch|part|disc|site|set)[\W_]*\d", folder, re.I
    )
    return folder if re.search(r"\d", folder) and not grouping else None


def _any_folder_key(item: Item) -> str | None:
    """The folder of a volume: many volumes of one name lie in one folder each."""
    return item.name.rpartition("/")[0] if item.is_volume else None


def _head_key(item: Item) -> str | None:
    """IXI002 of IXI002_z17.png; the whole name of a volume."""
    stem = item.name.rpartition("/")[2].partition(".")[0]
    if item.is_volume:
        return stem
    match = re.fullmatch(r"(.*\d.*?)[-_ ]+(?:slice|img|z|s)?[-_ ]*\d+", stem, re.I)
    return match.group(1) if match else None


def assign_parts(items: list[Item], config: Config) -> tuple[str, list[str]]:
    """Give every item its part, and say how, with notes. Raises UserError on overlap."""
    how = "by slice" if items[0].subject.startswith(SLICE_KEY) else "by subject"
    placed = [item for item in items if item.part]
    if "train" in (found := {item.part for item in placed}) and len(found) > 1:
        _check_overlap(placed)
        _fill_missing_part(placed, config)
        outside = len(items) - len(placed)
        notes = [f"{outside:,} files outside the split folders are left out"] if outside else []
        return f"{how}, as the folders are named", notes
    parts = hash_split({item.subject for item in items}, config.split_seed)
    for item in items:
        item.part = parts[item.subject]
    return f"{how}, from a hash of the name", []


def hash_split(subjects: Iterable[str], seed: int, shares=(0.8, 0.1)) -> dict[str, str]:
    """80 / 10 / 10 by a hash of subject and seed: who is added later moves almost nobody.

    A part with too few takes the subjects whose hashes are nearest. Raises UserError below 3.
    """
    points = {s: int(stable_hash(seed, s)[:13], 16) / 16**13 for s in subjects}
    ordered = sorted(points, key=lambda s: (points[s], s))
    if len(ordered) < 3:
        raise UserError(
            Exit.DATA,
            f"{len(ordered)} subject(s) found ({', '.join(ordered)}): training, validation and "
            "test need at least one each; add subjects or give --subject-pattern",
        )
    least = 2 if len(ordered) >= 6 else 1
    first = sum(point < shares[0] for point in points.values())
    second = sum(point < shares[0] + shares[1] for point in points.values())
    first = min(max(first, least), len(ordered) - 2 * least)
    second = min(max(second, first + least), len(ordered) - least)
    cut = {
        "train": ordered[:first],
        "validation": ordered[first:second],
        "test": ordered[second:],
    }
    return {subject: part for part, group in cut.items() for subject in group}


def _check_overlap(items: list[Item]):
    homes = {}
    for item in items:
        homes.setdefault(item.subject, set()).add(item.part)
    shared = sorted((s for s, parts in homes.items() if len(parts) > 1), key=_natural)
    if shared:
        shown = ", ".join(f"{s} ({' and '.join(sorted(homes[s]))})" for s in shared[:5])
        raise UserError(
            Exit.DATA,
            f"{len(shared)} subject(s) in more than one split: {shown}"
            f"{' ...' if len(shared) > 5 else ''}; keep each in one folder, or rename the "
            "folders, and the subjects are split anew",
        )


def _fill_missing_part(items: list[Item], config: Config):
    """Folders named for two parts only: the third comes out of the training subjects."""
    missing = set(PARTS) - {item.part for item in items}
    if not missing:
        return
    training = sorted({item.subject for item in items if item.part == "train"})
    if len(training) < 2:
        raise UserError(Exit.DATA, f"no {missing.pop()} folder, and one training subject only")
    points = sorted(training, key=lambda s: stable_hash(config.split_seed, s))
    taken = set(points[: max(1, len(training) // 9)])
    for item in items:
        if item.subject in taken:
            item.part = next(iter(missing))
