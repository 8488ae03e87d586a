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
from conftest import ROOT, script
from test_dataset import analyze, config, failure, flat_tree, grey, head, nifti, opened, png

from config import Config
from dataset import open_data, read_slices
from loading import decoding, sources
from support import device, files

# --- one raw scan of each head, by names --------------------------------------------------

LEFT_OUT = {  # files of person {0}, those that are kept first, and why the others are not
    "derivatives": (
        ["sub-{0}/anat/sub-{0}_T1w.nii.gz",
         "derivatives/fmriprep/sub-{0}/anat/sub-{0}_desc-preproc_T1w.nii.gz",
         "derivatives/fmriprep/sub-{0}/anat/sub-{0}_space-MNI_desc-preproc_T1w.nii.gz",
         "derivatives/fmriprep/sub-{0}/anat/sub-{0}_desc-brain_mask.nii.gz"],
        {"derivatives": 2, "segmentations": 1}),
    "variants": (
        ["sub-{0}/sub-{0}_T1w.nii.gz", "sub-{0}/sub-{0}_acq-low_T1w.nii.gz",
         "sub-{0}/sub-{0}_rec-norm_T1w.nii.gz"],
        {"variants of a scan": 2}),
    "unpacked twins": (["sub-{0}/a.nii", "sub-{0}/a.nii.gz"], {"copies unpacked or packed": 1}),
    "unpacked into a folder": (
        ["sub-{0}/a.nii.gz/a.nii", "sub-{0}/a.nii.gz2/a.txt"], {".txt files": 1}),
    "SPM": (
        ["P0{0}/P0{0}_brain.nii", "P0{0}/mP0{0}_brain.nii", "P0{0}/wmP0{0}_brain.nii",
         "P0{0}/c1P0{0}_brain.nii", "P0{0}/mwp1P0{0}_brain.nii"],
        {"processed by SPM": 4}),
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
    "all but a masked brain": (
        ["P0{0}/z1_masked.png", "P0{0}/@eaDir/z1.png/SYNO_THUMB_M.jpg", "P0{0}/._z1.png",
         "P0{0}/__MACOSX/z1.png", "P0{0}/Thumbs.db", "P0{0}/z1_lesionMask.png",
         "P0{0}/z1_GT.png", "P0{0}/z1_mask.png", "P0{0}/labels/z1.png", "P0{0}/z1-seg.png",
         "P0{0}/labelsTr/z1.png", "P0{0}/brainmask.png", "P0{0}/z1_dseg.png"],
        {"system files": 4, "segmentations": 8}),
    "what predict.py writes beside slices": (
        ["sub-{0}/z.png", "sub-{0}/grid.png", "sub-{0}/volume.nii.gz"], {"contact sheets": 2}),
    "a visit in two folders": (
        ["3900{0}_100_700/100.nii", "3900{0}_100_700/700.nii", "3900{0}_700_1500/1500.nii",
         "3900{0}_700_1500/700.nii"],
        {"repeated scans of a session": 1}),
    "a date in two folders": (
        ["I/1{0}S/MPRAGE/2011-03-04_10_11_12.0/I911{0}/x_I911{0}.nii",
         "I/1{0}S/MPRAGE/2012-03-04_10_11_12.0/I931{0}/x_I931{0}.nii",
         "I/1{0}S/MPRAGE/2011-03-04_10_11_12.0/I921{0}/x_I921{0}.nii"],
        {"repeated scans of a session": 1}),
    "a visit in two archives": (
        ["a/P00{0}_v1/brain.nii", "a/P00{0}_v2/brain.nii", "b/P00{0}_v1/brain.nii"],
        {"repeated scans of a session": 1}),
    "three visits, and the date of the data set": (
        [f"set_2019-05-01/sub-{{0}}/ses-{visit}/x_T1w.nii" for visit in (1, 2, 3)], {}),
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
    kept = names[: len(names) - sum(counts.values())]
    items, report = sources.find(touched(tmp_path, names), Config())
    assert {item.name for item in items} == {k.format(p) for k in kept for p in range(1, 5)}
    assert report["ignored"] == {reason: 4 * count for reason, count in counts.items()}
    assert len({item.subject for item in items}) == 4


def test_freesurfer_persons_may_have_names_and_its_templates_are_no_persons(tmp_path):
    people = "bert", "ernie", "al"
    touched(tmp_path, ["{0}/mri/norm.mgz", "{0}/mri/T1.mgz"], people)
    touched(tmp_path, ["{0}/mri/T1.mgz"], ["fsaverage", "fsaverage5"])
    items, _ = sources.find(tmp_path, Config())
    assert sorted(item.name for item in items) == sorted(f"{p}/mri/norm.mgz" for p in people)


def test_what_the_subjects_were_read_from_is_said(tmp_path, capsys):
    flat_tree(tmp_path / "data", people=4, slices=2, name="P{:02d}")
    opened(tmp_path)
    said = capsys.readouterr().out
    assert "subjects guessed by folder 1: P00 from P00/z0.png, P01 from P01/z0.png" in said
    assert "if wrong, give --subject-pattern" in said
    assert "no overlap, if subjects are guessed right" in said


# --- what headers say ---------------------------------------------------------------------


def heads(root: Path, change, axis=2):
    """A small BIDS tree with the height along `axis`; change(image) changes each header."""
    for person in range(3):
        path = root / f"sub-{person}" / f"sub-{person}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        voxels = np.moveaxis(head(seed=person), 2, axis)
        image = nibabel.Nifti1Image(voxels, np.diag([6.0, 6, 6, 1]))
        change(image)
        nibabel.save(image, path)


@pytest.mark.parametrize("kind", ["NIfTI", "Analyze"])
def test_a_header_without_orientation_asks_for_the_axis_and_obeys_it(tmp_path, kind):
    def forget(image):
        image.set_sform(image.affine, 0)
        image.set_qform(image.affine, 0)

    if kind == "NIfTI":
        heads(tmp_path / "data", forget, axis=0)
    else:
        for scan in ("OAS1_0001_MR1", "OAS1_0002_MR1", "OAS1_0003_MR1"):
            path = tmp_path / "data" / scan / "RAW" / f"{scan}_mpr-1_anon.hdr"
            analyze(path, np.moveaxis(head(), 2, 0))
    assert "--axis 0, 1 or 2" in failure(opened, tmp_path)
    data = opened(tmp_path, axis=0, slices=28)
    brightness = [image[image > 0].mean() for image in data.images[:20]]
    assert np.corrcoef(brightness, np.arange(20))[0, 1] > 0.95  # brighter to the top


@pytest.mark.parametrize(("units", "factor"), [("meter", 0.001), ("micron", 1000), ("mm", 1)])
def test_units_of_the_header_are_honoured(tmp_path, units, factor):
    def measure(image):
        image.set_sform(np.diag([6 * factor] * 3 + [1]), 1)
        image.header.set_xyzt_units(units)

    heads(tmp_path / "data", measure)
    assert 120 < opened(tmp_path).images[5].any(axis=1).sum() < 185


@pytest.mark.parametrize("factor", [0.001, 0.1, 10])
def test_what_is_no_head_in_size_is_refused_before_decoding(tmp_path, factor, monkeypatch):
    size = np.diag([6 * factor] * 3 + [1])
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
        nifti(folder / "scan_12.nii", (head(size, person) // 5).astype(np.uint8))  # 8 bits
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


# --- what came out, what is not read ------------------------------------------------------


def test_black_dark_and_half_black_sources_are_noticed(tmp_path, capsys):
    checked = np.indices((256, 256)).sum(0) % 2 == 0
    for person in range(4):
        image, name = grey(person), f"sub-{person}/1.png"
        png(tmp_path / "black" / name, image // 16)
        png(tmp_path / "dark" / name, image // 6)
        png(tmp_path / "half" / name, image * checked + checked)
        png(tmp_path / "fine" / name, image)
    message = failure(opened, tmp_path, "black")
    assert "100% of the decoded slices are blank or black (brightest pixel 15" in message
    opened(tmp_path, "dark")
    assert "brightest pixel of the decoded slices is 4" in capsys.readouterr().err
    opened(tmp_path, "half")
    assert "50% of the pixels inside the heads are black" in capsys.readouterr().err
    opened(tmp_path, "fine")
    assert not capsys.readouterr().err


def test_freesurfer_volumes_are_read(tmp_path):
    for person in range(3):
        nifti(tmp_path / "data" / f"bert{person}" / "mri" / "norm.mgz", head(seed=person))
    data = opened(tmp_path, slices=4)
    assert data.report["source"] == "FreeSurfer volumes" and len(data.images) == 12


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [("a.nrrd", b"NRRD0004", "1 NRRD"), ("a.mnc", b"CDF\x01", "1 MINC"),
     ("IM0001", bytes(128) + b"DICM", "1 DICOM"),
     ("scan.0042", bytes(128) + b"DICM", "1 DICOM")],
)  # fmt: skip
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
    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    files.write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_mount_without_shared_mappings_gets_private_ones(tmp_path, monkeypatch):
    class Refusing(mmap.mmap):
        def __new__(cls, number, length, *rest, **given):
            if given.get("access") != mmap.ACCESS_COPY:
                raise OSError(errno.ENODEV, "No such device")
            return super().__new__(cls, number, length, *rest, **given)

    flat_tree(tmp_path / "data", people=3, slices=1)
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


def test_a_notebooks_backend_of_matplotlib_is_not_needed(tmp_path):
    backend = "module://matplotlib_inline.backend_inline"
    code = "from scores import figures; import matplotlib; assert matplotlib.get_backend()"
    (tmp_path / "a.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}")
    done = script(tmp_path / "a.py", cwd=tmp_path, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr


def test_text_with_bytes_of_an_ascii_locale_is_written(tmp_path):
    folder = "Gehirn ä".encode().decode("ascii", "surrogateescape")
    files.write_text(tmp_path / "report.html", folder)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "Gehirn ä"
