"""One file of an image or a volume -> slices uint8 (n,256,256), or the reason why not.

A slice is shown with anterior up and the patient's right on the left (radiological), where the
file says how it lies. Nothing is decoded before its header claims a sensible size, and nothing
damaged is let through because a decoder was patient. Knows nothing of subjects and splits.
"""

import contextlib
import gzip
import math
import re
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np

from config import Exit, UserError

SIDE = 256
MIN_BRAIN = 0.15  # share of a slice: below, it shows too little to be worth learning
# What one file may claim. Decoding takes up to 32 bytes a pixel and 10 a voxel, and several
# threads decode at once, but only one of them something LARGE: less than 1 GB in all.
MAX_PIXELS = 2**24
MAX_VOXELS = 2**26
MAX_BYTES = 2**28  # of an image's file, or of a volume's voxels as they are stored
LARGE = 2**23  # voxels, or a fourth as many pixels; an OASIS volume is smaller
_large = threading.Lock()
IMAGES = (".png", ".jpg", ".jpeg")
VOLUMES = (".nii", ".nii.gz", ".hdr")
T88 = re.compile(r"_t88_[^/]*\.(hdr|img)$", re.I)  # OASIS-1: the orientation is known


class Unreadable(Exception):
    """One file that cannot be used; its message says why."""


def read_file(path: Path, slices: int, axis: int, peak: int, greys: set[int]) -> np.ndarray:
    """Slices of one file, lowest first: uint8 (n,256,256), n = 1 for an image.

    slices: how many to take from a volume, at most. axis: of the slices, where the header does
    not say. peak: largest value of the 16-bit images of the source. greys: collects the grey
    values seen, until there are more than 8.
    Raises Unreadable, and UserError where `axis` is needed.
    """
    if path.name.lower().endswith(VOLUMES):
        stack, spacing_mm = _volume_slices(path, slices, axis)
    else:
        stack, spacing_mm = read_image(_bytes(path), peak)[None], None
    if len(greys) <= 8:
        greys.update(np.unique(stack).tolist())
    return np.stack([letterbox(image, spacing_mm) for image in stack])


def _turn(pixels: int = 0, voxels: int = 0):
    """A context in which something of this size may be decoded."""
    return _large if max(4 * pixels, voxels) > LARGE else contextlib.nullcontext()


def letterbox(image: np.ndarray, spacing_mm: tuple[float, float] | None = None) -> np.ndarray:
    """Put an image in the middle of a black 256x256 frame; its proportions stay.

    spacing_mm: height and width of a pixel. 1 mm becomes 1 pixel, or less where the image would
    not fit. Without it pixels are square, and one of 129 to 256 a side is not resampled at all.
    """
    height, width = image.shape
    tall, wide = (height, width) if spacing_mm is None else np.multiply(image.shape, spacing_mm)
    fit = SIDE / max(tall, wide)
    scale = fit if fit < 1 or (spacing_mm is None and fit >= 2) else 1.0
    new = [min(max(round(float(side * scale)), 1), SIDE) for side in (tall, wide)]
    if new != [height, width]:
        shrinks = new[0] * new[1] < height * width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(image, new[::-1], interpolation=method)
    frame = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - new[0]) // 2, (SIDE - new[1]) // 2
    frame[top : top + new[0], left : left + new[1]] = image
    return frame


# --- images -------------------------------------------------------------------------------


def read_image(blob: bytes, peak: int = 0) -> np.ndarray:
    """Grey image uint8 (H,W) from the bytes of a PNG or JPEG. Raises Unreadable."""
    if blob.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels, kinds = _check_png(blob)
        # UNCHANGED keeps 16 bits and transparency, but never turns an image as its EXIF says.
        flags = cv2.IMREAD_ANYDEPTH if b"eXIf" in kinds else cv2.IMREAD_UNCHANGED
    elif blob.startswith(b"\xff\xd8"):
        pixels = _check_jpeg(blob)
        flags = cv2.IMREAD_GRAYSCALE
    else:
        raise Unreadable("empty file" if not blob else "neither PNG nor JPEG inside")
    with _turn(pixels):
        return _to_8bit(_to_grey(_imdecode(blob, flags)), peak)


def _imdecode(blob: bytes, flags: int) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(blob, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Unreadable("cannot be decoded")
    return pixels


def peak_16bit(path: Path) -> int:
    """Largest value of a 16-bit PNG; 0 for any other file. Raises Unreadable."""
    with open(path, "rb") as file:
        head = file.read(26)
    if head[:4] != b"\x89PNG" or len(head) < 26 or head[24] != 16:
        return 0
    blob = _bytes(path)
    with _turn(_check_png(blob)[0]):
        return int(_to_grey(_imdecode(blob, cv2.IMREAD_UNCHANGED)).max())


def _to_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 or uint16 (H,W[,C]) -> (H,W); what is transparent is black."""
    if pixels.ndim == 2:
        return pixels
    blue, green, red = (pixels[..., i] for i in range(3))
    grey = blue
    if not (np.array_equal(blue, green) and np.array_equal(green, red)):
        grey = cv2.cvtColor(np.ascontiguousarray(pixels[..., :3]), cv2.COLOR_BGR2GRAY)
    if pixels.shape[2] == 4:
        alpha, full = pixels[..., 3], np.iinfo(pixels.dtype).max
        if alpha.min() < full:
            grey = np.rint(grey * (alpha / full)).astype(pixels.dtype)
    return grey


def _to_8bit(grey: np.ndarray, peak: int) -> np.ndarray:
    """Scale 16-bit files by the bits that the source uses: 12-bit data must not turn black."""
    if grey.dtype == np.uint8:
        return grey
    bits = max(8, max(peak, int(grey.max())).bit_length())
    return np.rint(grey * (255 / (2**bits - 1))).astype(np.uint8)


def _check_png(blob: bytes) -> tuple[int, set[bytes]]:
    """Number of pixels and kinds of chunks of a whole PNG.

    Decoders fill what is missing or wrong with something.
    """
    kinds, at, pixels = set(), 8, 0
    while at + 12 <= len(blob):
        length, kind = struct.unpack_from(">I4s", blob, at)
        if at + 12 + length > len(blob):
            break
        if (kind == b"IHDR") != (at == 8) or (at == 8 and length != 13):
            raise Unreadable("a PNG without a header where it should be")
        if at == 8:
            pixels = _check_size(*struct.unpack_from(">II", blob, at + 8))
        (crc,) = struct.unpack_from(">I", blob, at + 8 + length)
        if zlib.crc32(memoryview(blob)[at + 4 : at + 8 + length]) != crc:
            raise Unreadable(f"checksum of its {kind.decode('latin-1')} chunk is wrong")
        kinds.add(kind)
        if kind == b"IEND":
            return pixels, kinds
        at += 12 + length
    raise Unreadable("truncated PNG")


def _check_jpeg(blob: bytes) -> int:
    """Number of pixels. Walks the segments up to them, then looks for the end marker."""
    at, pixels = 2, 0
    while at + 4 <= len(blob) and blob[at] == 0xFF:
        marker = blob[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if (
            marker in range(0xC0, 0xD0)
            and marker not in (0xC4, 0xC8, 0xCC)
            and at + 9 <= len(blob)
        ):
            pixels = max(pixels, _check_size(*struct.unpack_from(">HH", blob, at + 5)))
        if marker == 0xDA:  # the end marker cannot occur inside the pixels
            if blob.find(b"\xff\xd9", at) < 0:
                break
            return pixels
        at += 2 + struct.unpack_from(">H", blob, at + 2)[0]
    raise Unreadable("truncated JPEG")


def _check_size(first: int, second: int) -> int:
    if not 0 < first * second <= MAX_PIXELS:
        raise Unreadable(f"its header claims {first} x {second} pixels")
    return first * second


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Unreadable(f"{path.stat().st_size:,} bytes are too many for an image")
        return path.read_bytes()
    except OSError as problem:
        raise Unreadable(problem.strerror or str(problem)) from None


# --- volumes ------------------------------------------------------------------------------


def _volume_slices(path: Path, slices: int, axis: int):
    """Slices uint8 (n,H,W) of a volume, and the height and width of a pixel in mm."""
    image = _open_volume(path)
    with _turn(voxels=math.prod(image.shape)):
        voxels, sizes_mm = _load_volume(path, image, axis)
        # (X,Y,Z) -> Z images, whose rows begin at the front and columns at the patient's right
        stack = window(voxels).transpose(2, 1, 0)[:, ::-1, ::-1]
        if len(stack) > 1:
            stack = stack[_spread(stack, slices)]
    return stack, (sizes_mm[1], sizes_mm[0])


def window(voxels: np.ndarray) -> np.ndarray:
    """Percentiles 0.5 to 99.5 of the finite voxels above 0 become 0 to 255: uint8, same shape.

    Over the volume, not the slice: else brightness would depend on height.
    """
    signal = voxels[np.isfinite(voxels) & (voxels > 0)]
    ends = np.percentile(signal, (0.5, 99.5), overwrite_input=True) if signal.size else (0, 0)
    low, high = map(float, ends)
    if not high - low > 1e-30:  # float32 has nothing to tell below
        raise Unreadable("a constant volume" if signal.size else "a volume without any signal")
    levels = np.empty(voxels.shape, np.uint8)
    for part, out in zip(voxels, levels, strict=True):  # all at once it would take 4 copies
        scaled = (np.where(np.isfinite(part), part, 0) - low) * (255 / (high - low))
        out[:] = np.rint(np.clip(scaled, 0, 255))
    return levels


def _spread(stack: np.ndarray, slices: int) -> np.ndarray:
    """Numbers of evenly spaced slices between the lowest and highest with enough brain."""
    share = (stack > 255 * 0.05).mean(axis=(1, 2))
    enough = np.flatnonzero(share >= min(MIN_BRAIN, share.max() / 2))
    return np.unique(np.rint(np.linspace(enough[0], enough[-1], slices)).astype(int))


def _open_volume(path: Path):
    """nibabel's image, of which only the header has been read. Raises Unreadable."""
    import nibabel

    # nibabel parses headers of a dozen formats and raises almost anything on a damaged one.
    try:
        image = nibabel.load(path)
        shape, kind = image.shape, image.get_data_dtype()
    except Exception as problem:
        raise Unreadable(f"not a volume ({_line(problem)})") from None
    _check_shape(shape, kind)
    return image


def _load_volume(path: Path, image, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels float32 (X,Y,Z), growing to right, anterior, superior, and their sizes in mm."""
    import nibabel

    # nibabel knows no orientation of plain Analyze files, and assumes that of T88 files.
    known = isinstance(image, nibabel.Nifti1Pair) or T88.search(path.name)
    if not known and axis < 0:
        raise UserError(
            Exit.DATA,
            f"{path}: Analyze files do not say how the head lies; give --axis 0, 1 or 2, the "
            "axis along which to slice",
        )
    try:
        _check_gzip(path)
        voxels = _float32(image).reshape([*image.shape, 1][:3])
        turn = nibabel.io_orientation(image.affine) if known else _along(axis)
        voxels = nibabel.apply_orientation(voxels, turn)
        sizes_mm = nibabel.affines.voxel_sizes(image.affine)[np.argsort(turn[:, 0])]
    except MemoryError:  # no fault of the file
        raise
    except Exception as problem:
        raise Unreadable(f"damaged volume ({_line(problem)})") from None
    sizes_mm = np.where(np.isfinite(sizes_mm) & (sizes_mm > 0), sizes_mm, 1.0)
    return _flat_last(voxels, sizes_mm)


def _float32(image) -> np.ndarray:
    """All voxels, scaled as the header says, in the byte order that torch needs."""
    data = image.dataobj
    stored, plain = data.get_unscaled(), (data.slope, data.inter) == (1, 0)
    voxels = np.empty(stored.shape, np.float32, order="F")
    for part, out in zip(stored.T, voxels.T, strict=True):  # all at once they would be float64
        out[:] = part if plain else part * np.float64(data.slope) + data.inter
    return voxels


def _along(axis: int) -> np.ndarray:
    """The orientation, as nibabel writes one, that makes `axis` the last and flips none."""
    order = [k for k in range(3) if k != axis] + [axis]
    return np.array([[order.index(k), 1] for k in range(3)], float)


def _check_shape(shape: tuple[int, ...], kind: np.dtype):
    count, shown = math.prod(shape), " x ".join(map(str, shape))
    if kind.kind not in "biuf":
        raise Unreadable(f"voxels of type {kind}, not plain numbers")
    if any(n > 1 for n in shape[3:]):
        raise Unreadable(f"a series of volumes, {shown}: give one volume")
    if (
        len(shape) < 2
        or min(shape) < 1
        or count > MAX_VOXELS
        or count * kind.itemsize > MAX_BYTES
    ):
        raise Unreadable(f"its header claims {shown} voxels of {kind.itemsize} bytes")


def _flat_last(voxels: np.ndarray, sizes_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A single slice of any direction becomes the one slice of the last axis."""
    thin = [k for k in range(3) if voxels.shape[k] == 1]
    if len(thin) != 1:
        return voxels, sizes_mm
    order = [k for k in range(3) if k != thin[0]] + thin
    return voxels.transpose(order), sizes_mm[order]


def _check_gzip(path: Path):
    """Read the stream to its end, where its checksum is: nibabel stops before."""
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as stream:
            while stream.read(2**20):
                if stream.tell() > 2 * MAX_BYTES:
                    raise ValueError("more bytes than a volume may have")


def _line(problem: Exception) -> str:
    """What an exception says, in one line that any file can hold."""
    text = " ".join(str(problem).split())[:120] or type(problem).__name__
    return text.encode("utf-8", "replace").decode("utf-8")
