"""Data loading: every layout and every trap of real data, each on a small tree made for it.

Most tests compare with the pixels that were written, not with another run of the code.
"""

import gzip
import json
import os
import shutil
import struct
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, Exit, UserError
from dataset import Data, open_data, read_slices
from loading import cache, decoding, embedded, sources
from loading.decoding import letterbox, read_image, window

# --- builders -----------------------------------------------------------------------------


def grey(seed: int, shape=(256, 256)) -> np.ndarray:
    """A smooth image with many grey values, different for each seed: uint8."""
    noise = np.random.default_rng(seed).random((9, 9), np.float32)
    image = cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return (255 * image.clip(0, 1)).astype(np.uint8)


def png(path: Path, image: np.ndarray, *flags) -> Path:
    """Write an image in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(image, path.suffix, *flags))
    return path


def _encoded(image, kind=".png", *flags) -> bytes:
    return cv2.imencode(kind, image, list(flags))[1].tobytes()


def course_tree(root: Path, validate=2):
    """The course's PNG set, with its segmentations."""
    case = 0
    for part, count in (("train", 6), ("validate", validate), ("test", 2)):
        for _ in range(count):
            case += 1
            for k in range(4):
                name = f"{case:03d}_slice_{k}.nii.png"
                png(root / f"keras_png_slices_{part}" / f"case_{name}", grey(100 * case + k))
                labels = (grey(k) // 86).astype(np.uint8) * 85
                png(root / f"keras_png_slices_seg_{part}" / f"seg_{name}", labels)


def flat_tree(root: Path, people=10, slices=3, name="sub-{:02d}") -> Path:
    """One folder of PNG slices per subject."""
    for person in range(people):
        for k in range(slices):
            png(root / name.format(person) / f"z{k}.png", grey(50 * person + k))
    return root


def head(shape=(24, 30, 28), seed=0) -> np.ndarray:
    """An ellipsoid brain, brighter to the right, the front and the top (X, Y, Z): int16."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.95
    values = 600 + 100 * x + 150 * y + 300 * z
    values += np.random.default_rng(seed).normal(0, 3, shape)
    return np.where(inside, values, 0).astype(np.int16)


def voxel_mm(shape) -> int:
    """The voxel size that makes a small volume as long as a head."""
    return max(1, 168 // max(shape))


def nifti(path: Path, voxels: np.ndarray, affine=None) -> Path:
    """Write NIfTI, or the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if affine is None:
        affine = np.diag([*[voxel_mm(voxels.shape)] * 3, 1])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def analyze(path: Path, voxels: np.ndarray) -> Path:
    """Write plain Analyze 7.5, big-endian as in OASIS-1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nibabel.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape(voxels.shape)
    header.set_zooms([voxel_mm(voxels.shape)] * 3 + [1] * (voxels.ndim - 3))
    nibabel.AnalyzeImage(voxels, None, header).to_filename(str(path))
    return path


def config(data, tmp_path: Path, **options) -> Config:
    return Config(data=str(data), cache=str(tmp_path / "cache"), **options)


def opened(tmp_path: Path, name="data", **options) -> Data:
    """Open the folder `name` of `tmp_path`."""
    return open_data(config(tmp_path / name, tmp_path, **options))


def failure(call, *arguments, code=Exit.DATA, **options) -> str:
    """Return the message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code
    return str(caught.value)


def subjects(split) -> set[str]:
    return set(split.subjects.tolist())


def splits(data: Data) -> tuple:
    return data.train, data.validation, data.test


# --- the embedded set ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    return open_data(Config(subjects=(3, 2, 2), slices=6, cache=str(folder)))


def test_the_embedded_set_has_the_requested_subjects_and_slices(embedded_data):
    data = embedded_data
    assert data.stamp == "" and [len(split) for split in splits(data)] == [18, 12, 12]
    assert [len(subjects(split)) for split in splits(data)] == [3, 2, 2]
    assert len(set.union(*map(subjects, splits(data)))) == 7  # disjoint
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


def test_embedded_subjects_differ_and_the_same_numbers_give_the_same_subject(embedded_data):
    again = embedded.subject_slices(0, 0, 1, 6)
    assert np.array_equal(again, embedded_data.images[6:12])
    first, second, other_part = (embedded_data.images[i].astype(float) for i in (3, 9, 21))
    assert np.abs(first - second).mean() > 4 and np.abs(first - other_part).mean() > 4
    assert not np.array_equal(embedded.subject_slices(1, 0, 1, 6), again)


def test_more_training_subjects_do_not_change_the_test_subjects(embedded_data, tmp_path):
    more = open_data(Config(subjects=(4, 2, 2), slices=6, cache=str(tmp_path)))
    assert torch.equal(more.test.batch(range(12)), embedded_data.test.batch(range(12)))
    assert more.fingerprint != embedded_data.fingerprint


def test_a_slice_is_float32_in_0_to_1_and_has_its_level(embedded_data):
    split = embedded_data.validation
    image, level = split[7]
    assert image.shape == (1, 256, 256) and image.dtype == torch.float32
    assert float(image.min()) == 0 and 0.9 < float(image.max()) <= 1
    assert level == pytest.approx(0.2)
    batch = split.batch(torch.tensor([7, 0]))
    assert batch.shape == (2, 1, 256, 256) and torch.equal(batch[0], image)
    stored = torch.from_numpy(split.images[split.rows[0]].astype("f4"))
    assert torch.equal(batch[1, 0] * 255, stored)


# --- layouts ------------------------------------------------------------------------------


def test_the_course_set_keeps_its_split_folders(tmp_path, capsys):
    course_tree(tmp_path / "data")
    data = opened(tmp_path)
    assert data.report["slices"] == {"train": 24, "validation": 8, "test": 8}
    assert data.report["subjects"] == {"train": 6, "validation": 2, "test": 2}
    assert data.report["ignored"] == {"segmentations": 40}
    assert subjects(data.validation) == {"case_007", "case_008"}
    assert data.report["names"]["test"] == ["case_009", "case_010"]
    assert data.stamp == "from private data, do not publish"
    assert np.array_equal(data.train.images[data.train.rows[5]], grey(201))
    assert "40 segmentations" in capsys.readouterr().out


def test_nested_split_folders_without_validation_take_training_subjects(tmp_path):
    course_tree(tmp_path / "data" / "again" / "slices", validate=0)
    data = opened(tmp_path)
    assert data.report["subjects"] == {"train": 5, "validation": 1, "test": 2}
    assert subjects(data.test) == {"case_007", "case_008"}


def test_oasis1_talairach_volumes_are_padded_exactly(tmp_path):
    for person, session, n in ((1, 1, 3), (1, 2, 3), (2, 1, 4), (3, 1, 6)):
        scan = f"OAS1_{person:04d}_MR{session}"
        folder = tmp_path / "data" / f"disc{person % 2 + 1}" / scan / "PROCESSED/MPRAGE/T88_111"
        voxels = head((176, 208, 176), seed=person)[..., None]
        path = analyze(folder / f"{scan}_mpr_n{n}_anon_111_t88_masked_gfc.hdr", voxels)
    raw = tmp_path / "data" / "disc1" / "OAS1_0009_MR1" / "RAW" / "OAS1_0009_MR1_mpr-1_anon.hdr"
    analyze(raw, head((12, 16, 16)))
    labels = "FSL_SEG/OAS1_0003_MR1_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr"
    analyze(path.parents[2] / labels, (head((8, 8, 8)) > 600).astype(np.int16))
    data = opened(tmp_path, slices=8)
    assert data.report["source"].startswith("OASIS-1")
    assert data.report["ignored"] == {"segmentations": 1, "other versions of the scans": 1}
    assert sorted(data.report["slices"].values()) == [8, 8, 16]
    assert [len(subjects(split)) for split in splits(data)] == [1, 1, 1]  # MR2 is no person
    # The lowest slice with 15 % brain, anterior up, 208 x 176.
    levels = window(head((176, 208, 176), seed=3))
    enough = np.flatnonzero((levels > 12.75).mean(axis=(0, 1)) >= 0.15)
    wanted = np.zeros((256, 256), np.uint8)
    wanted[24:232, 40:216] = levels[:, ::-1, enough[0]].T
    assert np.array_equal(data.images[24], wanted)


@pytest.mark.parametrize("folder", ["sub-{0}/ses-{1}/anat", "{0}_MR_{1}/anat{2}"])
def test_bids_and_oasis3_give_one_t1w_volume_per_session(tmp_path, folder):
    for person in ("OAS30001", "OAS30002", "OAS30003"):
        for session in ("d0129", "d0757"):
            for run, kind in enumerate(("run-01_T1w", "run-02_T1w", "T2w")):
                place = tmp_path / "data" / folder.format(person, session, run)
                nifti(place / f"sub-{person}_ses-{session}_{kind}.nii.gz", head(seed=run))
    data = opened(tmp_path, slices=5)
    assert [len(subjects(split)) for split in splits(data)] == [1, 1, 1]
    assert data.report["slices"] == {"train": 10, "validation": 10, "test": 10}
    assert subjects(data.train) < {"OAS30001", "OAS30002", "OAS30003"}
    assert data.report["ignored"] == {"other contrasts": 6, "repeated scans of a session": 6}


def test_colour_jpegs_in_class_folders(tmp_path):
    for person in range(1, 5):
        folder = tmp_path / "data" / ("Mild Dementia" if person % 2 else "Non Demented")
        for repeat in (1, 2):
            for k in (100, 101):
                name = f"OAS1_{person:04d}_MR1_mpr-{repeat}_{k}.jpg"
                png(folder / name, cv2.merge([grey(person, (248, 496))] * 3), 1, 100)
    data = opened(tmp_path)
    assert sum(data.report["subjects"].values()) == 4
    frame = data.images[0]
    assert not frame[:64].any() and not frame[192:].any() and frame[64:192].mean() > 60
    assert sorted(set(data.train.levels.tolist())) == [0, 1]  # levels within each repeat


@pytest.mark.parametrize("name", ["aligned_norm", "slice_norm"])
def test_neurite_volumes_and_slices(tmp_path, name):
    whole = name == "aligned_norm"
    lia = np.array([[-6, 0, 0, 0], [0, 0, 6, 0], [0, -6, 0, 0], [0, 0, 0, 1]])
    for person in range(1, 4):
        folder = tmp_path / "data" / f"OASIS_OAS1_{person:04d}_MR1"
        voxels = head((16, 28, 32)).astype(np.float32) / 1000
        used = voxels if whole else voxels[..., 16:17]
        nifti(folder / f"{name}.nii.gz", used, lia)
        nifti(folder / "norm.nii.gz", voxels, lia)
        nifti(folder / "seg35.nii.gz", (voxels * 35).astype(np.int16))
    data = opened(tmp_path, slices=4)
    assert data.report["slices"]["train"] == (4 if whole else 1)
    assert np.isnan(data.train.levels).all() != whole
    assert data.report["ignored"]["segmentations"] == 3


# --- intensity ----------------------------------------------------------------------------


def test_window_uses_finite_voxels_above_zero_only():
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
    reason = "a constant volume" if value == 7 else "a volume without any signal"
    assert failure(read_slices, path, Config()).endswith(reason)


def test_12_bit_pngs_share_one_scale_and_do_not_turn_black(tmp_path):
    factors = (16, 4, 4)
    for person, factor in enumerate(factors):
        png(tmp_path / "data" / f"sub-{person}.png", grey(person).astype(np.uint16) * factor)
    for images in (read_slices(tmp_path / "data", Config()), opened(tmp_path).images):
        for person, factor in enumerate(factors):
            wanted = grey(person) * (factor * 255 / 4095)
            assert np.abs(images[person] - wanted).max() <= 0.51


# --- formats of one grey image ------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def _raw_png(image: np.ndarray, colour: int, *extra: bytes, depth: int = 8) -> bytes:
    """Encode samples (H,W) or (H,W,C) below 2**depth as a PNG, without a library."""
    samples = image.reshape(*image.shape[:2], -1)
    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], depth, colour, 0, 0, 0)
    bits = np.unpackbits(samples.astype(">u2")[..., None].view(np.uint8), axis=3)
    rows = np.packbits(bits[..., 16 - depth :].reshape(len(image), -1), axis=1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [_chunk(b"IHDR", head), *extra, _chunk(b"IDAT", zlib.compress(pixels))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _exif(orientation: int) -> bytes:
    start = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"
    return start + struct.pack(">HH", orientation, 0) + b"\0" * 4


def _with_app1(jpeg: bytes, body: bytes) -> bytes:
    """Insert an Exif segment at the start of a JPEG."""
    body = b"Exif\0\0" + body
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def test_a_png_is_rotated_as_its_exif_says():
    image = grey(3, (60, 90))
    blob = _raw_png(np.rot90(image), 0, _chunk(b"eXIf", _exif(6)))
    assert np.array_equal(read_image(blob), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_rotated_as_its_exif_says(channels):
    image = grey(4, (64, 96))
    blob = _encoded(cv2.merge([np.rot90(image)] * channels), ".jpg", 1, 100)
    assert np.abs(read_image(_with_app1(blob, _exif(6))).astype(int) - image).max() <= 6


def test_transparent_pixels_are_black():
    image = cv2.merge([np.full((20, 20), 200, np.uint8)] * 3 + [np.zeros((20, 20), np.uint8)])
    assert read_image(_encoded(image)).max() == 0


# --- geometry -----------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LIA", "PSR"])
def test_any_axis_order_gives_the_same_axial_slices_of_1_mm_a_pixel(tmp_path, axes):
    image = nibabel.Nifti1Image(head((100, 40, 30)), np.diag([1.0, 4.0, 2.0, 1.0]))
    codes = nibabel.orientations.axcodes2ornt(axes)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), codes)
    turned = image.as_reoriented(turn)
    assert "".join(nibabel.aff2axcodes(turned.affine)) == axes
    nibabel.save(image, tmp_path / "straight.nii")
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    stack = read_slices(tmp_path / "straight.nii", Config(slices=5))
    assert np.array_equal(read_slices(tmp_path / "turned.nii.gz", Config(slices=5)), stack)
    assert stack[2].any(axis=0).sum() == pytest.approx(98, abs=4)
    assert stack[2].any(axis=1).sum() == pytest.approx(160, abs=8)
    rows, columns = np.nonzero(stack[2])
    values = stack[2][rows, columns]
    assert np.corrcoef(values, rows)[0, 1] < -0.5  # brighter to the front, which is up
    assert np.corrcoef(values, columns)[0, 1] < -0.3  # and to the right, which is on the left


@pytest.mark.parametrize("name", ["anatomical.nii", "reoriented_anat_moved.nii"])
def test_real_heads_are_read(name):
    path = Path(nibabel.__file__).parent / "tests" / "data" / name
    if not path.exists():
        pytest.skip("nibabel without its test data")
    assert read_slices(path, Config()).std() > 5


def test_only_trailing_axes_of_length_one_are_dropped(tmp_path):
    def read(voxels):
        return read_slices(nifti(tmp_path / "a.nii", voxels), Config(slices=4))

    assert np.array_equal(read(head()[..., None, None]), read(head()))
    assert "series" in failure(read, np.stack([head(), head()], axis=-1))
    coronal = read(head()[:, 15:16])
    assert coronal.shape == (1, 256, 256) and coronal[0].any(axis=1).sum() > 20
    assert len(read(head()[:, :, 14])) == 1


def test_letterbox_pads_exactly_and_keeps_proportions():
    image = grey(5, (208, 176))
    assert np.array_equal(letterbox(image)[24:232, 40:216], image)
    assert np.array_equal(letterbox(image, (1.0000001, 1.0))[24:232, 40:216], image)
    assert not letterbox(image)[:24].any() and not letterbox(image)[:, 216:].any()
    wide = letterbox(np.full((100, 512), 255, np.uint8))
    assert wide.any(axis=1).sum() == 50 and wide.any(axis=0).all()
    small = letterbox(np.full((32, 64), 255, np.uint8))
    assert small.any(axis=1).sum() == 128 and small.any(axis=0).all()


@given(
    st.integers(1, 700), st.integers(1, 700), st.one_of(st.none(), st.floats(0.2, 8)),
    st.floats(0.2, 8),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_letterbox_takes_any_shape(height, width, tall_mm, wide_mm):
    spacing = None if tall_mm is None else (tall_mm, wide_mm)
    frame = letterbox(np.full((height, width), 255, np.uint8), spacing)
    ratio = height / width if spacing is None else height * tall_mm / (width * wide_mm)
    tall, wide = frame.any(axis=1).sum(), frame.any(axis=0).sum()
    assert abs(tall - ratio * wide) <= 0.5 * (1 + ratio) + 1 or min(tall, wide) == 1
    assert frame.shape == (256, 256) and (frame == 255).sum() == tall * wide


def test_volume_slices_cover_the_brain_evenly(tmp_path):
    voxels = np.zeros((20, 20, 60), np.float32)
    voxels[5:15, 5:15, 10:51] = np.arange(1, 61)[10:51]  # 25 % brain at heights 10 to 50
    voxels[9:11, 9:11, 5:10] = 30  # 1 %: too little
    stack = read_slices(nifti(tmp_path / "a.nii", voxels), Config(slices=5))
    middle = stack[:, 128, 128].astype(int)
    assert len(stack) == 5 and (np.abs(np.diff(middle, 2)) <= 8).all()
    assert len(read_slices(tmp_path / "a.nii", Config(slices=200))) <= 41
    (single,) = read_slices(tmp_path / "a.nii", Config(slices=1))
    assert np.array_equal(single, stack[2])  # the middle one


# --- damage -------------------------------------------------------------------------------

PNG, JPEG = _encoded(grey(1)), _encoded(grey(1), ".jpg")


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_jpeg():
    nested = _with_app1(JPEG, JPEG)
    assert read_image(nested).shape == (256, 256)
    with pytest.raises(decoding.Unreadable, match="truncated JPEG"):
        read_image(nested[:-2000])


def test_a_flipped_byte_in_a_gzip_is_found(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", head())
    plain = gzip.decompress(path.read_bytes())
    stored = bytearray(gzip.compress(plain, compresslevel=0))
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    assert np.asanyarray(nibabel.load(path).dataobj).size  # nibabel alone accepts it
    assert "CRC" in failure(read_slices, path, Config())


@pytest.mark.parametrize("keep", [0, 100, 400, 5000])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a_t88_masked_gfc.img"])
def test_truncated_volumes_are_refused(tmp_path, name, keep):
    path = tmp_path / name
    make, header = (analyze, path.with_suffix(".hdr")) if ".img" in name else (nifti, path)
    make(header, head())
    path.write_bytes(path.read_bytes()[:keep])
    failure(read_slices, path, Config())
    path.unlink()  # a header without its pixels, or no file at all
    failure(read_slices, header, Config())


def test_up_to_one_percent_of_files_is_skipped_and_listed(tmp_path, capsys):
    tree = tmp_path / "data"
    for person in range(40):
        for k in range(10):
            png(tree / f"case_{person:03d}_slice_{k}.png", grey(10 * person + k, (48, 48)))
    bad = "case_000_slice_3.png", "case_001_slice_0.png", "case_002_slice_1.png"
    for name, blob in zip(bad, (PNG[:500], b"", b"text"), strict=True):
        (tree / name).write_bytes(blob)
    data = opened(tmp_path)
    assert {s["file"] for s in data.report["skipped"]} == set(bad)
    assert sum(data.report["slices"].values()) == len(data.images) == 397
    # Rows after a skipped file still belong to their subject.
    (home,) = (split for split in splits(data) if "case_010" in split.subjects)
    row = home.rows[home.subjects.tolist().index("case_010")]
    assert np.array_equal(data.images[row], letterbox(grey(100, (48, 48))))
    message = failure(opened, tmp_path, strict=True)
    assert "3 of 400" in message and "--strict" in message
    for name in ("case_004_slice_3.png", "case_005_slice_3.png"):
        (tree / name).write_bytes(b"")
    assert "1 %" in failure(opened, tmp_path)
    assert "case_000_slice_3.png" in capsys.readouterr().err


# --- what is not data ---------------------------------------------------------------------


def test_errors_about_the_data_path_name_the_accepted_layouts(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.dcm").write_bytes(b"x")
    (tmp_path / "file.png").write_bytes(PNG)
    missing = failure(opened, tmp_path, "missing")
    assert str(tmp_path / "missing") in missing and "NIfTI" not in missing
    for name in ("empty", "other", "file.png"):
        message = failure(opened, tmp_path, name)
        assert "NIfTI" in message and "OAS1" in message and str(tmp_path / name) in message
    assert "1 DICOM (dcm2niix" in failure(opened, tmp_path, "other")
    assert not (tmp_path / "cache").exists()


def test_segmentations_named_like_images_are_refused(tmp_path):
    for case in range(4):
        for k in range(3):
            labels = (grey(k + case) // 40).astype(np.uint8) * 40  # 7 greys
            png(tmp_path / "data" / f"case_{case}_slice_{k}.png", labels)
    assert "8 grey" in failure(opened, tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


def test_loops_of_symbolic_links_end(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    (tree / "sub-00" / "up").symlink_to(tree)
    (tree / "sub-01" / "me").symlink_to("me")
    (tree / "sub-01" / "me.png").symlink_to("me.png")
    (tree / "sub-02" / "z7.png").symlink_to("nowhere.png")
    assert "2 of 11" in failure(opened, tmp_path)
    (tree / "sub-01" / "me.png").unlink()
    (tree / "sub-02" / "z7.png").unlink()
    assert len(opened(tmp_path).images) == 9


def test_names_that_are_not_utf8_become_printable(tmp_path):
    tree = flat_tree(tmp_path / "data", people=35)
    bad = os.fsencode(tree / "sub-01") + b"/z\xff9.png"
    Path(os.fsdecode(bad)).write_bytes(b"")
    data = opened(tmp_path)
    assert data.report["skipped"] == [{"file": "sub-01/z?9.png", "reason": "empty file"}]
    json.dumps(data.report, ensure_ascii=False).encode("utf-8")


# --- splits -------------------------------------------------------------------------------


def test_one_folder_per_subject_splits_the_same_for_every_seed_of_the_run(tmp_path):
    flat_tree(tmp_path / "data")
    one, two = (opened(tmp_path, seed=seed) for seed in (0, 7))
    assert sum(one.report["subjects"].values()) == 10 and len(one.images) == 30
    assert subjects(one.test) == subjects(two.test) and one.fingerprint == two.fingerprint


@pytest.mark.parametrize("subject", ["case_002", "OAS1_0001"])
def test_a_subject_in_two_split_folders_stops_the_run(tmp_path, subject):
    names = [f"{subject}_MR1_slice_1", "case_007_slice_1", "case_008_slice_1"]
    for part, name in zip(("train", "train", "val"), names, strict=True):
        png(tmp_path / "data" / part / f"{name}.png", grey(1))
    png(tmp_path / "data" / "test" / f"{subject}_MR2_slice_1.png", grey(2))  # another session
    assert f"{subject} (test and train)" in failure(opened, tmp_path)


def test_unknown_subjects_are_refused_unless_allowed(tmp_path, capsys):
    for k in range(70):
        png(tmp_path / "data" / f"img_{k}.png", grey(k, (40, 40)))
    message = failure(opened, tmp_path)
    assert "--subject-pattern" in message and "--allow-slice-split" in message
    data = opened(tmp_path, allow_slice_split=True)
    assert "split by slice" in data.stamp and "do not publish" in data.stamp
    assert sum(data.report["slices"].values()) == 70
    assert np.isnan(data.train.levels).all() and "no slice levels" in capsys.readouterr().out
    flat_tree(tmp_path / "named", people=3)  # subjects are known, so the flag has no effect
    assert "split by slice" not in opened(tmp_path, "named", allow_slice_split=True).stamp


def test_subject_pattern(tmp_path):
    for k in range(30):
        png(tmp_path / "data" / f"img_{k // 3:02d}x{k}.png", grey(k, (40, 40)))
    data = opened(tmp_path, subject_pattern=r"img_(\d+)x")
    assert sum(data.report["subjects"].values()) == 10
    for wrong, code in (("img_[", Exit.USAGE), ("img_", Exit.USAGE), ("q(.)", Exit.DATA)):
        assert "--subject-pattern" in failure(
            opened, tmp_path, subject_pattern=wrong, code=code
        )
    png(tmp_path / "data" / "logo.png", grey(0, (40, 40)))
    message = failure(opened, tmp_path, subject_pattern=r"img_(\d+)x", allow_slice_split=True)
    assert "logo.png" in message


def test_fewer_than_three_subjects_are_refused(tmp_path):
    flat_tree(tmp_path / "data", people=2)
    assert "2 subject" in failure(opened, tmp_path)


@given(st.sets(st.text(min_size=1), min_size=3, max_size=300), st.integers(0, 2**31 - 1))
@settings(max_examples=80, deadline=None)
def test_hash_split_leaves_no_part_empty(people, seed):
    parts = sources.hash_split(people, seed)
    counts = [list(parts.values()).count(part) for part in sources.PARTS]
    assert set(parts) == people and min(counts) >= (2 if len(people) >= 6 else 1)
    assert parts == sources.hash_split(sorted(people, reverse=True), seed)


def test_hash_split_is_80_10_10_and_stable_when_subjects_are_added():
    few = sources.hash_split([f"case_{i}" for i in range(900)], 0)
    many = sources.hash_split([f"case_{i}" for i in range(1000)], 0)
    counts = [list(many.values()).count(part) for part in sources.PARTS]
    assert np.allclose(counts, (800, 100, 100), atol=40)
    assert all(many[person] == few[person] for person in few)
    assert sources.hash_split(many, 1) != many


# --- cache --------------------------------------------------------------------------------


def test_files_are_decoded_once_and_a_copy_is_the_same_data(tmp_path, monkeypatch):
    calls = []

    def counted(path, *rest):
        calls.append(path)
        return decoding.read_file(path, *rest)

    monkeypatch.setattr(cache, "read_file", counted)
    tree = flat_tree(tmp_path / "data", people=3)
    first = opened(tmp_path)
    assert len(calls) == 9
    shutil.copytree(tree, tmp_path / "copy")
    for name in ("data", "copy"):
        again = opened(tmp_path, name)
        assert again.fingerprint == first.fingerprint
        assert np.array_equal(again.images, first.images)
    assert len(calls) == 9 and isinstance(first.images, np.memmap)
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name]
    monkeypatch.setattr(cache, "_survey", None)  # an unchanged source is not even read again
    assert opened(tmp_path).fingerprint == first.fingerprint


def test_an_edit_of_the_same_size_and_other_settings_make_a_new_cache(tmp_path):
    for person in range(3):
        path = nifti(tmp_path / "data" / f"sub-{person}_T1w.nii", head(seed=person))
    before, four = (opened(tmp_path, slices=n) for n in (3, 4))
    assert before.fingerprint != four.fingerprint and len(four.images) == 12
    size = path.stat().st_size
    os.utime(nifti(path, head(seed=9)), (1, 1))  # independent of the clock's resolution
    assert path.stat().st_size == size
    after = opened(tmp_path, slices=3)
    assert after.fingerprint != before.fingerprint
    assert np.array_equal(after.images[6:], read_slices(path, Config(slices=3)))
    assert not np.array_equal(after.images, before.images)


HARM = {
    "truncated": lambda npy, meta: os.truncate(npy, npy.stat().st_size - 1000),
    "foreign": lambda npy, meta: np.save(npy, np.zeros((9, 8), np.float32)),
    "pickle": lambda npy, meta: np.save(npy, np.array([{}], object)),
    "zip": lambda npy, meta: zipfile.ZipFile(npy, "w").close(),
    "other data": lambda npy, meta: meta.write_text(meta.read_text().replace(npy.stem, "x")),
    "no json": lambda npy, meta: meta.unlink(),
    "bad json": lambda npy, meta: meta.write_text("{"),
    "list": lambda npy, meta: meta.write_text("[1]"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_cache_is_made_again_with_a_warning(tmp_path, harm, capsys):
    flat_tree(tmp_path / "data", people=3)
    wanted = np.array(opened(tmp_path).images)
    (npy,) = (tmp_path / "cache").glob("*.npy")
    HARM[harm](npy, npy.with_suffix(".json"))
    assert np.array_equal(opened(tmp_path).images, wanted)
    assert "making it again" in capsys.readouterr().err


def test_the_cache_never_goes_into_the_data_folder(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    before = sorted(tree.rglob("*"))
    assert "--cache" in failure(open_data, config(tree, tree))
    opened(tmp_path)
    assert sorted(tree.rglob("*")) == before


def test_an_unwritable_cache_is_exit_7(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    (tmp_path / "file").write_text("")
    assert "--cache" in failure(open_data, config(tree, tmp_path / "file"), code=Exit.WRITE)


def test_a_full_disk_is_exit_7_and_leaves_no_files(tmp_path):
    resource = pytest.importorskip("resource")
    flat_tree(tmp_path / "data", people=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        message = failure(opened, tmp_path, code=Exit.WRITE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cache" in message and not list((tmp_path / "cache").iterdir())


def test_without_nilearn_the_embedded_set_is_exit_3(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_FILE", "nowhere-{}.nii.gz")
    embedded._atlas.cache_clear()
    assert "nilearn" in failure(open_data, Config(cache=str(tmp_path)))


def test_stale_temporary_files_are_deleted_and_those_of_other_runs_are_not(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age_s in ((".a.npy.tmp1", 7200), (".b.npy.tmp2", 0)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    flat_tree(tmp_path / "data", people=3)
    opened(tmp_path)
    assert [p.name for p in folder.glob(".*.tmp*")] == [".b.npy.tmp2"]
