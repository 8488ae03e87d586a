"""Decodes one file, an image or a volume, to slices uint8 (n,256,256).

A slice shows anterior up and the patient's right on the left (radiological), if the file states
its orientation. Sizes claimed in a header are checked before anything is decoded. Checksums and
end markers are checked too, since decoders fill in missing or damaged data silently.
"""

import contextlib
import functools
import gzip
import math
import os
import re
import struct
import threading
import zlib
from pathlib import Path

import cv2
import nibabel
import numpy as np

from config import Exit, UserError
from support.messages import printable

SIDE = 256
IMAGES = (".png", ".jpg", ".jpeg")
VOLUMES = (".nii", ".nii.gz", ".hdr", ".mgz", ".mgh")
T88 = re.compile(r"_t88_[^/]*\.(hdr|img)$", re.I)  # OASIS-1 files with known orientation
MIN_BRAIN = 0.15  # share of brain in a slice; slices with less show too little to learn from
HEAD_MM = (80, 400)  # longest side of a head's volume; a single slice may have twice that
NEGATIVE = 0.01  # share of voxels below 0 from which on they belong to the head
FEW_VALUES = 32  # a volume with at most so many distinct values is a label map
LABELS = "a label map"
# Limits for one file. Decoding takes up to 32 bytes per pixel and 10 per voxel. Several threads
# decode at once, but only one of them a LARGE file, so that all stay below 1 GB.
MAX_PIXELS = 2**24
MAX_VOXELS = 2**26
MAX_BYTES = 2**28  # of an image file, or of a volume's voxels as stored
LARGE = 2**23  # voxels, or four times the pixels; an OASIS volume is smaller
_one_large_file = threading.Lock()
Ends = tuple[float, float, float]  # black, white, and the background's value


class Unreadable(Exception):
    """A file that cannot be used. The message says why."""


def read_file(
    path: Path, slices: int, axis: int, peak: int, greys: set[int], ends: Ends | None = None
) -> np.ndarray:
    """Return the slices of one file, lowest first: uint8 (n,256,256). An image has n = 1.

    slices: the most to take from a volume. axis: slice axis, if the header has no orientation.
    peak: largest value in all 16-bit images of the source. greys: collects grey values until
    there are more than 8. ends: black and white of a volume, if its series decides them.
    Raises Unreadable, and UserError if `axis` is needed.
    """
    if path.name.lower().endswith(VOLUMES):
        stack, spacing_mm = _volume_slices(path, slices, axis, ends)
    else:
        stack, spacing_mm = read_image(_bytes(path), peak)[None], None
    if len(greys) <= 8:
        greys.update(np.unique(stack).tolist())
    return np.stack([letterbox(image, spacing_mm) for image in stack])


def _memory_guard(voxels: int):
    """Return a context for decoding; only one thread at a time decodes a LARGE file."""
    return _one_large_file if voxels > LARGE else contextlib.nullcontext()


def letterbox(image: np.ndarray, spacing_mm: tuple[float, float] | None = None) -> np.ndarray:
    """Centre an image in a black 256x256 frame and keep its proportions.

    spacing_mm: height and width of a pixel; 1 mm becomes 1 pixel, or less if the image would
    not fit. Without it pixels are square; if the longer side has 129 to 256 pixels, the image
    is not resampled.
    """
    height, width = image.shape
    tall, wide = np.multiply(image.shape, spacing_mm or (1, 1))
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
    """Decode the bytes of a PNG or JPEG to grey uint8 (H,W). Raises Unreadable."""
    if blob.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels, kinds = _check_png(blob)
        # UNCHANGED keeps 16 bits and transparency, but does not apply an EXIF rotation.
        flags = cv2.IMREAD_ANYDEPTH if b"eXIf" in kinds else cv2.IMREAD_UNCHANGED
    elif blob.startswith(b"\xff\xd8"):
        pixels = _check_jpeg(blob)
        flags = cv2.IMREAD_GRAYSCALE
    else:
        raise Unreadable("neither PNG nor JPEG inside" if blob else "empty file")
    with _memory_guard(4 * pixels):
        grey = _grey(blob, flags)
        if grey.dtype == np.uint8:
            return grey
        # Scale by the bits that the source uses: 12-bit data in 16 bits must not turn black.
        bits = max(8, max(peak, int(grey.max())).bit_length())
        return np.rint(grey * (255 / (2**bits - 1))).astype(np.uint8)


def peak_16bit(path: Path) -> int:
    """Return the largest value of a 16-bit PNG, 0 for any other file. Raises Unreadable."""
    _check_link(path)
    with open(path, "rb") as file:
        head = file.read(26)
    if head[:4] != b"\x89PNG" or len(head) < 26 or head[24] != 16:
        return 0
    blob = _bytes(path)
    with _memory_guard(4 * _check_png(blob)[0]):
        return int(_grey(blob, cv2.IMREAD_UNCHANGED).max())


def _grey(blob: bytes, flags: int) -> np.ndarray:
    """Decode to grey, uint8 or uint16 (H,W). Transparent pixels become black."""
    try:
        pixels = cv2.imdecode(np.frombuffer(blob, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Unreadable("cannot be decoded")
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


def _check_png(blob: bytes) -> tuple[int, set[bytes]]:
    """Return the number of pixels and the chunk kinds of a whole PNG. Raises Unreadable."""
    kinds, at, pixels = set(), 8, 0
    while at + 12 <= len(blob):
        length, kind = struct.unpack_from(">I4s", blob, at)
        if at + 12 + length > len(blob):
            break
        if (kind == b"IHDR") != (at == 8) or (at == 8 and length != 13):
            raise Unreadable("the PNG header is missing or misplaced")
        if at == 8:
            pixels = _check_size(*struct.unpack_from(">II", blob, at + 8))
        (crc,) = struct.unpack_from(">I", blob, at + 8 + length)
        if zlib.crc32(memoryview(blob)[at + 4 : at + 8 + length]) != crc:
            raise Unreadable(f"the checksum of its {kind.decode('latin-1')} chunk is wrong")
        kinds.add(kind)
        if kind == b"IEND":
            return pixels, kinds
        at += 12 + length
    raise Unreadable("truncated PNG")


def _check_jpeg(blob: bytes) -> int:
    """Return the number of pixels of a JPEG that has its end marker. Raises Unreadable."""
    at, pixels = 2, 0
    while at + 4 <= len(blob) and blob[at] == 0xFF:
        marker = blob[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        is_frame = marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC)
        if is_frame and at + 9 <= len(blob):
            pixels = max(pixels, _check_size(*struct.unpack_from(">HH", blob, at + 5)))
        if marker == 0xDA:  # pixels follow, and the end marker cannot occur inside them
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
        _check_link(path)
        if path.stat().st_size > MAX_BYTES:
            raise Unreadable(f"{path.stat().st_size:,} bytes are too many for an image")
        return path.read_bytes()
    except OSError as problem:
        raise Unreadable(problem.strerror or str(problem)) from None


# --- volumes ------------------------------------------------------------------------------


def _check_link(path: Path):
    """Raise Unreadable if a link leads nowhere, as in a datalad tree that was not fetched."""
    if path.is_symlink() and not path.exists():
        raise Unreadable(f"its content is missing (a link to {printable(os.readlink(path))})")


def _volume_slices(path: Path, slices: int, axis: int, ends: Ends | None):
    """Return slices uint8 (n,H,W) of a volume, and the height and width of a pixel in mm."""
    image = open_volume(path, axis)
    with _memory_guard(math.prod(image.shape)):
        voxels, sizes_mm = _load_volume(path, image, axis)
        if not ends and _is_label_map(voxels):
            raise Unreadable(f"{LABELS}, of at most {FEW_VALUES} values")
        # (X,Y,Z) -> (Z,Y,X): first row anterior, first column the patient's right
        stack = window(voxels, ends).transpose(2, 1, 0)[:, ::-1, ::-1]
        stack = stack[_spread(stack, slices)]
    return stack, (sizes_mm[1], sizes_mm[0])


def _is_label_map(voxels: np.ndarray) -> bool:
    if voxels.size < 2**16:
        return False
    some = voxels.ravel("K")[:: voxels.size // 2**15]  # first, since all take longer
    return all(len(np.unique(v)) <= FEW_VALUES for v in (some, voxels))


def window(voxels: np.ndarray, ends: Ends | None = None) -> np.ndarray:
    """Map `ends`, by default those of these voxels, to 0 and 255: uint8, same shape."""
    low, high, background = ends or window_ends([voxels])
    levels = np.empty(voxels.shape, np.uint8)
    for part, out in zip(voxels, levels, strict=True):  # all at once would need 4 copies
        black = ~np.isfinite(part) | (part == background)
        scaled = (np.where(black, low, part) - low) * (255 / (high - low))
        out[:] = np.rint(np.clip(scaled, 0, 255))
    return levels


def window_ends(volumes: list[np.ndarray]) -> Ends:
    """Return percentiles 0.5 and 99.5 of a head's finite voxels, and the background's value.

    The head is what is above 0. If over 1 % of the voxels are below 0, the head is all voxels
    but the most frequent value, if that is at least a tenth of all. Percentiles are taken of a
    volume, or of all slices of a series: by slice, brightness would depend on height.
    """
    finite, background = [voxels[np.isfinite(voxels)] for voxels in volumes], 0.0
    values = finite.pop() if len(finite) == 1 else np.concatenate(finite)
    del finite  # the copies would add to the peak of memory
    if (values < 0).sum() <= NEGATIVE * values.size:
        values = values[values > 0]
    else:
        common, counts = np.unique(values, return_counts=True)
        most = counts.argmax()
        background = float(common[most]) if counts[most] > values.size / 10 else np.nan
        values = values[values != background]
    ends = np.percentile(values, (0.5, 99.5), overwrite_input=True) if values.size else (0, 0)
    low, high = map(float, ends)
    if not high - low > 1e-30:  # smaller differences are lost in float32
        raise Unreadable("a constant volume" if values.size else "a volume without any signal")
    return low, high, background


@functools.lru_cache(maxsize=8)
def series_ends(paths: tuple[Path, ...], axis: int) -> Ends:
    """Return `window_ends` of the slices in several files; unreadable ones are left out."""
    slices = []
    for path in paths:
        with contextlib.suppress(Unreadable):
            slices.append(_load_volume(path, open_volume(path, axis), axis)[0])
    if not slices:
        raise Unreadable("no slice of its series can be read")
    return window_ends(slices)


def _spread(stack: np.ndarray, slices: int) -> np.ndarray:
    """Return indices, evenly spaced from the lowest to the highest slice with enough brain.

    A single one is the middle one.
    """
    share = (stack > 255 * 0.05).mean(axis=(1, 2))
    enough = np.flatnonzero(share >= min(MIN_BRAIN, share.max() / 2))
    if slices == 1:
        return enough[[len(enough) // 2]]
    return np.unique(np.rint(np.linspace(enough[0], enough[-1], slices)).astype(int))


def holds_one_slice(path: Path) -> bool:
    """Whether a volume file holds a single slice, by its header."""
    try:
        shape = nibabel.load(path).shape
    except Exception:  # a damaged header can raise almost any exception; it is reported later
        return False
    return len(shape) == 2 or 1 in shape[:3]


def open_volume(path: Path, axis: int):
    """Read and check the header; return nibabel's image.

    Raises Unreadable, and UserError if the header has no orientation and `axis` is -1.
    """
    try:  # nibabel parses many formats; a damaged header can raise almost any exception
        _check_link(path)
        image = nibabel.load(path)
        shape, kind = image.shape, image.get_data_dtype()
    except Unreadable:
        raise
    except Exception as problem:
        raise Unreadable(f"not a volume ({_line(problem)})") from None
    count, shown = math.prod(shape), " x ".join(map(str, shape))
    if kind.kind not in "biuf":
        raise Unreadable(f"voxels of type {kind}, not plain numbers")
    if any(n > 1 for n in shape[3:]):
        raise Unreadable(f"a series of volumes, {shown}: give one volume")
    too_large = count > MAX_VOXELS or count * kind.itemsize > MAX_BYTES
    if too_large or len(shape) < 2 or min(shape) < 1:
        raise Unreadable(f"its header claims {shown} voxels of {kind.itemsize} bytes")
    if axis < 0 and not _is_oriented(image, path):
        raise UserError(
            Exit.DATA,
            f"{path}: its header has no orientation; give --axis 0, 1 or 2, the axis along "
            "which to slice",
        )
    return image


def check_head_size(image):
    """Raise Unreadable if a header's volume is too short or too long for a head."""
    sides_mm = [n * mm for n, mm in zip(image.shape, _sizes_mm(image), strict=False)]
    longest, flat = max(sides_mm), len(image.shape) == 2 or 1 in image.shape[:3]
    if not HEAD_MM[0] <= longest <= HEAD_MM[1] * (2 if flat else 1):
        shown = " x ".join(f"{side:.3g}" for side in sides_mm)
        raise Unreadable(
            f"its header claims {shown} mm, and a head measures {HEAD_MM[0]} to {HEAD_MM[1]} "
            "mm: correct the voxel sizes or their unit"
        )


def _is_oriented(image, path: Path) -> bool:
    """Whether the orientation is known.

    Plain Analyze has none; nibabel assumes the one that OASIS' T88 files have. A NIfTI file has
    none if the codes of its sform and qform are 0, a FreeSurfer file if its flag says so.
    """
    if isinstance(image, nibabel.Nifti1Pair):
        return bool(image.header["sform_code"] or image.header["qform_code"])
    if isinstance(image, nibabel.MGHImage):
        return bool(image.header["goodRASFlag"])
    return bool(T88.search(path.name))


def _sizes_mm(image) -> np.ndarray:
    """Return the voxel sizes (3,) in mm, in the file's order of axes; 1 if not given."""
    units = getattr(image.header, "get_xyzt_units", lambda: ("mm", ""))()[0]
    to_mm = {"meter": 1000.0, "micron": 0.001}.get(units, 1.0)
    sizes = to_mm * nibabel.affines.voxel_sizes(image.affine)
    return np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1.0)


def _load_volume(path: Path, image, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels float32 (X,Y,Z) and their sizes in mm.

    X, Y and Z point to right, anterior and superior if the orientation is known. A volume of
    one slice has that slice along Z.
    """
    try:
        _check_gzip(path)
        voxels = _float32(image).reshape([*image.shape, 1][:3])
        sizes_mm = _sizes_mm(image)
        if _is_oriented(image, path):
            turn = nibabel.io_orientation(image.affine)
            voxels = nibabel.apply_orientation(voxels, turn)
            sizes_mm = sizes_mm[np.argsort(turn[:, 0])]
        else:
            voxels, sizes_mm = _axis_last(axis, voxels, sizes_mm)
    except MemoryError:  # the file is not at fault, so it must not be skipped
        raise
    except Exception as problem:
        raise Unreadable(f"damaged volume ({_line(problem)})") from None
    thin = [k for k in range(3) if voxels.shape[k] == 1]
    return _axis_last(thin[0], voxels, sizes_mm) if len(thin) == 1 else (voxels, sizes_mm)


def _axis_last(axis: int, voxels: np.ndarray, sizes_mm: np.ndarray):
    order = [k for k in range(3) if k != axis] + [axis]
    return voxels.transpose(order), sizes_mm[order]


def _float32(image) -> np.ndarray:
    """Return all voxels in native byte order (torch needs it), scaled as the header says."""
    data = image.dataobj
    stored, plain = data.get_unscaled(), (data.slope, data.inter) == (1, 0)
    voxels = np.empty(stored.shape, np.float32, order="F")
    for part, out in zip(stored.T, voxels.T, strict=True):  # all at once would be float64
        out[:] = part if plain else part * np.float64(data.slope) + data.inter
    return voxels


def _check_gzip(path: Path):
    """Read a .gz file to its end, which holds the checksum. nibabel stops before the end."""
    if path.name.lower().endswith((".gz", ".mgz")):
        with gzip.open(path) as stream:
            while stream.read(2**20):
                if stream.tell() > 2 * MAX_BYTES:
                    raise ValueError("more bytes than a volume may have")


def _line(problem: Exception) -> str:
    """Return an exception's message as one printable line."""
    return printable(" ".join(str(problem).split())[:120] or type(problem).__name__)
