"""Who is a person, and which slices are a series: names as they are found in public data sets.

Each tree was seen to put one person into two splits, or to be refused, by simpler rules.
"""

import pytest

from config import Config, Exit, UserError
from loading import people

EIGHT = range(8)
VISITS = range(3)


def adni(person: str) -> list[str]:
    """Person, protocol, date and image number, as ADNI and AIBL unpack."""
    return [
        f"ADNI/{person.format(7000 + p)}/MPRAGE/201{v}-03-04_10_11_12.0/I{900100 + 10 * p + v}/"
        f"ADNI_{person.format(7000 + p)}_raw_201{v}_S{90 + 10 * p + v}_I{900 + p + 9 * v}.nii"
        for p in EIGHT
        for v in VISITS
    ]


def pairs(step: int) -> list[str]:
    """A folder for each pair of visits, person_day_day."""
    return [
        f"{39000 + p}_{a + step * p}_{b + step * p}/{day + step * p}.nii.gz"
        for p in EIGHT
        for a, b in ((100, 700), (700, 1500))
        for day in (a, b)
    ]


def course(name: str) -> list[str]:
    parts = {"train": range(8), "validate": range(8, 10), "test": range(10, 12)}
    return [
        f"keras_slices_{part}/" + name.format(f"case_{case:03d}_week_{week}_slice_{k}")
        for part, cases in parts.items()
        for case in cases
        for week in (0, 1)
        for k in range(16)
    ]


def grid(form: str, second=VISITS) -> list[str]:
    return [form.format(p, v) for p in EIGHT for v in second]


PERSONS = {  # names, number of persons, one of them
    "ADNI": (adni("941_S_{}"), 8, "941_S_7000"),
    "like ADNI, unknown numbers": (adni("{}"), 8, "7000"),
    "contrast folders, known": (grid("AD/941_S_700{}/{}/brain.nii.gz"), 8, "941_S_7000"),
    "contrast folders": (grid("AD/P70{}/{}/brain.nii.gz"), 8, "P700"),
    "contrast folders, plain numbers": (grid("AD/70{}/{}/brain.nii.gz"), 8, "700"),
    "pairs of visits": (pairs(0), 8, "39000"),
    "pairs of visits, other days": (pairs(7), 8, "39000"),
    "one person's contrasts, by ending": (grid("S1{}_T{}.nii"), 8, "S10"),
    "one person's scans, by letter": (grid("scan/10{}{}.nii", "ab"), 8, "100"),
    "one person's repeats, no separator": (grid("S0{}R{}.nii.gz"), 8, "S00"),
    "BraTS 2020": (grid("B/BraTS20_Training_00{0}/BraTS20_Training_00{0}_{1}.nii.gz",
                        ("t1", "t2", "flair")), 8, "Training_000"),
    "BraTS 2021": (grid("BraTS2021_0000{0}/BraTS2021_0000{0}_t{1}.nii.gz", "12"), 8, "00000"),
    "HCP": (grid("10030{0}/unprocessed/3T/T1w_MPR1/10030{0}_3T_T1w_MPR1.nii.gz", "x"), 8,
            "100300"),
    "ABIDE": (grid("NYU_005100{}/session_{}/anat_1/mprage.nii.gz"), 8, "NYU_0051000"),
    "BIDS": (grid("sub-0{0}/ses-{1}/anat/sub-0{0}_ses-{1}_T1w.nii.gz"), 8, "sub-00"),
    "one BIDS tree for each person": (grid("7{}/sub-01/ses-{}/x.nii"), 8, "70"),
    "visits above persons": (grid("time{1}/p0{0}/x.nii"), 8, "p00"),
    "visits before persons": (grid("v{1}_p0{0}.nii"), 8, "p00"),
    "dates above persons": (grid("2011-0{1}-04/10{0}/x.nii", (1, 2, 3)), 8, "100"),
    "dates behind persons": (grid("P10{0}_2011030{1}.nii"), 8, "P100"),
    "case numbers of visits": (grid("P000{}/case_{}/x.nii"), 8, "P0000"),
    "case numbers of visits, all different": (
        [f"P000{p}/case_{3 * p + v}/x.nii" for p in EIGHT for v in VISITS], 8, "P0000"),
    "FreeSurfer": (grid("subj{}_tp{}/mri/norm.mgz"), 8, "subj0"),
    "FreeSurfer, names": ([f"{p}/mri/norm.mgz" for p in ("bert", "ernie", "al")], 3, "bert"),
    "one digit a folder": (grid("{}/T1.nii.gz", "x"), 8, "0"),
    "classes above persons": (grid("class_{1}/p0{0}_{1}.png"), 8, "p00"),
    "classes above names": (["AD/al/x.nii", "AD/bo/x.nii", "NC/cy/x.nii"], 3, "al"),
    "course, PNG": (course("{}.nii.png"), 12, "case_000"),
    "course, NIfTI": (course("{}.nii.gz"), 12, "case_000"),
    "course, a folder each": (course("{0}.nii/{0}.nii"), 12, "case_000"),
    "slices of folders": (grid("p0{}/{}.png", range(32)), 8, "p00"),
    "slices below words": (grid("SUB_0{}/x/{}.png"), 8, "SUB_00"),
    "slices behind letters": (grid("a_{}_z{}.png"), 8, "a_0"),
    "slices of many numbered persons": (
        [f"{100 + p}_{k}.png" for p in range(40) for k in range(32)], 40, "100"),
    "IXI": (grid("IXI00{}-Guys-0828-T1.nii.gz", "x"), 8, "IXI000"),
    "flat volumes": (grid("scan_{}.nii", "x"), 8, "scan_0"),
}  # fmt: skip


@pytest.mark.parametrize("tree", PERSONS)
def test_who_is_a_person(tree):
    names, persons, one = PERSONS[tree]
    reading = people.who(names, Config())
    assert reading.persons == persons and one in reading.keys
    assert reading.examples()[0].startswith(f"{reading.keys[0]} from {names[0][:40]}")
    by_hand = people.who(names, Config(subject_pattern=reading.pattern))
    assert by_hand.within(reading) and reading.within(by_hand)


@pytest.mark.parametrize("name", ["{}.nii.png", "{}.nii.gz"])
def test_the_names_of_the_course_are_known_not_guessed(name):
    assert people.who(course(name), Config()).pattern == people.KNOWN
    other = grid("case_00{}/{}.png", range(32))
    assert people.who(other, Config()).pattern != people.KNOWN


ASKED = {  # names that allow two readings, and how many persons each has
    "a number and a number in brackets": (
        [f"Mild/{a} ({b}).jpg" for a in range(26, 33) for b in range(1, 60)], "7", "59"),
    "unknown letters before each": (grid("a{1}_p0{0}.nii"), "3", "8"),
    "a slice number before the person's": (
        [f"{80 + k}_patient{p}.png" for k in range(10) for p in range(39)], "10", "39"),
    "wards or persons": (
        [f"ward{w}/P{w}{p:03d}/x.nii" for w in VISITS for p in range(30)], "3", "90"),
}  # fmt: skip


@pytest.mark.parametrize("tree", ASKED)
def test_readings_that_disagree_stop_the_run_and_each_names_its_pattern(tree):
    names, *persons = ASKED[tree]
    with pytest.raises(UserError) as problem:
        people.who(names, Config())
    assert problem.value.code == Exit.DATA
    parts = str(problem.value).split("--subject-pattern '")
    patterns = [part.partition("'")[0] for part in parts[1:]]
    readings = [people.who(names, Config(subject_pattern=pattern)) for pattern in patterns]
    assert [str(reading.persons) for reading in readings] == persons
    assert all(f"{count} persons by" in str(problem.value) for count in persons)


def test_a_path_that_names_two_persons_stops_the_run():
    names = [f"sub-0{p}/anat/sub-0{p}_T1w.nii" for p in range(5)]
    assert people.who(names, Config()).persons == 5
    with pytest.raises(UserError, match="names two persons, sub-01 and sub-04") as problem:
        people.who([*names, "sub-04/anat/sub-01_T1w.nii"], Config())
    assert problem.value.code == Exit.DATA


def test_persons_that_differ_in_case_zeros_or_separators_are_one():
    forms = "train/Patient_{}/z{}.png", "test/patient0{}/y{}.png"
    reading = people.who([name for form in forms for name in grid(form)], Config())
    assert reading.persons == 8 and set(reading.keys) == {f"Patient_{p}" for p in EIGHT}
    assert people.who(grid("p1{}/z{}.png") + grid("p10{}/z{}.png"), Config()).persons == 16


def test_one_path_without_a_number_among_known_ones_is_named():
    names = [f"AD/OAS1_000{p}_MR1_{k}.jpg" for p in EIGHT for k in range(4)]
    with pytest.raises(UserError, match=r"AD/sample\.jpg holds no known subject number"):
        people.who([*names, "AD/sample.jpg"], Config())


UNKNOWN = {
    "numbered images": [f"img{k:03d}.png" for k in range(30)],
    "images of random names": [f"Mild/{k:02x}e{k * 7 % 60}c-2f.jpg" for k in range(60)],
    "classes, one odd": [*(f"Tr-gl_{k:04d}.jpg" for k in range(60)), "Tr-gl_0010 (1).jpg"],
    "sizes in the name": [f"{k:04d}_512.jpg" for k in range(320)],
    "visits": [f"{a}_visit{v}.nii" for a in ("alice", "bob", "eve", "al") for v in VISITS],
    "images of a class": [f"Training/glioma/Te-gl_{k:04d}.jpg" for k in range(30)],
    "two volumes a name": [f"{a}/T1_{k}.nii" for a in ("alice", "bob", "eve") for k in (1, 2)],
    "visit folders": [f"{a}/{v}/x.nii" for a in ("al", "bo", "cy") for v in ("pre", "post")],
}


@pytest.mark.parametrize("tree", UNKNOWN)
def test_names_that_tell_no_person(tree):
    assert people.who(UNKNOWN[tree], Config()) is None


SERIES = {  # names of two series, of equally many slices
    "word": [f"sub-1/img_2_slice-{k}_T{c}w.png" for c in (1, 2) for k in (80, 9, 100)],
    "before the contrast": [f"p{p}_{k}_T1w.png" for p in (1, 2) for k in (80, 81, 82)],
    "repeats": [f"OAS1_0001_MR1_mpr-{r}_{k}.jpg" for r in (1, 2) for k in (100, 101, 102)],
    "weeks": [f"case_4_week_{w}_slice_{k}.nii.gz" for w in (0, 1) for k in (1, 2, 3)],
    "a folder each": [f"c_{w}_s_{k}.nii/c_{w}_s_{k}.nii" for w in (0, 1) for k in (4, 5, 6)],
    "image numbers": [f"002_S_4002_I450{s}_{k}.png" for s in (1, 2) for k in (80, 9, 100)],
    "folders": [f"p{p}/z{k}.png" for p in (1, 2) for k in range(4)],
}


@pytest.mark.parametrize("tree", SERIES)
def test_slices_of_one_scan_are_a_series(tree):
    names = SERIES[tree]
    found, half = people.series(names, ["p"] * len(names)), len(names) // 2
    assert len(set(found[:half])) == len(set(found[half:])) == 1 and found[0] != found[-1]
