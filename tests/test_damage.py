"""Damaged data by the hundred: every file gives the right array or an error that names it.

No crash, no silently wrong picture if the format has checksums, and never more than 1 GB.
"""

import contextlib
import gzip
import json
import multiprocessing
import os
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_dataset import (
    JPEG,
    PNG,
    _chunk,
    _encoded,
    _raw_png,
    analyze,
    failure,
    flat_tree,
    grey,
    head,
    nifti,
    opened,
    png,
)

from config import Config, UserError
from dataset import read_slices
from loading import cache, decoding, sources
from support import device


def examples(count: int) -> settings:
    """So many random inputs, in one temporary folder, without a time limit for each."""
    shared = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, suppress_health_check=shared)


GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG

# --- intact files ------------------------------------------------------------------------


@examples(150)
@given(
    st.sampled_from(
        [(GREY, d) for d in (1, 2, 4, 8, 16)] + [(PALETTE, d) for d in (1, 2, 4, 8)]
        + [(mode, d) for mode in (RGB, GREY_ALPHA, RGBA) for d in (8, 16)]
    ),
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 999),
)  # fmt: skip
def test_every_kind_depth_and_size_of_png_gives_the_same_grey_image(kind, height, width, seed):
    (colour, depth), draw, extra = kind, np.random.default_rng(seed), []
    full = 2**depth - 1
    samples = draw.integers(0, full + 1, (height, width))
    wanted = np.rint(samples * (255 / full)).astype(np.uint8)
    if colour == PALETTE:
        table = draw.permutation(256).astype(np.uint8)[: full + 1]
        extra, wanted = [_chunk(b"PLTE", np.repeat(table, 3).tobytes())], table[samples]
    if colour in (RGB, RGBA):
        samples = np.repeat(samples[..., None], 3, axis=2)
    if colour in (GREY_ALPHA, RGBA):
        samples = np.dstack([samples, np.full((height, width), full)])
    blob = _raw_png(samples, colour, *extra, depth=depth)
    assert np.array_equal(decoding.read_image(blob, peak=65535), wanted)


@examples(30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99), st.sampled_from([1, 3]))
def test_every_size_of_jpeg_gives_the_image_up_to_compression(height, width, seed, channels):
    image = grey(seed, (height, width))
    samples = np.repeat(image[..., None], channels, axis=2)
    back = decoding.read_image(_encoded(samples, ".jpg", 1, 100))
    assert back.shape == image.shape and np.abs(back.astype(int) - image).max() <= 12


@examples(60)
@given(
    st.tuples(*[st.integers(2, 16)] * 3),
    st.sampled_from(["u2", "i2", "i4", "i8", "f4", "f8"]), st.sampled_from("<>"),
    st.sampled_from([".nii", ".nii.gz"]), st.sampled_from([(None, None), (0.5, 0), (2, -3)]),
    st.integers(0, 99),
)  # fmt: skip
def test_every_type_byte_order_and_scale_gives_the_same_volume(
    tmp_path, shape, kind, order, suffix, scale, seed
):
    voxels = np.random.default_rng(seed).integers(0, 2000, shape) * 2
    voxels.flat[0] = 100  # never empty
    plain = nifti(tmp_path / "a.nii", voxels.astype(np.float32), np.eye(4))
    wanted = read_slices(plain, Config(slices=3))
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(order + kind))
    image = nibabel.Nifti1Image(voxels.astype(np.float64), np.eye(4), header)
    if kind[0] in "iu" and kind != "i8":
        image.header.set_slope_inter(*scale)  # scales the stored numbers only
    path = tmp_path / f"b{suffix}"
    nibabel.save(image, path)
    assert np.abs(read_slices(path, Config(slices=3)).astype(int) - wanted).max() <= 1


# --- damaged files --------------------------------------------------------------------------

IMAGES = {"a.png": PNG, "a16.png": _encoded(grey(2) * np.uint16(9)), "a.jpg": JPEG}
VOLUMES = "a.nii", "a.nii.gz", "a_t88_x.hdr"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Format -> its files: name -> bytes."""
    formats = {name: {name: blob} for name, blob in IMAGES.items()}
    for name in VOLUMES:
        make, folder = analyze if ".hdr" in name else nifti, tmp_path_factory.mktemp("v")
        make(folder / name, head((9, 11, 10)))
        formats[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return formats


@st.composite
def damages(draw):
    """A kind of damage, and a function that does it to bytes."""
    kind = draw(st.sampled_from(["cut", "flip", "zero", "insert", "drop"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6))
    early = draw(st.booleans())  # headers are small and matter most
    values = draw(st.binary(min_size=6, max_size=6))

    def damage(blob: bytes) -> bytes:
        size = min(len(blob), 400) if early else len(blob)
        at = int(places[0] * size)
        if kind == "cut":
            return blob[:at]
        if kind == "insert":
            return blob[:at] + values + blob[at:]
        if kind == "drop":
            return blob[:at] + blob[at + 1 + values[0] :]
        if kind == "zero":
            return blob[:at] + bytes(min(64, len(blob) - at)) + blob[at + 64 :]
        changed = bytearray(blob)
        for place, value in zip(places, values, strict=False):
            changed[int(place * size)] ^= value or 1
        return bytes(changed)

    return kind, damage


@pytest.mark.filterwarnings("ignore")  # numpy and nibabel warn of such headers
@pytest.mark.parametrize("name", [*IMAGES, *VOLUMES])
@examples(120)
@given(damages(), st.booleans())
def test_damaged_bytes_give_the_right_array_or_an_error_that_names_the_file(
    name, whole, tmp_path, kind_and_damage, second
):
    (kind, damage), files = kind_and_damage, whole[name]
    target = sorted(files)[-1 if second else 0]
    for file, blob in files.items():
        (tmp_path / file).write_bytes(blob)
    wanted = read_slices(tmp_path / name, Config(slices=3))
    harmed = damage(files[target])
    (tmp_path / target).write_bytes(harmed)
    try:
        found = read_slices(tmp_path / name, Config(slices=3))
    except UserError as problem:
        assert name in str(problem) and "\n" not in str(problem)
        return
    assert found.dtype == np.uint8 and found.shape[1:] == (256, 256) and len(found) <= 3
    if (kind == "cut" and len(harmed) < len(files[target])) or name.endswith((".png", ".gz")):
        assert np.array_equal(found, wanted)


def odd_png(*chunks: bytes) -> bytes:
    return PNG[:8] + b"".join(chunks) + _chunk(b"IEND", b"")


HEADER = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
IHDR, IDAT = _chunk(b"IHDR", HEADER), _chunk(b"IDAT", zlib.compress(b"\0ab" * 2))
HALF = len(PNG) // 2
BAD_IMAGES = {  # bytes, and the expected reason; some decoders accept these files
    "empty": (b"", "empty"),
    "text": (b"not an image at all", "neither PNG nor JPEG"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated JPEG"),
    "JPEG without its end": (JPEG[:-2], "truncated JPEG"),
    "JPEG, two bytes": (JPEG[:2], "truncated JPEG"),
    "half a PNG": (PNG[:HALF], "truncated PNG"),
    "PNG without its end": (PNG[:-12], "truncated PNG"),
    "PNG, signature only": (PNG[:8], "truncated PNG"),
    "PNG, flipped byte": (PNG[:HALF] + bytes([PNG[HALF] ^ 16]) + PNG[HALF + 1 :], "checksum"),
    # The checksums of these are right.
    "no header": (odd_png(IDAT), "header is missing"),
    "short header": (odd_png(_chunk(b"IHDR", b"")), "header is missing"),
    "long header": (odd_png(_chunk(b"IHDR", HEADER + b"0"), IDAT), "header is missing"),
    "second header": (odd_png(IHDR, IHDR, IDAT), "header is missing"),
    "late header": (odd_png(IDAT, IHDR), "header is missing"),
    "no pixels": (odd_png(IHDR), "cannot be decoded"),
    "half of the pixels": (
        odd_png(IHDR, _chunk(b"IDAT", zlib.compress(b"\0ab"))), "cannot be decoded"),
    "cut pixels": (odd_png(IHDR, _chunk(b"IDAT", IDAT[8:-8])), "cannot be decoded"),
    "huge JPEG": (  # 256 x 256 in its header is replaced
        JPEG.replace(b"\x08\1\0\1\0", b"\x08\xea\x60\xea\x60"), "60000 x 60000"),
    "huge PNG": (odd_png(_chunk(b"IHDR", b"\0\0\xea\x60" * 2 + HEADER[8:])), "60000 x 60000"),
    "0 x 2": (odd_png(_chunk(b"IHDR", bytes(4) + HEADER[4:]), IDAT), "claims 0 x 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_damaged_images_are_refused(kind):
    assert decoding.read_image(odd_png(IHDR, IDAT)).tolist() == [[97, 98]] * 2
    blob, reason = BAD_IMAGES[kind]
    with pytest.raises(decoding.Unreadable, match=reason):
        decoding.read_image(blob)


def test_too_little_memory_does_not_count_as_damage(tmp_path, monkeypatch):
    def fail(image):
        raise MemoryError

    path = nifti(tmp_path / "a.nii", head())
    monkeypatch.setattr(decoding, "_float32", fail)
    with pytest.raises(MemoryError):  # a damaged file would be skipped, and a person with it
        read_slices(path, Config())


# --- names --------------------------------------------------------------------------------

NAMES = st.binary(min_size=1, max_size=120).map(lambda b: b.translate(None, b"/\0")).filter(len)


@examples(60)
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
@example([b"z1", b"z01", b"z001"])
@example([b"train", b"\xff\xfe", "²٣".encode(), b"a\nb"])
@example([b"\x1b[31m", b"-rf", b"%s{}", b"9" * 100])
def test_a_file_of_any_name_is_read_or_counted_and_a_copy_is_the_same_data(tmp_path, names):
    for folder in ("data", "copy"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    tree = flat_tree(tmp_path / "data", people=3, slices=1)
    for number, name in enumerate(names):
        path = Path(os.fsdecode(os.fsencode(tree / "sub-01") + b"/" + name + b".png"))
        path.write_bytes(_encoded(grey(number, (9, 9))))
    there = sum(len(files) for _, _, files in os.walk(tree))
    items, report = sources.find(tree, Config())
    assert len(items) + sum(report["ignored"].values()) == there
    data = opened(tmp_path)
    assert len(data.images) == len(items)
    json.dumps(data.report, ensure_ascii=False).encode()
    for item in reversed(items):  # folders may list files in the order of creation
        copy = tmp_path / "copy" / item.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(item.path, copy)
    assert opened(tmp_path, "copy").fingerprint == data.fingerprint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_are_never_opened(tmp_path):
    tree = flat_tree(tmp_path / "data", people=3)
    os.mkfifo(tree / "sub-00" / "z9.png")
    (tree / "sub-01" / "z9.png").symlink_to("/dev/zero")
    data = opened(tmp_path)
    assert len(data.images) == 9 and data.report["ignored"] == {"devices and pipes": 2}
    analyze(tmp_path / "a_t88_x.hdr", head())
    (tmp_path / "a_t88_x.img").unlink()
    (tmp_path / "a_t88_x.img").symlink_to("/dev/zero")
    item = sources.Item(str(tmp_path), "a_t88_x.hdr")
    assert cache._survey(item)[1] == 0  # it returns


# --- memory -------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def memory_of(work) -> int:
    """The bytes that `work` allocates at its peak, measured in a forked process."""
    resource = pytest.importorskip("resource")
    ours, theirs = FORK.Pipe()

    def measured():
        cv2.setNumThreads(1)  # the parent's threads do not exist in a forked process
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.suppress(UserError, decoding.Unreadable):
            work()
        theirs.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    device.release_memory()  # reused free memory would not be counted
    process = FORK.Process(target=measured)
    process.start()
    process.join()
    assert ours.poll(), "the process was killed"
    return ours.recv()


def test_the_memory_measurement_works():
    assert memory_of(lambda: np.ones(2**26, np.uint8)) > 2**25


def claim(folder: Path, shape, code: int, suffix=".nii") -> Path:
    """A NIfTI file whose header claims a shape and a type, with 10 voxels behind it."""
    blob = bytearray(nifti(folder / "a.nii", head()).read_bytes()[:372])
    blob[40:48] = struct.pack("<4h", len(shape), *shape)
    blob[70:74] = struct.pack("<2h", code, 0)
    path = folder / f"b{suffix}"
    path.write_bytes(gzip.compress(bytes(blob)) if suffix.endswith("gz") else bytes(blob))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("shape", "code"),
    [((4000, 4000, 4000), 4), ((406, 406, 408), 4),
     ((400, 400, 400), 64), ((300, 300, 300), 1792)],
)  # fmt: skip
def test_a_header_that_claims_too_much_is_refused_without_memory(tmp_path, shape, code, suffix):
    path = claim(tmp_path, shape, code, suffix)
    assert memory_of(lambda: read_slices(path, Config())) < 50e6
    message = failure(read_slices, path, Config())
    assert "claims" in message or "not plain numbers" in message


def test_a_header_within_the_limit_takes_no_more_memory_than_it_claims(tmp_path):
    path = claim(tmp_path, (400, 400, 400), 4)
    assert memory_of(lambda: read_slices(path, Config())) < 400e6
    failure(read_slices, path, Config())


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.write(PNG)
        file.truncate(2**30)  # sparse: it takes no space on the disk
    assert memory_of(lambda: read_slices(tmp_path / "a.png", Config())) < 50e6
    assert "too many" in failure(read_slices, tmp_path / "a.png", Config())


def largest(folder: Path, kind: str) -> Path:
    """An intact file of the largest size that is accepted."""
    if kind == "png":
        samples = np.broadcast_to(np.arange(4096)[:, None, None] * 16, (4096, 4096, 4))
        return png(folder / "a.png", np.ascontiguousarray(samples, np.uint16))
    shape = (256, 512, 512) if kind == "scaled" else (256, 512, 256)
    blob = bytearray(nifti(folder / "a.nii", head()).read_bytes()[:352])
    blob[40:48] = struct.pack("<4h", 3, *shape)
    blob[70:74] = struct.pack("<2h", *((4, 16) if kind == "scaled" else (64, 64)))
    blob[112:120] = struct.pack("<2f", 0.37, 5)
    row = (np.arange(2**16) % 1009).astype("<i2" if kind == "scaled" else "<f8").tobytes()
    with gzip.open(folder / "b.nii.gz", "wb", compresslevel=1) as file:
        file.write(bytes(blob))
        for _ in range(np.prod(shape) // 2**16):
            file.write(row)
    return folder / "b.nii.gz"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "scaled", "double"])
def test_four_threads_with_the_largest_files_need_less_than_1_gb(tmp_path, kind, monkeypatch):
    path = largest(tmp_path, kind)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    items = [sources.Item(str(tmp_path), path.name)] * 4

    def work():
        peak = max(peak for _, peak in cache._pooled(items, cache._survey, "reading"))

        def read(item):
            return decoding.read_file(item.path, 3, -1, peak, set())

        list(cache._pooled(items, read, "all"))

    assert memory_of(work) < 1e9


@pytest.mark.slow
def test_a_gzip_with_endless_zeros_is_refused(tmp_path):
    nifti(tmp_path / "a.nii", head())
    with gzip.open(tmp_path / "b.nii.gz", "wb", compresslevel=1) as file:
        file.write((tmp_path / "a.nii").read_bytes())
        for _ in range(1200):
            file.write(bytes(2**20))
    assert "more bytes than" in failure(read_slices, tmp_path / "b.nii.gz", Config())
    assert memory_of(lambda: read_slices(tmp_path / "b.nii.gz", Config())) < 100e6
