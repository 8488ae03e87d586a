"""Every layout and trap of real data, each on a tiny tree made for it.

A trap's test must be able to fail: most compare with the pixels that went in, not with a run.
"""

import gzip
import json
import os
import shutil
import struct
import time
import zlib
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
import decoding
import embedded
import sources
from config import Config, Exit, UserError
from dataset import open_data, read_slices
from decoding import letterbox, read_image, window

# --- builders -----------------------------------------------------------------------------


def grey(seed: int, shape=(256, 256)) -> np.ndarray:
    """A smooth picture with many greys, different for each seed: uint8."""
    noise = np.random.default_rng(seed).random((9, 9), np.float32)
    return (
        255 * cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)
    ).astype(np.uint8)


def png(path: Path, image: np.ndarray, *flags) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, blob = cv2.imencode(path.suffix, image, list(flags))
    assert done
    path.write_bytes(blob.tobytes())
    return path


def course_tree(root: Path, train=6, validate=2, test=2, slices=4) -> Path:
    """Layout A, with its segmentation twins."""
    case = 0
    for part, count in (("train", train), ("validate", validate), ("test", test)):
        for _ in range(count):
            case += 1
            for k in range(slices):
                name = f"{case:03d}_slice_{k}.nii.png"
                png(root / f"keras_png_slices_{part}" / f"case_{name}", grey(100 * case + k))
                labels = (grey(k) // 86).astype(np.uint8) * 85
                png(root / f"keras_png_slices_seg_{part}" / f"seg_{name}", labels)
    return root


def flat_tree(root: Path, people=10, slices=3) -> Path:
    for person in range(people):
        for k in range(slices):
            png(root / f"sub-{person:02d}" / f"z{k}.png", grey(50 * person + k))
    return root


def head(shape=(24, 30, 28), seed=0, low=0) -> np.ndarray:
    """An ellipsoid brain brighter to the top (+2), the front (+1) and the right (+0): int16."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.95
    values = 600 + 100 * x + 150 * y + 300 * z
    values += np.random.default_rng(seed).normal(0, 3, shape)
    return np.where(inside, values, low).astype(np.int16)


def nifti(path: Path, voxels: np.ndarray, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def analyze(path: Path, voxels: np.ndarray, endian=">") -> Path:
    """Plain Analyze 7.5, as OASIS-1 ships: big-endian."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nibabel.AnalyzeHeader(endianness=endian)
    header.set_data_dtype(np.int16)
    header.set_data_shape(voxels.shape)
    header.set_zooms([1] * voxels.ndim)
    image = nibabel.AnalyzeImage(voxels, None, header)
    nibabel.AnalyzeImage.to_filename(image, str(path))
    return path


def t88(root: Path, person: int, session=1, n=4, shape=(44, 52, 44)) -> Path:
    scan = f"OAS1_{person:04d}_MR{session}"
    folder = root / f"disc{person % 2 + 1}" / scan / "PROCESSED" / "MPRAGE" / "T88_111"
    voxels = head(shape, seed=person)[..., None]
    return analyze(folder / f"{scan}_mpr_n{n}_anon_111_t88_masked_gfc.hdr", voxels)


def config(data, tmp_path: Path, **options) -> Config:
    return Config(data=str(data), cache=str(tmp_path / "cache"), **options)


def failure(call, *arguments, code=Exit.DATA) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert caught.value.code == code
    return str(caught.value)


def subjects(split) -> set[str]:
    return set(split.subjects.tolist())


# --- the embedded set ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded_data(tmp_path_factory):
    cache = tmp_path_factory.mktemp("embedded")
    return open_data(Config(subjects=(3, 2, 2), slices=6, cache=str(cache)))


def test_embedded_set_is_what_was_asked_for(embedded_data):
    data = embedded_data
    assert [len(split) for split in (data.train, data.validation, data.test)] == [18, 12, 12]
    assert data.embedded and data.stamp == ""
    assert not subjects(data.train) & (subjects(data.validation) | subjects(data.test))
    assert data.images.shape == (42, 256, 256) and data.images.dtype == np.uint8
    assert np.allclose(data.train.levels[:6], np.linspace(0, 1, 6))
    json.dumps(data.report, allow_nan=False)


def test_embedded_brains_fill_the_frame_like_oasis(embedded_data):
    brain = embedded_data.images > 0
    for person in brain.reshape(7, 6, 256, 256):
        union = person.any(axis=0)
        assert 130 <= union.any(axis=0).sum() <= 170 and 165 <= union.any(axis=1).sum() <= 200
        assert (person.mean(axis=(1, 2)) > 0.14 * 176 * 208 / 256**2).all()
    assert not brain[:, :20].any() and not brain[:, :, :36].any()  # black background


def test_embedded_people_differ_but_the_same_numbers_give_the_same_brain(embedded_data):
    again = embedded.subject_slices(0, 0, 1, 6)
    assert np.array_equal(again, embedded_data.images[6:12])
    first, second, other_part = (embedded_data.images[i].astype(float) for i in (3, 9, 21))
    for one, two in ((first, second), (first, other_part)):
        assert np.abs(one - two).mean() > 4
    assert not np.array_equal(embedded.subject_slices(1, 0, 1, 6), again)


def test_more_training_subjects_leave_the_test_people_alone(embedded_data, tmp_path):
    more = open_data(Config(subjects=(4, 2, 2), slices=6, cache=str(tmp_path)))
    assert torch.equal(more.test.batch(range(12)), embedded_data.test.batch(range(12)))
    assert more.fingerprint != embedded_data.fingerprint


def test_a_slice_is_float32_from_0_to_1_with_its_level(embedded_data):
    split = embedded_data.validation
    image, level = split[7]
    assert image.shape == (1, 256, 256) and image.dtype == torch.float32
    assert float(image.min()) == 0 and 0.9 < float(image.max()) <= 1
    assert level == pytest.approx(0.2)
    batch = split.batch(torch.tensor([7, 0]))
    assert batch.shape == (2, 1, 256, 256) and torch.equal(batch[0], image)
    assert torch.equal(
        batch[1, 0] * 255, torch.from_numpy(split.images[split.rows[0]].astype("f4"))
    )


def test_seed_of_the_run_does_not_move_the_split(tmp_path):
    tree = flat_tree(tmp_path / "data")
    runs = [open_data(config(tree, tmp_path, seed=seed)) for seed in (0, 7)]
    assert subjects(runs[0].test) == subjects(runs[1].test)
    assert runs[0].fingerprint == runs[1].fingerprint


# --- layouts ------------------------------------------------------------------------------


def test_a_course_set_with_its_folders_honoured(tmp_path, capsys):
    data = open_data(config(course_tree(tmp_path / "keras_png_slices_data"), tmp_path))
    assert data.report["slices"] == {"train": 24, "validation": 8, "test": 8}
    assert data.report["subjects"] == {"train": 6, "validation": 2, "test": 2}
    assert data.report["ignored"] == {"segmentations": 40}
    assert subjects(data.validation) == {"case_007", "case_008"}
    assert data.stamp == "contains training data, do not publish"
    assert np.array_equal(data.train.images[data.train.rows[5]], grey(201))
    assert "40 segmentations" in capsys.readouterr().out


def test_a_course_set_nested_once_more(tmp_path):
    course_tree(tmp_path / "data" / "again" / "slices")
    assert open_data(config(tmp_path / "data", tmp_path)).report["slices"]["train"] == 24


def test_a_without_validation_folder_takes_training_subjects(tmp_path):
    course_tree(tmp_path / "data", validate=0)
    data = open_data(config(tmp_path / "data", tmp_path))
    assert data.report["subjects"] == {"train": 5, "validation": 1, "test": 2}
    assert subjects(data.test) == {"case_007", "case_008"}


def test_slices_are_in_natural_order(tmp_path):
    for case in range(3):
        for k in range(12):
            png(tmp_path / "data" / f"case_{case}_slice_{k}.png", grey(12 * case + k))
    split = open_data(config(tmp_path / "data", tmp_path)).train
    first = int(split.subjects[0][-1])
    for k in (2, 10):
        assert np.array_equal(split.images[split.rows[k]], grey(12 * first + k))
        assert split.levels[k] == pytest.approx(k / 11)


def test_b_oasis1_talairach_is_padded_exactly_and_not_squashed(tmp_path):
    for person, n in ((1, 3), (2, 4), (3, 6)):
        path = t88(tmp_path / "data", person, n=n, shape=(176, 208, 176))
    (tmp_path / "data" / "disc1" / "OAS1_0009_MR1").mkdir()
    raw = tmp_path / "data" / "disc1" / "OAS1_0009_MR1" / "RAW" / "OAS1_0009_MR1_mpr-1_anon.hdr"
    analyze(raw, head((12, 16, 16)))
    labels = (
        path.parents[2] / "FSL_SEG" / "OAS1_0003_MR1_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr"
    )
    analyze(labels, (head((8, 8, 8)) > 600).astype(np.int16))
    data = open_data(config(tmp_path / "data", tmp_path, slices=8))
    assert data.report["source"].startswith("OASIS-1")
    assert data.report["notes"] == ["found 3 of 4 sessions"]
    assert data.report["ignored"] == {"segmentations": 1, "other versions of the scans": 1}
    assert all(len(split) == 8 for split in (data.train, data.validation, data.test))
    # The lowest slice with 15 % brain, shown anterior up in its 208 x 176.
    voxels = head((176, 208, 176), seed=3)
    levels = window(voxels)
    enough = np.flatnonzero((levels > 12.75).mean(axis=(0, 1)) >= 0.15)
    wanted = np.zeros((256, 256), np.uint8)
    wanted[24:232, 40:216] = levels[:, ::-1, enough[0]].T
    assert np.array_equal(data.images[16], wanted)


def test_b_sessions_of_one_person_are_one_subject(tmp_path):
    for person, session in ((1, 1), (1, 2), (2, 1), (3, 1)):
        t88(tmp_path / "data", person, session)
    data = open_data(config(tmp_path / "data", tmp_path, slices=2))
    assert sum(data.report["subjects"].values()) == 3
    home = [s for s in (data.train, data.validation, data.test) if "OAS1_0001" in s.subjects]
    assert len(home) == 1 and (home[0].subjects == "OAS1_0001").sum() == 4


def test_b_raw_analyze_asks_for_its_axis(tmp_path):
    for person in range(3):
        scan = f"OAS1_{person:04d}_MR1"
        voxels = np.moveaxis(head((24, 30, 28), seed=person), 2, 0)
        analyze(tmp_path / "data" / scan / "RAW" / f"{scan}_mpr-1_anon.hdr", voxels)
    assert "--axis" in failure(open_data, config(tmp_path / "data", tmp_path))
    data = open_data(config(tmp_path / "data", tmp_path, axis=0, slices=28))
    brightness = [image[image > 0].mean() for image in data.images[:23]]
    assert np.corrcoef(brightness, np.arange(23))[0, 1] > 0.95


def test_c_bids_takes_one_t1w_a_session(tmp_path):
    for person in ("OAS30001", "OAS30002", "OAS30003"):
        for session in ("d0129", "d0757"):
            stem = f"sub-{person}/ses-{session}/anat/sub-{person}_ses-{session}"
            nifti(tmp_path / "data" / f"{stem}_run-01_T1w.nii.gz", head())
            nifti(tmp_path / "data" / f"{stem}_run-02_T1w.nii.gz", head(seed=2))
            nifti(tmp_path / "data" / f"{stem}_T2w.nii.gz", head(seed=3))
    data = open_data(config(tmp_path / "data", tmp_path, slices=5))
    assert data.report["slices"] == {"train": 10, "validation": 10, "test": 10}
    assert subjects(data.train) < {"OAS30001", "OAS30002", "OAS30003"}
    assert data.report["ignored"] == {
        "other versions of the scans": 6,
        "repeated runs of a session": 6,
    }


def test_c_oasis3_folders(tmp_path):
    for person in range(1, 4):
        for day in ("d0001", "d0900"):
            name = f"OAS3000{person}_MR_{day}/anat2/sub-OAS3000{person}_ses-{day}_T1w.nii.gz"
            nifti(tmp_path / "data" / name, head(seed=person))
    data = open_data(config(tmp_path / "data", tmp_path, slices=3))
    assert [len(subjects(s)) for s in (data.train, data.validation, data.test)] == [1, 1, 1]


def test_d_colour_jpegs_in_folders_of_classes(tmp_path):
    for person in range(1, 5):
        for repeat in (1, 2):
            for k in (100, 101):
                name = f"OAS1_{person:04d}_MR1_mpr-{repeat}_{k}.jpg"
                folder = tmp_path / "data" / ("Mild Dementia" if person % 2 else "Non Demented")
                png(folder / name, cv2.merge([grey(person, (248, 496))] * 3), 1, 100)
    data = open_data(config(tmp_path / "data", tmp_path))
    assert sum(data.report["subjects"].values()) == 4
    frame = data.images[0]
    assert not frame[:64].any() and not frame[192:].any() and frame[64:192].mean() > 60
    assert sorted(set(data.train.levels.tolist())) == [0, 1]  # levels within each repeat


@pytest.mark.parametrize("name", ["aligned_norm", "slice_norm"])
def test_e_neurite(tmp_path, name):
    for person in range(1, 4):
        folder = tmp_path / "data" / f"OASIS_OAS1_{person:04d}_MR1"
        voxels = head((16, 28, 32)).astype(np.float32) / 1000
        affine = np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])  # L,I,A
        nifti(
            folder / f"{name}.nii.gz", voxels if name[0] == "a" else voxels[..., 16:17], affine
        )
        nifti(folder / "norm.nii.gz", voxels, affine)
        nifti(folder / "seg35.nii.gz", (voxels * 35).astype(np.int16))
    data = open_data(config(tmp_path / "data", tmp_path, slices=4))
    many = name == "aligned_norm"
    assert data.report["slices"]["train"] == (4 if many else 1)
    assert np.isnan(data.train.levels).all() != many
    assert data.report["ignored"]["segmentations"] == 3


def test_f_one_folder_per_person(tmp_path):
    data = open_data(config(flat_tree(tmp_path / "data"), tmp_path))
    assert sum(data.report["subjects"].values()) == 10 and len(data.images) == 30
    assert all(len(subjects(s)) >= 2 for s in (data.validation, data.test))


@pytest.mark.parametrize(
    ("pattern", "people"),
    [
        ("IXI{0:03d}-Guys-T1.nii.gz", 5),  # the name of a volume
        ("{0}/T1.nii.gz", 5),  # its folder
        ("a_{0}_z{1}.png", 5),  # the head of an image's name
        ("p{0:02d}/{1}.png", 5),  # its folder
        ("class_1/p{0:02d}_{1}.png", 5),  # not the folder of a class
        ("SUB_{0:02d}/x/{1}.png", 5),
    ],
)
def test_f_subjects_from_file_or_folder_names(tmp_path, pattern, people):
    for person in range(people):
        for k in (1, 2):
            path = tmp_path / "data" / pattern.format(person, k)
            if path.suffix == ".png":
                png(path, grey(person * 2 + k, (40, 40)))
            else:
                nifti(path, head(seed=person))
    data = open_data(config(tmp_path / "data", tmp_path, slices=2))
    assert sum(data.report["subjects"].values()) == people


def test_folders_of_classes_are_not_people(tmp_path):
    for person in range(5):
        for stage in range(4):
            path = tmp_path / "data" / f"class_{stage}" / f"p{person:02d}_{stage}.png"
            png(path, grey(person * 4 + stage, (40, 40)))
    data = open_data(config(tmp_path / "data", tmp_path))
    assert subjects(data.train) < {f"p{person:02d}" for person in range(5)}


# --- intensity ----------------------------------------------------------------------------


def test_window_is_of_the_volume_not_the_slice(tmp_path):
    path = nifti(tmp_path / "a.nii", head((64, 80, 70)))
    stack = read_slices(path, config("", tmp_path, slices=20))
    brightness = [np.median(image[image > 0]) for image in stack]
    assert (np.diff(brightness) > 0).all()  # the head is brighter to its top


def test_window_ignores_what_is_not_finite_and_counts_only_above_zero():
    voxels = head().astype(np.float32)
    clean = window(voxels)
    low, high = np.percentile(voxels[voxels > 0], (0.5, 99.5))
    assert np.abs(clean - 255 * ((voxels - low) / (high - low)).clip(0, 1)).max() < 0.51
    voxels[0, 0, :3] = np.nan, np.inf, -np.inf
    assert np.array_equal(window(voxels), clean)
    voxels[1, 0, 0] = -1e30
    assert np.array_equal(window(voxels), clean)


@pytest.mark.parametrize("value", [0, 7, -3, np.nan])
def test_a_constant_volume_is_refused(tmp_path, value):
    path = nifti(tmp_path / "a.nii.gz", np.full((8, 8, 8), value, np.float32))
    assert "volume" in failure(read_slices, path, config("", tmp_path))


def test_byte_order_does_not_matter(tmp_path):
    voxels = head()
    stacks = [
        read_slices(
            analyze(tmp_path / f"x{i}_t88_masked_gfc.hdr", voxels, end), Config(slices=3)
        )
        for i, end in enumerate("<>")
    ]
    assert np.array_equal(*stacks)


def test_12_bit_pngs_do_not_come_out_black_and_share_one_scale(tmp_path):
    bright, dark = grey(1).astype(np.uint16) * 16, grey(2).astype(np.uint16) * 4
    png(tmp_path / "data" / "a_1.png", bright)
    png(tmp_path / "data" / "a_2.png", dark)
    stack = read_slices(tmp_path / "data", Config())
    assert np.abs(stack[0] - bright * (255 / 4095)).max() <= 0.51
    assert np.abs(stack[1] - dark * (255 / 4095)).max() <= 0.51


def test_people_of_a_12_bit_source_share_one_scale(tmp_path):
    for person, factor in enumerate((16, 4, 4)):
        png(tmp_path / "data" / f"sub-{person}.png", grey(person).astype(np.uint16) * factor)
    images = open_data(config(tmp_path / "data", tmp_path)).images
    assert np.abs(images[1] - grey(1) * (4 * 255 / 4095)).max() <= 0.51


# --- twins of a grey image ----------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )


def _raw_png(image: np.ndarray, colour: int, *extra: bytes, depth: int = 8) -> bytes:
    """A PNG of samples (H,W) or (H,W,C) below 2**depth, written by hand."""
    samples = image.reshape(*image.shape[:2], -1)
    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], depth, colour, 0, 0, 0)
    bits = np.unpackbits(samples.astype(">u2")[..., None].view(np.uint8), axis=3)
    rows = np.packbits(bits[..., 16 - depth :].reshape(len(image), -1), axis=1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [_chunk(b"IHDR", head), *extra, _chunk(b"IDAT", zlib.compress(pixels))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _exif(orientation: int) -> bytes:
    return (
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"
        + struct.pack(">HH", orientation, 0)
        + b"\0" * 4
    )


def _encoded(image, kind=".png", *flags) -> bytes:
    return cv2.imencode(kind, image, list(flags))[1].tobytes()


def _palette(image) -> bytes:
    shuffled = np.random.default_rng(0).permutation(256).astype(np.uint8)
    table = np.empty(256, np.uint8)
    table[shuffled] = np.arange(256)
    return _raw_png(shuffled[image], 3, _chunk(b"PLTE", np.repeat(table, 3).tobytes()))


@pytest.mark.parametrize(
    "encode",
    [
        lambda x: _encoded(x),
        lambda x: _encoded(cv2.merge([x, x, x])),
        lambda x: _encoded(cv2.merge([x, x, x, np.full_like(x, 255)])),
        lambda x: _encoded(x.astype(np.uint16) * 257),
        lambda x: _encoded(cv2.merge([x.astype(np.uint16) * 257] * 3)),
        lambda x: _raw_png(np.stack([x, np.full_like(x, 255)], axis=2), 4),
        _palette,
        lambda x: _raw_png(np.rot90(x), 0, _chunk(b"eXIf", _exif(6))),
    ],
    ids=["grey", "rgb", "rgba", "grey16", "rgb16", "grey-alpha", "palette", "png-exif"],
)
def test_twins_load_as_the_same_image(encode):
    image = grey(3, (60, 90))
    assert np.array_equal(read_image(encode(image)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_turned_as_its_exif_says(channels):
    image = grey(4, (64, 96))
    blob = _encoded(
        cv2.merge([np.rot90(image)] * channels), ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100
    )
    body = b"Exif\0\0" + _exif(6)
    turned = blob[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + blob[2:]
    assert np.abs(read_image(turned).astype(int) - image).max() <= 6


def test_what_is_transparent_is_black():
    image = cv2.merge([np.full((20, 20), 200, np.uint8)] * 3 + [np.zeros((20, 20), np.uint8)])
    assert read_image(_encoded(image)).max() == 0


# --- geometry -----------------------------------------------------------------------------

FLIPS = {
    "RAS": np.diag([1, 1, 1, 1.0]),
    "LAS": np.diag([-1, 1, 1, 1.0]),
    "LIA": np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]),
    "PSR": np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]]),
}


@pytest.mark.parametrize("axes", FLIPS)
def test_any_axis_order_gives_the_same_axial_slices(tmp_path, axes):
    reference = nibabel.Nifti1Image(head((40, 50, 44)), np.eye(4))
    wanted = nibabel.io_orientation(FLIPS[axes])
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(np.eye(4)), wanted)
    nibabel.save(reference.as_reoriented(turn), tmp_path / "turned.nii.gz")
    assert "".join(nibabel.aff2axcodes(nibabel.load(tmp_path / "turned.nii.gz").affine)) == axes
    stack = read_slices(tmp_path / "turned.nii.gz", Config(slices=6))
    image = stack[3].astype(float)
    rows, columns = np.nonzero(image)
    assert np.ptp(rows) > np.ptp(columns)  # 50 mm from front to back, 40 from side to side
    values = image[rows, columns]
    assert np.corrcoef(values, rows)[0, 1] < -0.5  # brighter to the front, which is up
    assert np.corrcoef(values, columns)[0, 1] < -0.3  # and to the right, which is on the left


def test_only_trailing_axes_of_one_are_dropped(tmp_path):
    flat = read_slices(nifti(tmp_path / "a.nii", head()[..., None, None]), Config(slices=4))
    assert np.array_equal(
        flat, read_slices(nifti(tmp_path / "b.nii", head()), Config(slices=4))
    )
    series = nifti(tmp_path / "c.nii", np.stack([head(), head()], axis=-1))
    assert "series" in failure(read_slices, series, Config())
    thin = read_slices(
        nifti(tmp_path / "d.nii", head()[:, 15:16]), Config()
    )  # one coronal slice
    assert thin.shape == (1, 256, 256)
    assert np.count_nonzero(thin[0].any(axis=1)) > 20
    assert read_slices(nifti(tmp_path / "e.nii", head()[:, :, 14]), Config()).shape[0] == 1


def test_spacing_is_in_millimetres(tmp_path):
    voxels = head((100, 40, 30))
    path = nifti(tmp_path / "a.nii", voxels, np.diag([1.0, 4.0, 2.0, 1.0]))
    image = read_slices(path, Config(slices=5))[2]
    assert np.count_nonzero(image.any(axis=0)) == pytest.approx(98, abs=4)
    assert np.count_nonzero(image.any(axis=1)) == pytest.approx(160, abs=8)


def test_spacing_follows_the_axes(tmp_path):
    image = nibabel.Nifti1Image(head((60, 30, 40)), np.diag([1.0, 4.0, 2.0, 1.0]))
    turn = nibabel.orientations.axcodes2ornt("PSR")
    nibabel.save(image.as_reoriented(turn), tmp_path / "turned.nii")
    nibabel.save(image, tmp_path / "straight.nii")
    one, two = (read_slices(tmp_path / f"{n}.nii", Config()) for n in ("turned", "straight"))
    assert np.array_equal(one, two)


def test_letterbox_pads_exactly_and_keeps_proportions():
    image = grey(5, (208, 176))
    assert np.array_equal(letterbox(image)[24:232, 40:216], image)
    assert np.array_equal(letterbox(image, (1.0000001, 1.0))[24:232, 40:216], image)
    assert not letterbox(image)[:24].any() and not letterbox(image)[:, 216:].any()
    wide = letterbox(np.full((100, 512), 255, np.uint8))
    assert np.count_nonzero(wide.any(axis=1)) == 50 and wide.any(axis=0).all()
    small = letterbox(np.full((32, 64), 255, np.uint8))
    assert np.count_nonzero(small.any(axis=1)) == 128 and small.any(axis=0).all()


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.one_of(st.none(), st.floats(0.2, 8)),
    st.floats(0.2, 8),
)
@settings(max_examples=60, deadline=None)
def test_letterbox_takes_any_shape(height, width, tall_mm, wide_mm):
    spacing = None if tall_mm is None else (tall_mm, wide_mm)
    frame = letterbox(np.full((height, width), 255, np.uint8), spacing)
    ratio = height / width if spacing is None else height * tall_mm / (width * wide_mm)
    tall, wide = frame.any(axis=1).sum(), frame.any(axis=0).sum()
    assert abs(tall - ratio * wide) <= 0.5 * (1 + ratio) + 1 or min(tall, wide) == 1
    assert frame.shape == (256, 256) and (frame == 255).sum() == tall * wide


def test_mixed_sizes_work(tmp_path):
    for person in range(3):
        png(tmp_path / "data" / f"sub-{person}" / "z1.png", grey(1, (208, 176)))
        png(tmp_path / "data" / f"sub-{person}" / "z2.png", grey(2, (300, 310)))
    assert len(open_data(config(tmp_path / "data", tmp_path)).images) == 6


def test_volume_slices_span_the_brain_evenly(tmp_path):
    voxels = np.zeros((20, 20, 60), np.float32)
    voxels[5:15, 5:15, 10:51] = np.arange(1, 61)[10:51]  # 25 % brain at heights 10 to 50
    voxels[9:11, 9:11, 5:10] = 30  # 1 %: a wisp
    stack = read_slices(nifti(tmp_path / "a.nii", voxels), Config(slices=5))
    middle = stack[:, 128, 128].astype(int)
    assert len(stack) == 5 and (np.abs(np.diff(middle, 2)) <= 8).all()
    assert len(read_slices(tmp_path / "a.nii", Config(slices=200))) <= 41


# --- damage -------------------------------------------------------------------------------


def _flip(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 0x10]) + blob[at + 1 :]


PNG, JPEG = _encoded(grey(1)), _encoded(grey(1), ".jpg")
DAMAGE = {  # bytes, and what must be said of them (some decoders notice nothing)
    "empty": (b"", "empty"),
    "text": (b"not an image at all", "neither PNG nor JPEG"),
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated PNG"),
    "PNG without its end": (PNG[:-12], "truncated PNG"),
    "PNG, flipped byte": (_flip(PNG, len(PNG) // 2), "checksum"),
    "PNG, signature only": (PNG[:8], "truncated PNG"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated JPEG"),
    "JPEG without its end": (JPEG[:-2], "truncated JPEG"),
    "JPEG, two bytes": (JPEG[:2], "truncated JPEG"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_images_are_never_let_through(kind):
    blob, reason = DAMAGE[kind]
    with pytest.raises(decoding.Unreadable, match=reason):
        read_image(blob)


def test_a_thumbnail_s_end_is_not_the_jpeg_s_end():
    body = b"Exif\0\0" + JPEG
    nested = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + JPEG[2:]
    assert read_image(nested).shape == (256, 256)
    with pytest.raises(decoding.Unreadable, match="truncated JPEG"):
        read_image(nested[:-2000])


@given(st.binary(max_size=200), st.sampled_from([b"", PNG[:8], PNG[:33], JPEG[:2], JPEG[:200]]))
@settings(max_examples=150, deadline=None)
def test_garbage_is_unreadable_not_a_crash(garbage, start):
    with pytest.raises(decoding.Unreadable):
        read_image(start + garbage)


def test_a_huge_claim_is_refused_in_no_time(tmp_path):
    ihdr = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    blob = PNG[:8] + _chunk(b"IHDR", ihdr) + PNG[33:]
    jpeg = bytearray(JPEG)
    at = jpeg.find(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    path = nifti(tmp_path / "a.nii", head())
    header = bytearray(path.read_bytes())
    header[40:48] = struct.pack("<4h", 3, 30000, 30000, 30000)
    path.write_bytes(header)
    start = time.perf_counter()
    for picture in (blob, bytes(jpeg)):
        with pytest.raises(decoding.Unreadable, match="60000 x 60000"):
            read_image(picture)
    assert "30000" in failure(read_slices, path, Config())
    assert time.perf_counter() - start < 1


def test_a_flipped_byte_in_a_gzip_is_found(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", head())
    plain = gzip.decompress(path.read_bytes())
    stored = bytearray(gzip.compress(plain, compresslevel=0))
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    assert np.asanyarray(nibabel.load(path).dataobj).size  # nibabel alone does not notice
    assert "CRC" in failure(read_slices, path, Config())


@pytest.mark.parametrize("keep", [0, 100, 400, 5000])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a_t88_masked_gfc.img"])
def test_truncated_volumes(tmp_path, name, keep):
    path = tmp_path / name
    if name.endswith(".img"):
        analyze(path.with_suffix(".hdr"), head())
    else:
        nifti(path, head())
    path.write_bytes(path.read_bytes()[:keep])
    failure(read_slices, path, Config())


def test_a_header_without_its_pixels(tmp_path):
    analyze(tmp_path / "a_t88_masked_gfc.hdr", head())
    (tmp_path / "a_t88_masked_gfc.img").unlink()
    failure(read_slices, tmp_path / "a_t88_masked_gfc.hdr", Config())


def test_up_to_one_percent_is_skipped_and_listed(tmp_path, capsys):
    tree = tmp_path / "data"
    for person in range(40):
        for k in range(10):
            png(tree / f"case_{person:03d}_slice_{k}.png", grey(10 * person + k, (48, 48)))
    bad = {
        "case_000_slice_3.png": PNG[:500],
        "case_001_slice_0.png": b"",
        "case_002_slice_1.png": b"text",
    }
    for name, blob in bad.items():
        (tree / name).write_bytes(blob)
    (tree / "._case_003_slice_1.png").write_bytes(b"\0\5\x16\7")
    (tree / "notes.txt").write_text("hello")
    data = open_data(config(tree, tmp_path))
    assert {s["file"] for s in data.report["skipped"]} == set(bad)
    assert sum(data.report["slices"].values()) == len(data.images) == 397
    assert data.report["ignored"] == {"system files": 1, ".txt files": 1}
    at = (
        list(data.train.subjects).index("case_010")
        if "case_010" in data.train.subjects
        else None
    )
    if at is not None:  # rows after a skipped file still belong to their subject
        wanted = letterbox(grey(100, (48, 48)))
        assert np.array_equal(data.images[data.train.rows[at]], wanted)
    message = failure(open_data, config(tree, tmp_path, strict=True))
    assert "3 of 400" in message and "--strict" in message
    for name in ("case_004_slice_3.png", "case_005_slice_3.png"):
        (tree / name).write_bytes(b"")
    assert "1 %" in failure(open_data, config(tree, tmp_path))
    assert "case_000_slice_3.png" in capsys.readouterr().err


# --- what is not data ---------------------------------------------------------------------


def test_unusable_paths_name_the_accepted_layouts(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.dcm").write_bytes(b"x")
    (tmp_path / "file.png").write_bytes(PNG)
    course_tree(tmp_path / "course")
    segmentations = tmp_path / "course" / "keras_png_slices_seg_train"
    for path in ("missing", "empty", "other", "file.png", segmentations):
        message = failure(open_data, config(tmp_path / path, tmp_path))
        assert "NIfTI" in message and "OAS1" in message and str(path) in message
    assert ".dcm" in failure(open_data, config(tmp_path / "other", tmp_path))
    assert not (tmp_path / "cache").exists()


def test_segmentations_without_a_telling_name_are_refused(tmp_path):
    for case in range(4):
        for k in range(3):
            labels = (grey(k + case) // 40).astype(np.uint8) * 40  # 7 greys
            png(tmp_path / "data" / f"case_{case}_slice_{k}.png", labels)
    assert "8 grey" in failure(open_data, config(tmp_path / "data", tmp_path))
    assert not list((tmp_path / "cache").glob("*"))


def test_system_files_and_segmentations_are_skipped_and_counted(tmp_path):
    tree = flat_tree(tmp_path / "data", people=4)
    png(tree / "__MACOSX" / "sub-00" / "z0.png", grey(0))
    png(tree / "sub-00" / "._z0.png", grey(0))
    (tree / "Thumbs.db").write_bytes(b"x")
    for name in ("z0_mask.png", "labels/z0.png", "z0-seg.png", "brainmask.png", "z0_dseg.png"):
        png(tree / "sub-00" / name, grey(0))
    png(tree / "sub-00" / "z9_masked.png", grey(0))  # a masked brain is a brain
    data = open_data(config(tree, tmp_path))
    assert len(data.images) == 13
    assert data.report["ignored"] == {"system files": 3, "segmentations": 5}


def test_symbolic_loops_end(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    (tree / "sub-00" / "up").symlink_to(tree)
    (tree / "sub-01" / "me").symlink_to("me")
    (tree / "sub-01" / "me.png").symlink_to("me.png")
    (tree / "sub-02" / "z7.png").symlink_to("nowhere.png")
    message = failure(open_data, config(tree, tmp_path))
    assert "2 of 11" in message
    (tree / "sub-01" / "me.png").unlink()
    (tree / "sub-02" / "z7.png").unlink()
    assert len(open_data(config(tree, tmp_path)).images) == 9


def test_paths_with_spaces_and_foreign_letters(tmp_path):
    data = open_data(config(flat_tree(tmp_path / "Gehirn ä 脑" / "d d", people=3), tmp_path))
    assert len(data.images) == 9


def test_names_that_are_not_utf8_reach_no_log(tmp_path):
    tree = flat_tree(tmp_path / "data", people=35)
    bad = os.fsencode(tree / "sub-01") + b"/z\xff9.png"
    Path(os.fsdecode(bad)).write_bytes(b"")
    data = open_data(config(tree, tmp_path))
    assert data.report["skipped"] == [{"file": "sub-01/z?9.png", "reason": "empty file"}]
    json.dumps(data.report, ensure_ascii=False).encode("utf-8")


# --- splits -------------------------------------------------------------------------------


def test_a_subject_in_two_folders_stops_the_run(tmp_path):
    tree = course_tree(tmp_path / "data")
    shutil.copytree(tree / "keras_png_slices_train", tree / "x", dirs_exist_ok=True)
    for path in (tree / "x").glob("case_002*"):
        shutil.copy(path, tree / "keras_png_slices_test" / path.name)
    shutil.rmtree(tree / "x")
    message = failure(open_data, config(tree, tmp_path))
    assert "case_002 (test and train)" in message


def test_two_sessions_of_a_person_in_two_folders_stop_the_run(tmp_path):
    for part, names in {
        "train": ("OAS1_0001_MR1", "OAS1_0002_MR1"),
        "val": ("OAS1_0003_MR1",),
        "test": ("OAS1_0001_MR2",),
    }.items():
        for name in names:
            png(tmp_path / "data" / part / f"{name}_mpr-1_100.jpg", grey(1))
    assert "OAS1_0001 (test and train)" in failure(
        open_data, config(tmp_path / "data", tmp_path)
    )


def test_no_subject_is_refused_unless_allowed(tmp_path):
    for k in range(30):
        png(tmp_path / "data" / f"img_{k}.png", grey(k, (40, 40)))
    message = failure(open_data, config(tmp_path / "data", tmp_path))
    assert "--subject-pattern" in message and "--allow-slice-split" in message
    data = open_data(config(tmp_path / "data", tmp_path, allow_slice_split=True))
    assert "split by slice" in data.stamp and "do not publish" in data.stamp
    assert sum(data.report["slices"].values()) == 30
    assert np.isnan(data.train.levels).all()
    named = open_data(
        config(flat_tree(tmp_path / "named", 3), tmp_path, allow_slice_split=True)
    )
    assert "split by slice" not in named.stamp  # it was not needed


def test_subject_pattern(tmp_path):
    for k in range(30):
        png(tmp_path / "data" / f"img_{k // 3:02d}x{k}.png", grey(k, (40, 40)))
    good = config(tmp_path / "data", tmp_path, subject_pattern=r"img_(\d+)x")
    assert sum(open_data(good).report["subjects"].values()) == 10
    for pattern, code in (("img_[", Exit.USAGE), ("img_", Exit.USAGE), ("q(.)", Exit.DATA)):
        bad = config(tmp_path / "data", tmp_path, subject_pattern=pattern)
        assert "--subject-pattern" in failure(open_data, bad, code=code)


def test_fewer_than_three_subjects(tmp_path):
    tree = flat_tree(tmp_path / "data", people=2)
    assert "2 subject" in failure(open_data, config(tree, tmp_path))


@given(st.sets(st.text(min_size=1), min_size=3, max_size=300), st.integers(0, 2**31 - 1))
@settings(max_examples=80, deadline=None)
def test_hash_split_serves_every_part(people, seed):
    parts = sources.hash_split(people, seed)
    counts = [list(parts.values()).count(part) for part in sources.PARTS]
    assert set(parts) == people and min(counts) >= (2 if len(people) >= 6 else 1)
    assert parts == sources.hash_split(sorted(people, reverse=True), seed)


def test_hash_split_is_80_10_10_and_stable_when_files_are_added():
    few = sources.hash_split([f"case_{i}" for i in range(900)], 0)
    many = sources.hash_split([f"case_{i}" for i in range(1000)], 0)
    counts = [list(many.values()).count(part) for part in sources.PARTS]
    assert np.allclose(counts, (800, 100, 100), atol=40)
    assert all(many[person] == few[person] for person in few)
    assert sources.hash_split(many, 1) != many
    assert {many[f"case_{i}"] for i in range(10)} <= set(sources.PARTS)


# --- cache --------------------------------------------------------------------------------


def _decodes(monkeypatch) -> list:
    calls = []
    original = dataset.read_file

    def counted(path, *rest):
        calls.append(path)
        return original(path, *rest)

    monkeypatch.setattr(dataset, "read_file", counted)
    return calls


def test_files_are_decoded_once_and_a_copy_is_the_same_data(tmp_path, monkeypatch):
    tree = flat_tree(tmp_path / "data", people=3)
    calls = _decodes(monkeypatch)
    first = open_data(config(tree, tmp_path))
    assert len(calls) == 9
    shutil.copytree(tree, tmp_path / "copy")
    for place in (tree, tmp_path / "copy"):
        again = open_data(config(place, tmp_path))
        assert again.fingerprint == first.fingerprint
        assert np.array_equal(again.images, first.images)
    assert len(calls) == 9
    assert isinstance(first.images, np.memmap)
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name]


def test_other_content_of_the_same_size_is_other_data(tmp_path):
    for root, seed in (("a", 0), ("b", 1)):
        for person in range(3):
            nifti(tmp_path / root / f"sub-{person}_T1w.nii", head(seed=seed * 10 + person))
    names = [sorted((p.name, p.stat().st_size) for p in (tmp_path / r).iterdir()) for r in "ab"]
    assert names[0] == names[1]
    one, two = (open_data(config(tmp_path / root, tmp_path, slices=3)) for root in "ab")
    assert one.fingerprint != two.fingerprint and not np.array_equal(one.images, two.images)


def test_an_edited_file_is_noticed(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    before = open_data(config(tree, tmp_path)).fingerprint
    png(tree / "sub-01" / "z1.png", grey(999))
    data = open_data(config(tree, tmp_path))
    assert data.fingerprint != before
    assert any(np.array_equal(image, grey(999)) for image in data.images)


def test_an_edit_of_the_same_size_is_noticed(tmp_path):
    paths = [nifti(tmp_path / "data" / f"sub-{i}_T1w.nii", head(seed=i)) for i in range(3)]
    before = open_data(config(tmp_path / "data", tmp_path, slices=3)).fingerprint
    size = paths[1].stat().st_size
    os.utime(nifti(paths[1], head(seed=9)), (1, 1))  # whatever the clock's resolution
    assert paths[1].stat().st_size == size
    assert open_data(config(tmp_path / "data", tmp_path, slices=3)).fingerprint != before


def test_the_second_time_no_file_is_read(tmp_path, monkeypatch):
    tree = flat_tree(tmp_path / "data", people=3)
    first = open_data(config(tree, tmp_path))
    monkeypatch.setattr(dataset, "_survey", None)
    assert open_data(config(tree, tmp_path)).fingerprint == first.fingerprint


def test_another_source_s_cache_under_our_name_is_made_again(tmp_path, capsys):
    ours, theirs = (flat_tree(tmp_path / name, 3) for name in ("ours", "theirs"))
    png(theirs / "sub-00" / "z0.png", grey(77))
    mine, other = (open_data(config(tree, tmp_path)) for tree in (ours, theirs))
    wanted, cache = np.array(mine.images), tmp_path / "cache"
    for suffix in (".npy", ".json"):
        shutil.copy(cache / (other.fingerprint + suffix), cache / (mine.fingerprint + suffix))
    assert np.array_equal(open_data(config(ours, tmp_path)).images, wanted)
    assert "making it again" in capsys.readouterr().err


def test_settings_are_part_of_the_fingerprint(tmp_path):
    for person in range(3):
        nifti(tmp_path / "data" / f"sub-{person}_T1w.nii", head(seed=person))
    three, four = (open_data(config(tmp_path / "data", tmp_path, slices=n)) for n in (3, 4))
    assert three.fingerprint != four.fingerprint and len(four.images) == 12


@pytest.mark.parametrize(
    "harm", ["truncate", "foreign", "pickle", "json", "no json", "list", "zip"]
)
def test_a_damaged_cache_is_made_again_with_a_note(tmp_path, harm, capsys):
    tree = flat_tree(tmp_path / "data", people=3)
    before = open_data(config(tree, tmp_path))
    wanted = np.array(before.images)
    (cache,) = (tmp_path / "cache").glob("*.npy")
    meta = cache.with_suffix(".json")
    del before
    if harm == "truncate":
        os.truncate(cache, cache.stat().st_size - 1000)
    elif harm == "foreign":
        np.save(cache, np.zeros((9, 8), np.float32))
    elif harm == "pickle":
        np.save(cache, np.array([{}], object))
    elif harm == "zip":
        np.savez(cache.with_suffix(".npz"), wanted)
        shutil.move(cache.with_suffix(".npz"), cache)
    elif harm == "no json":
        meta.unlink()
    else:
        meta.write_text("{" if harm == "json" else "[1]")
    assert np.array_equal(open_data(config(tree, tmp_path)).images, wanted)
    assert "making it again" in capsys.readouterr().err


def test_the_cache_never_goes_into_the_data_folder(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    before = sorted(tree.rglob("*"))
    inside = Config(data=str(tree), cache=str(tree / "cache"))
    assert "--cache" in failure(open_data, inside)
    open_data(config(tree, tmp_path))
    assert sorted(tree.rglob("*")) == before


def test_an_unwritable_cache_is_exit_7(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    (tmp_path / "file").write_text("")
    blocked = Config(data=str(tree), cache=str(tmp_path / "file" / "cache"))
    failure(open_data, blocked, code=Exit.WRITE)


def test_a_full_disk_is_exit_7_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    tree = flat_tree(tmp_path / "data", people=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        message = failure(open_data, config(tree, tmp_path), code=Exit.WRITE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cache" in message and not list((tmp_path / "cache").iterdir())


def test_without_nilearn_the_embedded_set_is_exit_3(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_FILE", "nowhere-{}.nii.gz")
    embedded._atlas.cache_clear()
    assert "nilearn" in failure(open_data, Config(cache=str(tmp_path)))


def test_stale_temporaries_go_and_another_run_s_stay(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age_s in ((".a.npy.tmp1", 7200), (".b.npy.tmp2", 0)):
        (cache / name).write_bytes(b"x")
        os.utime(cache / name, (time.time() - age_s,) * 2)
    open_data(config(flat_tree(tmp_path / "data", people=3), tmp_path))
    assert [p.name for p in cache.glob(".*.tmp*")] == [".b.npy.tmp2"]


# --- real files ---------------------------------------------------------------------------


def test_a_real_brain_as_a_bids_tree(tmp_path):
    real = embedded._template_path("t1")
    for person in range(3):
        path = tmp_path / "data" / f"sub-{person}" / "anat" / f"sub-{person}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        shutil.copy(real, path)
    data = open_data(config(tmp_path / "data", tmp_path))
    assert data.report["slices"] == {"train": 32, "validation": 32, "test": 32}
    middle = data.images[16] > 0
    assert middle.any(axis=1).sum() > 1.1 * middle.any(axis=0).sum()  # front to back is longer


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("anatomical.nii", True),
        ("reoriented_anat_moved.nii", True),
        ("functional.nii", False),
        ("example4d.nii.gz", False),
    ],
)
def test_volumes_of_nibabel_s_own_tests(name, fits):
    path = Path(nibabel.__file__).parent / "tests" / "data" / name
    if not path.exists():
        pytest.skip("nibabel without its test data")
    if fits:
        assert read_slices(path, Config()).std() > 5
    else:
        assert "series" in failure(read_slices, path, Config())
