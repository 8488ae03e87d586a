"""Tells from the names of files who is a person, and which slices belong to one series.

Every rule is a regular expression with one group, like --subject-pattern, so a decision can be
printed, checked and corrected. If the names hold no known number, several readings are
compared. The one with the fewest persons wins if no other reading spreads one of its persons
over two of them: then nobody is in two splits by any reading. Otherwise the run stops (exit 3).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from config import Config, Exit, UserError
from loading.decoding import VOLUMES
from support.messages import printable

_IDS = (
    r"OAS[12]_\d{4}|OAS[34]\d{4}|\d{3}_S_\d{4,5}|IXI\d{3}|TCGA-\w\w-\w{4}|sub-[a-z0-9]+|"
    r"case_\d{3}(?=_(?:slice|week)_\d)"  # OASIS slices of the keras_slices sets
)
_WORDS = r"(?:subject|subj|sub|patient|participant|person|pat|pt|case)[-_ ]?\d+"
KNOWN = rf"(?i)(?<![a-z0-9])(?:sub-)?({_IDS})"  # OASIS, ADNI, IXI, TCGA and BIDS
KNOWN_OR_WORD = rf"(?i)(?<![a-z0-9])(?:sub-)?({_IDS}|{_WORDS})"
WORD = rf"(?i)(?<![a-z0-9])({_WORDS})"
# A number after one of these words counts something else than persons.
_SLICES = "slice|slc|sl|z|img|image|frame|ax|axial"
_NO_PERSON = (
    "class|stage|grade|fold|group|batch|part|disc|disk|site|set|dataset|center|cohort|"
    "visit|v|ses|session|scan|run|rep|echo|time|timepoint|tp|t|pd|week|w|month|m|year|y|day|d|"
    f"mr|mpr|im|i|{_SLICES}"
)
_DATE = re.compile(  # with a time, if one follows
    r"(?<!\d)(?:19|20)\d\d([-_.]?)[01]\d\1[0-3]\d(?:[-_ T]?\d\d[-_.:]?\d\d[-_.:]?\d\d(\.\d+)?)?"
)
_COUNT = re.compile(rf"(?i)(?<![a-z])(?:{_NO_PERSON})[-_ ]?\d+")
_SLICE = re.compile(rf"(?i)(?<![a-z])(?:{_SLICES})[-_ ]?(\d+)")
_CONTRAST = re.compile(r"(?<![A-Za-z0-9])T[12](?=[a-z]*(?![a-z0-9]))")  # T1w is no slice 1
FILE = "the file name"  # in which a reading finds the person
DOUBTED = 8  # times more persons by another reading: ask


class Reading:
    """One answer to "who is a person?": `keys`, the person of each file, by one pattern."""

    def __init__(self, names: list[str], what: str, pattern: str):
        self.names, self.what, self.pattern = names, what, pattern
        self.matches = list(map(re.compile(pattern).search, names))
        self.keys = [match and match[1] for match in self.matches]
        self.complete = all(self.keys)
        self.persons = len(set(self.keys))

    def spelled_alike(self) -> "Reading":
        """Merge persons that differ in case, leading zeros or separators: P001, p-1."""
        first = {}
        plain = [re.sub(r"(?<!\d)[-_ ]?0*(?=\d)", "", key.casefold()) for key in self.keys]
        self.keys = [first.setdefault(p, key) for p, key in zip(plain, self.keys, strict=True)]
        self.persons = len(first)
        return self

    def examples(self, count: int = 3) -> list[str]:
        """Persons, each with the path that it was read from."""
        first = {}
        for key, name in zip(self.keys, self.names, strict=True):
            first.setdefault(key, printable(name if len(name) <= 50 else f"{name[:47]}..."))
        return [f"{key} from {name}" for key, name in list(first.items())[:count]]

    def first_without(self) -> str:
        """The first path in which no person was found."""
        pairs = zip(self.keys, self.names, strict=True)
        return printable(next(name for key, name in pairs if not key))

    def within(self, larger: "Reading") -> bool:
        """Whether each person of this reading lies in one person of `larger`."""
        return len(set(zip(self.keys, larger.keys, strict=True))) == self.persons


def who(names: list[str], config: Config) -> Reading | None:
    """Return the reading of all names, or None if no rule fits them.

    Raises UserError (exit 3) if two readings disagree about who is one person.
    """
    if config.subject_pattern:
        found = Reading(names, "--subject-pattern", _checked(config.subject_pattern))
        if not found.complete:
            problem = f"--subject-pattern finds no subject in {found.first_without()}"
            raise UserError(Exit.DATA, problem)
        return found
    known = Reading(names, "a known name", KNOWN)
    if any(known.keys) and not known.complete:
        known = Reading(names, "a known name", KNOWN_OR_WORD)
        if not known.complete:
            raise UserError(
                Exit.DATA,
                f"{known.first_without()} holds no known subject number, and other paths do: "
                "move it away, or give --subject-pattern",
            )
    if known.complete and not _recurs(known):
        _check_one_each(names)
        # sub-01 and case_1 in small letters, numbers of archives in capitals
        known.keys = [k.lower() if k[0] in "sScCpP" else k.upper() for k in known.keys]
        return known
    readings = [r.spelled_alike() for r in _readings(names) if _plausible(r)]
    if not readings:
        return _one_volume_each(names)
    largest = min(readings, key=lambda reading: reading.persons)
    for other in readings:
        if not other.within(largest) or other.persons > DOUBTED * largest.persons:
            raise UserError(Exit.DATA, _choice(largest, other))
    return largest


def _check_one_each(names: list[str]):
    """Raise UserError (exit 3) if a path holds the known numbers of two persons."""
    known = re.compile(KNOWN)
    for name in names:
        if len(found := {key.lower() for key in known.findall(name)}) > 1:
            raise UserError(
                Exit.DATA,
                f"{printable(name)} names two persons, {' and '.join(sorted(found))}: correct "
                "the name, or give --subject-pattern",
            )


def _checked(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as problem:
        raise UserError(Exit.USAGE, f"--subject-pattern: {problem}") from None
    if not groups:
        raise UserError(Exit.USAGE, "--subject-pattern needs a group, such as '(patient\\d+)'")
    return pattern


def _choice(*readings: Reading) -> str:
    choices = [
        f"{reading.persons} persons by {reading.what} ({reading.examples()[0]}): "
        f"--subject-pattern '{reading.pattern}'"
        for reading in readings
    ]
    return f"the names do not tell who is one person. Choose {'; or '.join(choices)}"


# --- readings without a known number ------------------------------------------------------

_END = r"(?![^\W_])"  # a letter or digit must not follow
_NUMBER = rf"[^/\d]*\d[^\W_]*{_END}"  # digits with the letters around them: AD_001, P001b
_STEM = rf"[^/\d]*\d+(?=[A-Za-z]{{1,3}}\d{{0,2}}{_END})"  # P001 of P001b and of P001T2
_FIRST = r"[^0-9A-Za-z/]*(?=[0-9A-Za-z])"  # separators before a number


def _readings(names: list[str]) -> Iterator[Reading]:
    """Yield the readings by each number in the path, folders first.

    The numbers of 39003_v2_T1 are 39003, v2 and T1.
    """
    yield Reading(names, "a word and its number", WORD)
    depths = [name.count("/") for name in names]
    places = [(f"folder {d + 1}", "^" + d * "[^/]+/", "[^/]*/") for d in range(min(depths))]
    if min(depths) < max(depths):
        places.append(("the last folder", "(?:^|/)", "[^/]*/[^/]*$"))
    places.append((FILE, "(?:^|/)", "[^/]*$"))
    for what, before, after in places:
        for skipped in range(4):
            start = before + skipped * _NUMBER + _FIRST
            for number in (_NUMBER, _STEM):
                pattern = f"{start}({number}){after}"
                if re.search(pattern, names[0]):  # else it does not fit all names
                    yield Reading(names, what, pattern)


def _plausible(reading: Reading) -> bool:
    """Whether the values of a reading can be persons."""
    if not reading.complete or reading.persons < 3:
        return False
    values = set(reading.keys)
    counts = sum(bool(_COUNT.match(value)) for value in values)
    if counts > len(values) / 2 or all(re.fullmatch(r"\d", value) for value in values):
        return False  # one digit: classes, contrasts, repeats
    if all(map(_in_date, reading.matches)):
        return False
    files = Counter(reading.keys).values()
    alone = sum(count == 1 for count in files) > len(files) / 2
    if alone and reading.what == FILE and not _is_volume(reading.names[0]):
        return False  # the number of an image, not of a person
    return not (_counts_on(reading) or _recurs(reading))


def date(name: str) -> str | None:
    """Return the first date in a path as YYYYMMDD."""
    found = _DATE.search(name)
    return re.sub(r"\D", "", found[0])[:8] if found else None


def _in_date(match: re.Match) -> bool:
    dates = _DATE.finditer(match.string)
    return any(d.start() <= match.start(1) and match.end(1) <= d.end() for d in dates)


def _recurs(reading: Reading) -> bool:
    """Whether the values recur below more parents than there are values: visits, contrasts."""
    values, parents, pairs = _parents(reading)
    return pairs >= 2 * values and values < parents


def _counts_on(reading: Reading) -> bool:
    """Whether the number counts the slices or days of the person before it.

    If both are plain numbers and nearly every pair of them exists, either may be the person.
    """
    values, parents, pairs = _parents(reading)
    continues = parents > 1 and all(map(_continues, reading.matches))
    if not (continues or all(map(_last_of_image, reading.matches))):
        return False
    every_pair = pairs > values * parents / 2 > parents
    return not (every_pair and values >= parents and all(map(_plain, reading.matches)))


def _parents(reading: Reading) -> tuple[int, int, int]:
    """Return the number of values, of parents, and of pairs of both.

    A value begins at its first digit. Its parent is the path before it, without visits and
    dates.
    """
    pairs = set()
    for match in reading.matches:
        start = match.start(1) + re.match(r"(?:\D*(?=\d))?", match[1]).end()
        before = _COUNT.sub("", _DATE.sub("", match.string[:start]))
        pairs.add((before, match.string[start : match.end(1)]))
    values, parents = {value for _, value in pairs}, {parent for parent, _ in pairs}
    return len(values), len(parents), len(pairs)


def _last_of_image(match: re.Match) -> bool:
    """Whether this is the last number of an image's name, the slice: 12 of p01/z_12.png."""
    if re.fullmatch(WORD, match[1]):  # a patient
        return False
    after = match.string[match.end(1) :]
    last = not (re.search(r"\d", after.partition(".")[0]) or "/" in after)
    return last and not _is_volume(match.string)


def _continues(match: re.Match) -> bool:
    """Whether a plain number follows the person's: days, as in 39003_100/100.nii."""
    folder, _, before = match.string[: match.start(1)].rpartition("/")
    repeats = match[1] in re.findall(r"\d+", folder.rpartition("/")[2])
    return match[1].isdecimal() and (repeats or any(map(str.isdecimal, before)))


def _plain(match: re.Match) -> bool:
    """Whether this is the second of two plain numbers, as in "26 (19).jpg": person or slice?"""
    before = match.string[: match.start(1)].rpartition("/")[2]
    return match[1].isdecimal() and bool(re.fullmatch(r"\d+\D+", before))


def _is_volume(name: str) -> bool:
    return name.lower().endswith(VOLUMES)


def _one_volume_each(names: list[str]) -> Reading | None:
    """Take each volume as one person, if a folder of its path or its file has its own name."""
    if not all(map(_is_volume, names)) or len(names) < 3:
        return None
    for depth in range(min(name.count("/") for name in names)):
        found = Reading(names, f"folder {depth + 1}", "^" + depth * "[^/]+/" + "([^/]+)/")
        if found.persons == len(names):
            return None if _recurs(found) else found
    found = Reading(names, FILE, r"([^/.]*\d[^/.]*)[^/]*$")
    folders = {name.rpartition("/")[0] for name in names}
    alone = found.complete and found.persons == len(names) and len(folders) == 1
    return found if alone and not _recurs(found) else None


# --- series -------------------------------------------------------------------------------


def series(names: list[str], subjects: list[str]) -> list[str]:
    """Return each slice file's series: its subject, and its path with * for the slice number.

    The slice number follows a word such as "slice". Without one it is the number that takes the
    most values within a subject; the last one, if several do.
    """
    plain = [_CONTRAST.sub(lambda m: "T" + "ab"[m[0] == "T2"], collapsed(n)) for n in names]
    forms = [re.sub(r"\d+", "0", name) for name in plain]
    taken = defaultdict(lambda: defaultdict(set))  # form: place: (subject, number)
    for name, form, subject in zip(plain, forms, subjects, strict=True):
        for place, number in enumerate(re.findall(r"\d+", name)):
            taken[form][place].add((subject, number))
    slice_place = {f: max(at, key=lambda p: (len(at[p]), p)) for f, at in taken.items()}
    without = []
    for name, form, subject in zip(plain, forms, subjects, strict=True):
        numbers, worded = list(re.finditer(r"(\d+)", name)), list(_SLICE.finditer(name))
        if numbers:
            start, end = (worded[-1] if worded else numbers[slice_place[form]]).span(1)
            name = f"{name[:start]}*{name[end:]}"
        without.append(f"{subject}: {name}")
    return without


def has_slice_number(name: str) -> bool:
    """Whether a word in the file name says that its number counts slices."""
    return bool(re.search(r"(?i)(?<![a-z])(slice|slc)[-_ ]?\d", name.rpartition("/")[2]))


def collapsed(name: str) -> str:
    """x.nii.gz/x.nii and x/x.nii -> x.nii: some archives unpack a file into such a folder."""
    folder, _, file = name.rpartition("/")
    above, _, last = folder.rpartition("/")
    if last and last.partition(".")[0] == file.partition(".")[0]:
        return f"{above}/{file}" if above else file
    return name
