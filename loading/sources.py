"""Finds the slices below a folder, one raw scan of each head, with their subjects and splits.

In: a folder as users have it. Out: `Item`s in natural order, each with subject and split, and
the first part of the data report. Only names are used, never pixels. Stops (exit 3) if a
subject would be in two splits or cannot be told from the names.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config import Config, Exit, UserError
from loading import people
from loading.decoding import IMAGES, VOLUMES, holds_one_slice
from support.messages import printable

PARTS = ("train", "validation", "test")
SLICE_KEY = "slice:"  # prefix of the stand-in for an unknown subject
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
UNREAD = {  # formats that people have, and what converts them
    ".dcm": "DICOM (dcm2niix converts it)",
    ".ima": "DICOM (dcm2niix converts it)",
    ".nrrd": "NRRD (3D Slicer converts it to NIfTI)",
    ".nhdr": "NRRD (3D Slicer converts it to NIfTI)",
    ".mnc": "MINC (mnc2nii converts it)",
    ".tif": "TIFF (convert it to PNG)",
    ".tiff": "TIFF (convert it to PNG)",
    ".par": "Philips PAR/REC (dcm2niix converts it)",
}
SHEETS = ("grid.png", "strip.png", "comparison.png")  # predict.py writes them beside slices
LAYOUTS = """accepted are folders that hold, at any depth,
  PNG or JPEG slices whose path names the subject (case_001_slice_0.nii.png, OAS1_0001_...,
    sub-01_..., or one folder per subject), with or without train/validate/test folders;
  OASIS-1 sessions (OAS1_*/PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr with .img);
  NIfTI volumes or slices (*.nii, *.nii.gz), as in OASIS-3, BIDS or neurite trees;
  FreeSurfer subjects (mri/norm.mgz).
Segmentations do not count."""


@dataclass(slots=True)
class Item:
    """One file, an image or a volume, with subject, series and split."""

    root: str
    name: str  # relative to the root, with slashes
    subject: str = ""
    part: str | None = None  # one of PARTS
    series: str = ""  # the slices of one scan have the same; a volume has its own

    @property
    def path(self) -> Path:
        return Path(self.root, self.name)

    @property
    def is_volume(self) -> bool:
        return self.name.lower().endswith(VOLUMES)

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

_JUNK = re.compile(r"\.|__macosx$|thumbs\.db$|desktop\.ini$|@eadir$|fsaverage", re.I)
_SEGMENTATION = re.compile(
    r"(?<![a-z])(?:[adfw]?m?(?:seg|parc)(?:s|ment\w*)?|probseg|(?:brain|lesion|tumou?r)?masks?|labels?"
    r"|ribbon|rois?|annotations?|ground_?truths?|gt)(?:tr|ts|train|val|test)?\d*(?![a-z])"
)
# If a tree has several of these, only the first in this list is used.
_PREFERRED = (
    ("OASIS-1 in Talairach space", re.compile(r"_t88_masked_gfc\.hdr$", re.I)),
    ("T1-weighted volumes (BIDS)", re.compile(r"_T1w\.nii(\.gz)?$", re.I)),
    ("neurite OASIS volumes", re.compile(r"(^|/)aligned_norm\.nii(\.gz)?$", re.I)),
    ("neurite OASIS slices", re.compile(r"(^|/)slice_norm\.nii(\.gz)?$", re.I)),
    ("FreeSurfer volumes", re.compile(r"(^|/)mri/(norm|T1)\.mgz$")),
)


def find(root: Path, config: Config, subjects: bool = True) -> tuple[list[Item], dict]:
    """Return the images or volumes below `root` in natural order, and the report so far."""
    if not os.path.isdir(root):  # Path.is_dir raises if a parent folder is not readable
        exists = os.path.exists(root)
        problem = "is a file, not a folder" if exists else "does not exist or is not readable"
        if root.suffix.lower() in ARCHIVES:
            problem += ": unpack it, and give the folder"
        raise UserError(Exit.DATA, f"{printable(root)} {problem}" + f"; {LAYOUTS}" * exists)
    ignored = Counter()
    # Sorted twice: names that are equal in natural order (z1, z01) need a fixed order too.
    names = sorted(sorted(_walk(root, ignored)), key=_natural)
    names, kind = _raw_scans(names, ignored)
    if not names:
        held = ", ".join(f"{n:,} {what}" for what, n in ignored.items()) or "nothing"
        raise UserError(Exit.DATA, f"no slices in {root} (it holds {held}); {LAYOUTS}")
    items = [Item(str(root), name, part=_part(name.rpartition("/")[0])) for name in names]
    notes = []
    if subjects:
        notes.append(assign_subjects(items, config))
        items = _one_scan_a_session(items, ignored)
    else:
        with contextlib.suppress(UserError):  # of use for telling series apart only
            assign_subjects(items, config)
    _assign_series(items)
    ignored = {printable(what): count for what, count in ignored.items()}
    report = {"source": kind, "root": printable(root), "ignored": ignored, "notes": notes}
    return items, report


def _walk(root: Path, ignored: Counter) -> Iterator[str]:
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
        sheet = any(entry.name == SHEETS[0] for entry in entries)  # by predict.py
        for entry in entries:
            name, lower = entry.name, entry.name.lower()
            segmentation = in_segmentations or bool(_SEGMENTATION.search(lower))
            below = f"{folder}/{name}" if folder else name
            if _JUNK.match(name):
                ignored["system files"] += 1
            elif (kind := _kind(entry)) == "folder":
                folders.append((below, segmentation))
            elif not lower.endswith(IMAGES + VOLUMES):
                if not lower.endswith(".img"):  # counted with its .hdr
                    ignored[_unread(root / below)] += 1
            elif kind == "device":  # reading a pipe could block forever
                ignored["devices and pipes"] += 1
            elif segmentation:
                ignored["segmentations"] += 1
            elif name in SHEETS or (name == "volume.nii.gz" and sheet):
                ignored["contact sheets"] += 1
            else:
                yield below


def _kind(entry: os.DirEntry) -> str:
    try:
        if entry.is_dir():
            return "folder"
        # For a plain file the listing is enough; stat would be slow on a network disk.
        is_file = entry.is_file(follow_symlinks=False) or stat.S_ISREG(entry.stat().st_mode)
        return "file" if is_file else "device"
    except OSError:  # a broken link is reported later, as an unreadable file
        return "file"


def _unread(path: Path) -> str:
    """Return what a file is that is neither an image nor a volume, for the report."""
    suffix = path.suffix.lower()
    if suffix.strip(".").isdecimal() or not suffix:  # names of DICOM files often have no suffix
        with contextlib.suppress(OSError), open(path, "rb") as file:
            suffix = ".dcm" if file.read(132)[128:] == b"DICM" else suffix
    return UNREAD.get(suffix, f"{suffix or 'other'} files")


# --- one raw scan of each head ------------------------------------------------------------

_SPM = re.compile(r"(?:[rmwsuya]|mw?|w?m|[rmw]*c[1-6]|[mw]*p[0-6]|iy_?|y_|u_|mean)+", re.I)
_COPY = re.compile(r"(^|/)derivatives?/|_(desc|space)-", re.I)
_T1 = re.compile(r"(?<![a-z0-9])(t1[a-z]*|mprage|mp2rage|spgr)(?![a-z0-9])", re.I)
_OTHER_CONTRAST = re.compile(
    r"(?<![a-z0-9])(t2[a-z*]*|flair|pdw?|dwi|dti|adc|swi|bold|func|asl|mra|angio)(?![a-z0-9])",
    re.I,
)
_VARIANT = re.compile(r"_(acq|rec|ce)-|(?<![a-z0-9])t1(c|ce|gd)(?![a-z0-9])|repeat", re.I)
_VISIT = re.compile(
    r"(?<![a-z])(?:"
    r"(?:ses|session|visit|tp|time|timepoint|week|month|year|day|mr)[-_ ]?[a-z]*\d+"
    r"|[vwmyd]\d+|ses-[a-z0-9]+)",
    re.I,
)


def _raw_scans(names: list[str], ignored: Counter) -> tuple[list[str], str]:
    """Drop copies, processed volumes and other contrasts; return the rest and their kind."""
    volumes = [name for name in names if name.lower().endswith(VOLUMES)]
    chosen, kind = (volumes, "volumes") if volumes else (names, "images")
    for preferred, pattern in _PREFERRED:
        if matching := [name for name in volumes if pattern.search(name)]:
            twins = {n.replace("/norm.mgz", "/T1.mgz") for n in matching if "/norm.mgz" in n}
            chosen, kind = [name for name in matching if name not in twins], preferred
            break
    others = set(names) - set(chosen)
    if contrasts := sum(map(_is_other_contrast, others)):
        ignored["other contrasts"] += contrasts
    if versions := len(others) - contrasts:
        ignored["other versions of the scans"] += versions
    once = {}  # x.nii, x.nii.gz and x.nii.gz/x.nii are the same scan
    for name in chosen:
        plain = people.collapsed(name)
        once.setdefault(plain.lower().removesuffix(".gz") if volumes else plain, name)
    if twins := len(chosen) - len(once):
        ignored["copies unpacked or packed"] += twins
    chosen = list(once.values())
    if volumes:
        stems = {_stem(name) for name in chosen}
        for reason, drop in (
            ("derivatives", _COPY.search),
            ("processed by SPM", lambda name: _from_spm(name, stems)),
            ("other contrasts", _is_other_contrast),
        ):
            kept = [name for name in chosen if not drop(name)]
            if kept and len(kept) < len(chosen):
                ignored[reason] += len(chosen) - len(kept)
                chosen = kept
    return chosen, kind


def _is_other_contrast(name: str) -> bool:
    return bool(_OTHER_CONTRAST.search(name)) and not _T1.search(name)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0].lower()


def _from_spm(name: str, stems: set[str]) -> bool:
    """Whether another volume has this name without SPM's prefix, as in wmsub-01_T1w.nii."""
    stem = _stem(name)
    return any(_SPM.fullmatch(stem[:k]) and stem[k:] in stems for k in range(1, 7))


def _one_scan_a_session(items: list[Item], ignored: Counter) -> list[Item]:
    """Keep one volume of each session of a subject: no variant if possible, then the first."""
    if not items[0].is_volume:
        return items
    sessions = defaultdict(list)
    dated = len({people.date(item.name) for item in items}) > 1  # else it is the data set's
    for item in items:
        sessions[item.subject, _session(item, dated)].append(item)
    dropped = set()
    for scans in sessions.values():
        if len(scans) > 1 and not _is_slice(scans[0]):
            scans.remove(next((i for i in scans if not _VARIANT.search(i.name)), scans[0]))
            for item in scans:
                dropped.add(item.name)
                variant = _VARIANT.search(item.name)
                ignored["variants of a scan" if variant else "repeated scans of a session"] += 1
    return [item for item in items if item.name not in dropped]


def _session(item: Item, dated: bool) -> str:
    """Return the visit that a path tells: its date, else visits and days, else numbers."""
    if dated and (date := people.date(item.name)):
        return date
    name = re.sub(re.escape(item.subject), "", item.name, flags=re.I)
    if visits := {visit.lower() for visit in _VISIT.findall(name)}:
        return " ".join(sorted(visits))
    return " ".join(re.findall(r"\d{2,}", _stem(name)))


def _natural(name: str) -> list:
    """Return a sort key that puts slice_2 before slice_10."""
    parts = re.split(r"(\d+)", name)  # texts and numbers alternate
    parts[1::2] = map(int, parts[1::2])
    return parts


# --- subjects -----------------------------------------------------------------------------


def assign_subjects(items: list[Item], config: Config) -> str:
    """Set every item's subject, from the path alone; return how, with examples.

    All scans of one person (MR1, MR2, sessions, runs, repeats) get the same subject. Raises
    UserError if the paths do not tell it.
    """
    reading = people.who([item.name for item in items], config)
    if reading:
        for item, key in zip(items, reading.keys, strict=True):
            item.subject = key
        sure = config.subject_pattern or reading.pattern in (people.KNOWN, people.KNOWN_OR_WORD)
        how = "subjects by" if sure else "subjects guessed by"
        rest = "" if sure else "; if wrong, give --subject-pattern"
        return f"{how} {reading.what}: {', '.join(reading.examples())}{rest}"
    if not config.allow_slice_split:
        raise UserError(
            Exit.DATA,
            f"no subject in names such as {printable(items[0].name)}: give --subject-pattern, "
            r"a regular expression with one group such as '(patient\d+)', or "
            "--allow-slice-split, which inflates every score",
        )
    for item in items:
        item.subject = f"{SLICE_KEY}{item.name}"
    return "subjects unknown: every file is split by itself"


def _assign_series(items: list[Item]):
    """Set the name that the slices of one scan share; a volume's is its own."""
    shared = people.series([item.name for item in items], [item.subject for item in items])
    members = defaultdict(list)
    for item, name in zip(items, shared, strict=True):
        members[name].append(item)
    for name, scans in members.items():
        alone = scans[0].is_volume and (len(scans) == 1 or not _is_slice(scans[0]))
        for item in scans:
            item.series = item.name if alone else name


def _is_slice(item: Item) -> bool:
    """Whether a volume file holds one slice, by its name or its header."""
    return people.has_slice_number(item.name) or holds_one_slice(item.path)


# --- splits -------------------------------------------------------------------------------

_PART = re.compile(
    r"(?:^|[-_ ])(?:(train(?:ing)?)|(val(?:id(?:ate|ation)?)?)|(test(?:ing)?))(?=$|[-_ ])", re.I
)


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
    found = {item.part for item in placed}
    if "train" in found and len(found) > 1:
        _check_overlap(placed)
        for missing in set(PARTS) - found:  # one at most
            _fill_part(missing, placed, config.split_seed)
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


def _fill_part(part: str, items: list[Item], seed: int):
    """Move a ninth of the training subjects to a part that no folder is named after."""
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
