"""Finds the slices below a folder, and assigns each a subject and a split.

In: a folder as users have it. Out: `Item`s in natural order, each with subject and split, and
the first part of the data report. Only names are used, never pixels. Stops (exit 3) if a
subject would be in two splits or cannot be told from the names.
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
from loading.decoding import IMAGES, VOLUMES, printable

PARTS = ("train", "validation", "test")
SLICE_KEY = "slice:"  # prefix of the stand-in for an unknown subject
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
SHEETS = ("grid.png", "strip.png", "comparison.png")  # predict.py writes them beside slices
LAYOUTS = """accepted are folders that hold, at any depth,
  PNG or JPEG slices whose path names the subject (case_001_slice_0.nii.png, OAS1_0001_...,
    sub-01_..., or one folder per subject), with or without train/validate/test folders;
  OASIS-1 sessions (OAS1_*/PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr with .img);
  NIfTI volumes (*.nii, *.nii.gz), as in OASIS-3, BIDS or neurite trees.
Segmentations do not count."""


@dataclass(slots=True)
class Item:
    """One file, an image or a volume, with the subject and split that its path tells."""

    root: str
    name: str  # relative to the root, with slashes
    subject: str | None = None
    part: str | None = None  # one of PARTS

    @property
    def path(self) -> Path:
        return Path(self.root, self.name)

    @property
    def is_volume(self) -> bool:
        return self.name.lower().endswith(VOLUMES)

    @property
    def series(self) -> str:
        """Name shared by a scan's slices: the volume's, or the path without its last number."""
        if self.is_volume or self.subject.startswith(SLICE_KEY):
            return self.name
        return re.sub(r"\d+(?=\D*\Z)", "", self.name)

    @property
    def files(self) -> list[str]:
        """The file, and for a header (.hdr) the pixel file beside it."""
        path = f"{self.root}/{self.name}"
        if not path.lower().endswith(".hdr"):
            return [path]
        return [path, path[:-4] + (".IMG" if path.endswith(".HDR") else ".img")]


def stable_hash(*parts) -> str:
    """Return a hash of plain values, 32 hex digits, the same on every machine."""
    text = json.dumps(parts, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- finding ------------------------------------------------------------------------------

_JUNK = re.compile(r"\.|__macosx$|thumbs\.db$|desktop\.ini$", re.I)
_SEGMENTATION = re.compile(
    r"(?<![a-z])(?:[adf]?seg(?:s|ment\w*)?|probseg|labels?|(?:brain)?masks?|aparc)\d*(?![a-z])"
)
_SEGMENTATION_WORDS = ("seg", "label", "mask", "aparc")  # each match contains one
_SESSION = re.compile(r"OAS1_\d{4}_MR\d", re.I)
# If a tree has several versions of each scan, the first version in this list is used.
_PREFERRED = (
    ("OASIS-1 in Talairach space", re.compile(r"_t88_masked_gfc\.hdr$", re.I)),
    ("T1-weighted volumes (BIDS)", re.compile(r"_T1w\.nii(\.gz)?$", re.I)),
    ("neurite OASIS volumes", re.compile(r"(^|/)aligned_norm\.nii(\.gz)?$", re.I)),
    ("neurite OASIS slices", re.compile(r"(^|/)slice_norm\.nii(\.gz)?$", re.I)),
)


def find(root: Path, config: Config, subjects: bool = True) -> tuple[list[Item], dict]:
    """Return the images or volumes below `root` in natural order, and the report so far."""
    if not os.path.isdir(root):  # Path.is_dir raises if a parent folder is not readable
        exists = os.path.exists(root)
        problem = "is a file, not a folder" if exists else "does not exist or is not readable"
        if root.suffix.lower() in ARCHIVES:
            problem += ": unpack it, and give the folder"
        raise UserError(Exit.DATA, f"--data {printable(root)} {problem}; {LAYOUTS}")
    ignored, sessions = Counter(), set()
    # Sorted twice: names that are equal in natural order (z1, z01) need a fixed order too.
    names = sorted(sorted(_walk(root, ignored, sessions)), key=_natural)
    names, kind = _choose(names, ignored)
    if not names:
        held = ", ".join(f"{n:,} {kind}" for kind, n in ignored.items()) or "nothing"
        raise UserError(Exit.DATA, f"no slices in --data {root} (it holds {held}); {LAYOUTS}")
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
    """Yield names of images and volumes below `root`; count all other files in `ignored`."""
    seen, folders = set(), [("", False)]
    while folders:
        folder, in_segmentations = folders.pop()
        try:
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in seen:  # a loop of symbolic links
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as listing:
                entries = list(listing)
        except OSError:
            ignored["unreadable folders"] += 1
            continue
        for entry in entries:
            name, lower = entry.name, entry.name.lower()
            segmentation = in_segmentations or _is_segmentation(lower)
            below = f"{folder}/{name}" if folder else name
            if _JUNK.match(name):
                ignored["system files"] += 1
            elif (kind := _kind(entry)) == "folder":
                folders.append((below, segmentation))
                sessions.update(match.upper() for match in _SESSION.findall(name))
            elif not lower.endswith(IMAGES + VOLUMES):
                if not lower.endswith(".img"):  # counted with its .hdr
                    ignored[f"{Path(lower).suffix or 'other'} files"] += 1
            elif kind == "device":  # reading a pipe could block forever
                ignored["devices and pipes"] += 1
            elif segmentation:
                ignored["segmentations"] += 1
            elif name in SHEETS:
                ignored["contact sheets"] += 1
            else:
                yield below


def _is_segmentation(lower: str) -> bool:
    """Whether a file name says so. Plain substrings first: the pattern is slow."""
    return any(word in lower for word in _SEGMENTATION_WORDS) and bool(
        _SEGMENTATION.search(lower)
    )


def _kind(entry: os.DirEntry) -> str:
    try:
        if entry.is_dir():
            return "folder"
        # For a plain file the listing is enough; stat would be slow on a network disk.
        is_file = entry.is_file(follow_symlinks=False) or stat.S_ISREG(entry.stat().st_mode)
        return "file" if is_file else "device"
    except OSError:  # a broken link is reported later, as an unreadable file
        return "file"


def _choose(names: list[str], ignored: Counter) -> tuple[list[str], str]:
    """Return one version and one run of every scan, and the kind of source."""
    volumes = [name for name in names if name.lower().endswith(VOLUMES)]
    chosen, kind = (volumes, "volumes") if volumes else (names, "images")
    for preferred, pattern in _PREFERRED:
        if matching := [name for name in volumes if pattern.search(name)]:
            chosen, kind = matching, preferred
            break
    first_runs = {}  # BIDS runs of one session repeat the same scan: keep the first
    for name in chosen:
        first_runs.setdefault(re.sub(r"_run-\w+?(?=_)", "", name), name)
    if versions := len(names) - len(chosen):
        ignored["other versions of the scans"] += versions
    if repeats := len(chosen) - len(first_runs):
        ignored["repeated runs of a session"] += repeats
    return list(first_runs.values()), kind


def _natural(name: str) -> list:
    """Return a sort key that puts slice_2 before slice_10."""
    parts = re.split(r"(\d+)", name)  # texts and numbers alternate
    parts[1::2] = map(int, parts[1::2])
    return parts


# --- subjects -----------------------------------------------------------------------------

_SUBJECT = re.compile(
    r"(?<![a-z0-9])(?:(?:sub-)?(OAS[12]_\d{4}|OAS[34]\d{4})|(sub-[a-z0-9]+)"
    r"|((?:subject|subj|sub|patient|case)[-_ ]?\d+))",
    re.I,
)
_GROUP = re.compile(
    r"(class|stage|grade|fold|group|batch|part|disc|site|set)[\W_]*\d", re.I
)  # a folder of many subjects


def assign_subjects(items: list[Item], config: Config):
    """Set every item's subject, from the path alone.

    All scans of one person (MR1, MR2, sessions, runs, repeats) get the same subject. Raises
    UserError if the paths do not tell it.
    """
    if config.subject_pattern:
        ways = [(_pattern_key(config.subject_pattern), 1)]
    else:  # surest first, each with the number of subjects it must find to be believed
        ways = [(_known_key, 1), (_folder_key, 3), (_head_key, 3), (_volume_folder_key, 3)]
    for key_of, least in ways:
        keys = [key_of(item) for item in items]
        if all(keys) and len(set(keys)) >= least:
            break
    else:
        if not config.allow_slice_split:
            pairs = zip(items, keys, strict=True)
            unknown = next((item for item, key in pairs if not key), items[0])
            raise UserError(
                Exit.DATA,
                f"no subject in the name {printable(unknown.name)}: give --subject-pattern, a "
                r"regular expression with one group such as '(patient\d+)', or "
                "--allow-slice-split, which inflates every score",
            )
        keys = [f"{SLICE_KEY}{item.name}" for item in items]
    for item, key in zip(items, keys, strict=True):
        item.subject = key


def _pattern_key(text: str) -> Callable[[Item], str | None]:
    try:
        pattern = re.compile(text)
    except re.error as problem:
        raise UserError(Exit.USAGE, f"--subject-pattern: {problem}") from None
    if not pattern.groups:
        raise UserError(Exit.USAGE, "--subject-pattern needs a group, such as '(patient\\d+)'")

    def key(item: Item) -> str | None:
        match = pattern.search(item.name)
        return match.group(1) if match else None

    return key


def _known_key(item: Item) -> str | None:
    """OAS1_0001 of OAS1_0001_MR2/..., sub-01 of sub-01/..., case_01 of case_01_slice_0.png."""
    match = _SUBJECT.search(item.name)
    if not match:
        return None
    return match[1].upper() if match[1] else match[0].lower()


def _folder_key(item: Item) -> str | None:
    """The parent folder, if it contains a digit and does not look like a class or a disc."""
    folder = item.name.rpartition("/")[0].rpartition("/")[2]
    return folder if re.search(r"\d", folder) and not _GROUP.match(folder) else None


def _head_key(item: Item) -> str | None:
    """IXI002 of IXI002_z17.png; the whole name of a volume."""
    stem = item.name.rpartition("/")[2].partition(".")[0]
    if item.is_volume:
        return stem
    match = re.fullmatch(r"(.*\d.*?)[-_ ]+(?:slice|img|z|s)?[-_ ]*\d+", stem, re.I)
    return match.group(1) if match else None


def _volume_folder_key(item: Item) -> str | None:
    """The folder of a volume: in some trees every volume has the same name."""
    return item.name.rpartition("/")[0] if item.is_volume else None


# --- splits -------------------------------------------------------------------------------

_PART = re.compile(
    r"(?:^|[-_ ])(?:(train(?:ing)?)|(val(?:id(?:ate|ation)?)?)|(test(?:ing)?))(?=$|[-_ ])", re.I
)


@functools.cache
def _part(folders: str) -> str | None:
    """Return the split that a folder of the path is named after, if any."""
    for folder in folders.split("/"):
        if match := _PART.search(folder):
            return PARTS[match.lastindex - 1]
    return None


def assign_parts(items: list[Item], config: Config) -> tuple[str, list[str]]:
    """Set every item's part; return how the split was made, and notes.

    Raises UserError if a subject is in two split folders, or there are too few subjects.
    """
    how = "by slice" if items[0].subject.startswith(SLICE_KEY) else "by subject"
    placed = [item for item in items if item.part]
    if "train" in (found := {item.part for item in placed}) and len(found) > 1:
        _check_overlap(placed)
        _fill_missing_part(placed, config.split_seed)
        outside = len(items) - len(placed)
        notes = [f"{outside:,} files outside the split folders are left out"] if outside else []
        return f"{how}, as the folders are named", notes
    parts = hash_split({item.subject for item in items}, config.split_seed)
    for item in items:
        item.part = parts[item.subject]
    return f"{how}, from a hash of the name", []


def hash_split(subjects: Iterable[str], seed: int) -> dict[str, str]:
    """Split 80 / 10 / 10 by a hash of subject and seed: {subject: part}.

    Adding subjects moves almost no other. A part with too few takes the subjects with the
    nearest hashes. Raises UserError for fewer than 3 subjects.
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
    first = sum(point < 0.8 for point in points.values())
    second = sum(point < 0.9 for point in points.values())
    first = min(max(first, least), len(ordered) - 2 * least)
    second = min(max(second, first + least), len(ordered) - least)
    groups = ordered[:first], ordered[first:second], ordered[second:]
    return {s: part for part, group in zip(PARTS, groups, strict=True) for s in group}


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
            f"{' ...' if len(shared) > 5 else ''}; keep each in one folder; or rename the "
            "folders, to split the subjects anew",
        )


def _fill_missing_part(items: list[Item], seed: int):
    """If folders name only two parts, move a ninth of the training subjects to the third."""
    missing = set(PARTS) - {item.part for item in items}
    if not missing:
        return
    (part,) = missing
    training = {item.subject for item in items if item.part == "train"}
    if len(training) < 2:
        raise UserError(
            Exit.DATA,
            f"no {part} folder, and only one training subject; add subjects or the folder",
        )
    ordered = sorted(training, key=lambda s: (stable_hash(seed, s), s))
    moved = set(ordered[: max(1, len(training) // 9)])
    for item in items:
        if item.subject in moved:
            item.part = part
