"""One raw scan of each head, by names; what headers and pixels say; odd systems."""

import errno
import mmap
import os
import stat
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import script
from test_dataset import config, failure, grey, head, nifti, opened, png

from config import Config, Exit
from dataset import open_data, read_slices
from loading import decoding, sources
from support import device, files

# --- one raw scan of each head, by names --------------------------------------------------

LEFT_OUT = {  # files of person {0}, the one that is kept, and why the others are not
    "derivatives": (
        ["sub-{0}/anat/sub-{0}_T1w.nii.gz",
         "derivatives/fmriprep/sub-{0}/anat/sub-{0}_desc-preproc_T1w.nii.gz",
         "derivatives/fmriprep/sub-{0}/anat/sub-{0}_space-MNI_desc-preproc_T1w.nii.gz",
         "derivatives/fmriprep/sub-{0}/anat/sub-{0}_desc-brain_mask.nii.gz"],
        {"derivatives": 2, "segmentations": 1}),
    "runs in other folders": (
        ["OAS3000{0}_MR_d0129/anat2/sub-OAS3000{0}_ses-d0129_run-01_T1w.nii.gz",
         "OAS3000{0}_MR_d0129/anat3/sub-OAS3000{0}_ses-d0129_run-02_T1w.nii.gz"],
        {"repeated scans of a session": 1}),
    "variants": (
        ["sub-{0}/sub-{0}_T1w.nii.gz", "sub-{0}/sub-{0}_acq-low_T1w.nii.gz",
         "sub-{0}/sub-{0}_rec-norm_T1w.nii.gz"],
        {"variants of a scan": 2}),
    "unpacked twins": (
        ["sub-{0}/a.nii", "sub-{0}/a.nii.gz"], {"copies unpacked or packed": 1}),
    "unpacked into a folder": (
        ["sub-{0}/a.nii.gz/a.nii", "sub-{0}/a.nii.gz2/a.txt"], {".txt files": 1}),
    "SPM": (
        ["P0{0}/P0{0}_brain.nii", "P0{0}/mP0{0}_brain.nii", "P0{0}/wmP0{0}_brain.nii",
         "P0{0}/c1P0{0}_brain.nii", "P0{0}/mwp1P0{0}_brain.nii"],
        {"processed by SPM": 4}),
    "labels": (
        ["Task/imagesTr/BRAIN_00{0}.nii.gz", "Task/labelsTr/BRAIN_00{0}.nii.gz"],
        {"segmentations": 1}),
    "contrasts in names": (
        ["P0{0}/P0{0}_T1.nii", "P0{0}/P0{0}_T2.nii", "P0{0}/P0{0}_FLAIR.nii",
         "P0{0}/P0{0}_T1ce.nii"],
        {"other contrasts": 2, "variants of a scan": 1}),
    "contrasts in folders": (
        ["AD/941_S_700{0}/0/brain.nii.gz", "AD/941_S_700{0}/1/brain.nii.gz"],
        {"repeated scans of a session": 1}),
    "FreeSurfer": (
        ["bert{0}/mri/norm.mgz", "bert{0}/mri/T1.mgz", "bert{0}/mri/aseg.mgz",
         "bert{0}/mri/orig.mgz"],
        {"segmentations": 1, "other versions of the scans": 2}),
    "thumbnails and lesions": (
        ["P0{0}/z1.png", "P0{0}/@eaDir/z1.png/SYNO_THUMB_M.jpg", "P0{0}/z1_lesionMask.png",
         "P0{0}/z1_GT.png"],
        {"system files": 1, "segmentations": 2}),
}  # fmt: skip


def touched(root: Path, names: list[str], people=range(1, 5)) -> Path:
    for name in names:
        for person in people:
            path = root / name.format(person)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


@pytest.mark.parametrize("tree", LEFT_OUT)
def test_one_raw_scan_a_session_is_kept_and_the_others_are_counted(tmp_path, tree):
    names, counts = LEFT_OUT[tree]
    items, report = sources.find(touched(tmp_path, names), Config())
    assert {item.name for item in items} == {names[0].format(p) for p in range(1, 5)}
    assert report["ignored"] == {reason: 4 * count for reason, count in counts.items()}
    assert len({item.subject for item in items}) == 4


def test_visits_are_sessions_and_a_visit_in_two_folders_is_one(tmp_path):
    names = [
        f"3900{{0}}_{a}_{b}/{day}.nii" for a, b in ((100, 700), (700, 1500)) for day in (a, b)
    ]
    items, report = sources.find(touched(tmp_path, names), Config())
    assert len(items) == 12 and report["ignored"] == {"repeated scans of a session": 4}
    dated = "I/{0}S/MPRAGE/201%d-03-04_10_11_12.0/I9%d{0}/x_I9%d{0}.nii"
    names = [dated % (year, i, i) for year, i in ((1, 1), (1, 2), (2, 3))]
    items, report = sources.find(touched(tmp_path / "b", names, range(10, 14)), Config())
    assert len(items) == 8 and report["ignored"] == {"repeated scans of a session": 4}
    names = [f"{place}/P00{{0}}_v{k}/brain.nii" for place, k in (("a", 1), ("a", 2), ("b", 1))]
    items, report = sources.find(touched(tmp_path / "c", names), Config())
    assert len(items) == 8 and report["ignored"] == {"repeated scans of a session": 4}


def test_the_date_of_a_data_set_is_no_visit(tmp_path):
    names = [f"set_2019-05-01/sub-{{0}}/ses-{v}/x_T1w.nii" for v in (1, 2, 3)]
    assert len(sources.find(touched(tmp_path, names), Config())[0]) == 12


def test_freesurfer_persons_may_have_names_and_its_templates_are_no_persons(tmp_path):
    people = "bert", "ernie", "al"
    touched(tmp_path, ["{0}/mri/norm.mgz", "{0}/mri/T1.mgz"], people)
    touched(tmp_path, ["{0}/mri/T1.mgz"], ["fsaverage", "fsaverage5"])
    items, _ = sources.find(tmp_path, Config())
    assert sorted(item.name for item in items) == sorted(f"{p}/mri/norm.mgz" for p in people)


def test_what_the_subjects_were_read_from_is_said(tmp_path, capsys):
    for person in range(4):
        for k in range(2):
            png(tmp_path / "data" / f"P0{person}" / f"{k}.png", grey(9 * person + k))
    opened(tmp_path)
    said = capsys.readouterr().out
    assert "subjects guessed by folder 1: P00 from P00/0.png, P01 from P01/0.png" in said
    assert "if wrong, give --subject-pattern" in said
    assert "no overlap, if subjects are guessed right" in said


# --- what headers say ---------------------------------------------------------------------


def heads(root: Path, change=lambda image: None, voxels=lambda v: v, people=3) -> Path:
    """A small BIDS tree; change(image) changes each header, voxels(v) the values."""
    for person in range(people):
        path = root / f"sub-{person}" / f"sub-{person}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        image = nibabel.Nifti1Image(voxels(head(seed=person)), np.diag([6.0, 6, 6, 1]))
        change(image)
        nibabel.save(image, path)
    return root


def test_a_header_without_orientation_asks_for_the_axis_and_obeys_it(tmp_path):
    def forget(image):
        image.set_sform(image.affine, 0)
        image.set_qform(image.affine, 0)

    heads(tmp_path / "data", forget, lambda v: np.moveaxis(v, 2, 0))  # height is axis 0
    assert "--axis 0, 1 or 2" in failure(opened, tmp_path)
    data = opened(tmp_path, axis=0, slices=28)
    brightness = [image[image > 0].mean() for image in data.images[:20]]
    assert np.corrcoef(brightness, np.arange(20))[0, 1] > 0.95  # brighter to the top


@pytest.mark.parametrize(("units", "factor"), [("meter", 0.001), ("micron", 1000), ("mm", 1)])
def test_units_of_the_header_are_honoured(tmp_path, units, factor):
    def measure(image):
        image.set_sform(np.diag([6 * factor, 6 * factor, 6 * factor, 1]), 1)
        image.header.set_xyzt_units(units)

    heads(tmp_path / "data", measure)
    rows = opened(tmp_path).images[5].any(axis=1)
    assert 120 < rows.sum() < 185


@pytest.mark.parametrize("factor", [0.001, 0.1, 10])
def test_what_is_no_head_in_size_is_refused_before_decoding(tmp_path, factor, monkeypatch):
    size = np.diag([6 * factor, 6 * factor, 6 * factor, 1])
    heads(tmp_path / "data", lambda image: image.set_sform(size, 1))
    monkeypatch.setattr(decoding, "read_file", None)
    message = failure(opened, tmp_path)
    assert "80 to 400 mm" in message and "3 of 3 files" in message


def test_values_below_zero_that_are_part_of_the_head_are_visible():
    voxels = head((40, 50, 44)).astype(np.float32)
    inside, noise = voxels > 0, np.random.default_rng(0).uniform(-0.5, 0.5, voxels.shape)
    ratio = np.where(inside, voxels / 1200 - 0.5, noise)  # MP2RAGE
    assert (decoding.window(ratio)[inside] > 0).mean() > 0.97
    scores = np.where(inside, (voxels - voxels[inside].mean()) / 100, 0)  # z-scores, masked
    levels = decoding.window(scores)
    assert (levels[inside] > 0).mean() > 0.97 and not levels[~inside].any()
    assert np.corrcoef(levels[inside], scores[inside])[0, 1] > 0.99


def test_label_maps_with_neutral_names_are_left_out_and_counted(tmp_path):
    size = (48, 60, 56)
    for person in range(3):
        folder = tmp_path / "data" / f"sub-{person}"
        nifti(folder / "scan_12.nii", head(size, person))
        nifti(folder / "scan_34.nii", (head(size, person) // 60).astype(np.int16))
    data = opened(tmp_path, slices=4)
    assert len(data.images) == 12 and data.report["ignored"] == {"label maps": 3}


# --- one file a slice ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{0}.nii.gz", "{0}.nii/{0}.nii"])
def test_slices_in_nifti_files_have_levels_and_one_window_a_series(tmp_path, form):
    for person in range(4):
        voxels = head((30, 40, 36), person)
        for week in (0, 1):
            for k in range(12):
                name = f"case_{person:03d}_week_{week}_slice_{k}"
                path = tmp_path / "data" / "keras_slices_data" / form.format(name)
                nifti(path, voxels[:, :, 8 + 2 * k] * (week + 1))
    data = opened(tmp_path)
    assert sum(data.report["slices"].values()) == 96 and not data.report["ignored"]
    assert np.allclose(data.train.levels[:12], np.arange(12) / 11)
    series = data.train.images[data.train.rows[:12]]
    brightness = [np.median(image[image > 0]) for image in series]
    assert (np.diff(brightness) > 0).all()  # a window for each slice would level them
    again = data.train.images[data.train.rows[12:24]]  # twice as bright in the files
    assert np.abs(series.astype(int) - again).max() <= 1


def test_a_series_has_one_window_in_every_command_and_in_any_cache(tmp_path):
    for person in range(4):
        voxels = head((30, 40, 36), person) * (person + 1)  # each person's own scale
        for k in range(12):
            path = tmp_path / "data" / f"P{person:03d}_{k:02d}.nii.gz"
            nifti(path, voxels[:, :, 8 + 2 * k])
    wrong = opened(tmp_path, subject_pattern=r"(P\d+_\d+)")  # each slice is a series
    data = opened(tmp_path)
    assert data.fingerprint != wrong.fingerprint
    assert not np.array_equal(data.images, wrong.images)
    assert np.array_equal(data.images, read_slices(tmp_path / "data", Config()))


def test_many_slices_without_levels_are_said_at_once(tmp_path, capsys):
    for person in range(70):
        png(tmp_path / "data" / f"sub-{person}" / "z.png", grey(person))
    opened(tmp_path)
    assert "no slice levels" in capsys.readouterr().out


# --- what came out, what is not read ------------------------------------------------------


def test_black_and_dark_sources_are_noticed(tmp_path, capsys):
    for name, factor in (("black", 16), ("dark", 6), ("fine", 1)):
        for person in range(4):
            png(tmp_path / name / f"sub-{person}" / "1.png", grey(person) // factor)
    message = failure(opened, tmp_path, "black")
    assert "100% of the decoded slices are blank or black (brightest pixel 15" in message
    opened(tmp_path, "dark")
    assert "brightest pixel of the decoded slices is 4" in capsys.readouterr().err
    opened(tmp_path, "fine")
    assert not capsys.readouterr().err


def test_half_black_heads_are_noticed(tmp_path, capsys):
    checked = np.indices((256, 256)).sum(0) % 2 == 0
    for person in range(3):
        png(tmp_path / "data" / f"sub-{person}" / "1.png", grey(person) * checked + checked)
    opened(tmp_path)
    assert "50% of the pixels inside the heads are black" in capsys.readouterr().err


def test_freesurfer_volumes_are_read(tmp_path):
    for person in range(3):
        path = tmp_path / "data" / f"bert{person}" / "mri" / "norm.mgz"
        path.parent.mkdir(parents=True)
        image = nibabel.MGHImage(head(seed=person).astype(np.float32), np.diag([6.0, 6, 6, 1]))
        nibabel.save(image, path)
    data = opened(tmp_path, slices=4)
    assert data.report["source"] == "FreeSurfer volumes" and len(data.images) == 12


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("a.nrrd", b"NRRD0004", "1 NRRD"),
        ("a.mnc", b"CDF\x01", "1 MINC"),
        ("IM0001", bytes(128) + b"DICM", "1 DICOM"),
        ("scan.0042", bytes(128) + b"DICM", "1 DICOM"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, name, start, said):
    (tmp_path / name).write_bytes(start)
    assert said in failure(sources.find, tmp_path, Config())
    assert "neither PNG nor JPEG" in failure(read_slices, tmp_path / name, Config())


def test_a_link_to_content_that_was_not_fetched_is_explained(tmp_path):
    for name in ("a.nii.gz", "a.png"):
        (tmp_path / name).symlink_to("../.git/annex/objects/x")
        message = failure(read_slices, tmp_path / name, Config())
        assert "content is missing (a link to ../.git/annex" in message


# --- file systems and machines ------------------------------------------------------------


def test_a_folder_that_cannot_be_synced_is_written_to(tmp_path, monkeypatch):
    real = os.fsync

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    files.write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_mount_without_shared_mappings_gets_private_ones(tmp_path, monkeypatch):
    class Refusing(mmap.mmap):
        def __new__(cls, number, length, *rest, **given):
            if given.get("access") != mmap.ACCESS_COPY:
                raise OSError(errno.ENODEV, "No such device")
            return super().__new__(cls, number, length, *rest, **given)

    for person in range(3):
        png(tmp_path / "data" / f"sub-{person}" / "1.png", grey(person))
    wanted = np.array(opened(tmp_path).images)
    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert np.array_equal(opened(tmp_path).images, wanted)
    assert np.array_equal(open_data(config(tmp_path / "data", tmp_path / "b")).images, wanted)


def test_a_gpu_without_kernels_is_not_used(monkeypatch, capsys):
    def refuse(*shape, device=None):
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nmore lines")
        return torch.ones(*shape)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", refuse)
    assert device.choose_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert "no kernel image is available); the CPU is used" in said and "more" not in said
    assert not torch.cuda.is_available()
    assert "use cpu" in failure(device.choose_device, "cuda", code=Exit.USAGE)


def test_a_notebooks_backend_of_matplotlib_is_not_needed(tmp_path):
    backend = "module://matplotlib_inline.backend_inline"
    code = "from scores import figures; import matplotlib; assert matplotlib.get_backend()"
    (tmp_path / "a.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); {code}"
    )
    done = script(tmp_path / "a.py", cwd=tmp_path, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr


def test_text_with_bytes_of_an_ascii_locale_is_written(tmp_path):
    folder = "Gehirn ä".encode().decode("ascii", "surrogateescape")
    files.write_text(tmp_path / "report.html", folder)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "Gehirn ä"
