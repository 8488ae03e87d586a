"""The embedded data set: people who do not exist, made from one real brain.

In: numbers of a split and a subject. Out: that subject's axial slices, uint8 (slices,256,256).
Each is the MNI152 template (ICBM 2009a nonlinear symmetric, Fonov et al. 2011), which lies
inside the wheel of nilearn, under a random smooth deformation, pose, tissue contrast,
sharpness, bias field and noise. The same numbers give the same brain on every call.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from scipy import ndimage

VERSION = 2  # part of every cache's fingerprint: raise it when a subject's look changes
SIDE = 256
FIELD = (208, 176)  # rows, columns in mm of the OASIS T88 frame, which the brain fills
MIN_BRAIN = 0.15  # of that frame: below, a slice shows too little to be worth learning
VENTRICLES_MM = np.array([0.0, -14.0, 14.0])  # their middle, in MNI coordinates
CENTRE_MM = np.array([0.0, -18.0, 0.0])  # of the brain, put in the middle of the frame

_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def subject_slices(seed: int, part: int, subject: int, slices: int) -> np.ndarray:
    """Subject number `subject` of split `part`, lowest slice first.

    Returns uint8 (slices,256,256): anterior up, 1 mm a pixel, background 0.
    """
    random = np.random.default_rng([seed, part, subject])
    person = _Person(random)
    heights = person.heights(slices)
    inside, *tissues = person.tissues(heights)
    signal = _intensity(*tissues, random)
    signal *= np.exp(person.bias.on(heights, *_PIXELS)[0, inside])
    signal += 0.008 * random.standard_normal(signal.shape, dtype=np.float32)
    return _framed(signal, inside)


# Millimetres from the middle of the frame: rows run from anterior to posterior, columns from
# the patient's right to left (radiological).
_PIXELS = ((FIELD[0] - 1) / 2 - np.arange(FIELD[0]), (FIELD[1] - 1) / 2 - np.arange(FIELD[1]))


class _Person:
    """The random shape of one brain: where in the template each of its voxels lies."""

    def __init__(self, random: np.random.Generator):
        # Three scales: shape of the head, lobes, gyri. Coefficients stay mostly below 0.4 of
        # their spacing, where a cubic B-spline deformation cannot fold (Choi & Lee 2000).
        self.warps = [
            _Field(random, spacing_mm, sd_mm, components=3)
            for spacing_mm, sd_mm in ((52, 8.0), (26, 4.2), (13, 2.4))
        ]
        self.folds = _Field(random, 7, 1.5, components=2)
        self.bias = _Field(random, 70, 0.12)
        self.linear = _rotation(random.normal(0, np.radians((2.5, 2, 2.5))))
        self.linear /= random.normal(0.975, 0.015) * random.normal((1.04, 1, 1), 0.02)
        self.shift_mm = random.normal(0, (1.5, 2, 2))
        self.ventricles = random.uniform(-0.3, 0.42)
        self.atrophy = random.normal(0, 0.45)
        self.thickness = random.normal(0.1, 0.35)
        self.sharpness = random.uniform(1.5, 2.4)

    def heights(self, slices: int) -> np.ndarray:
        """Heights in mm of evenly spaced slices with at least 15 % brain: float64 (slices,)."""
        z_mm = np.arange(-80, 100, 2.0)
        y_mm, x_mm = (axis[::6] for axis in _PIXELS)
        inside = _sample(_atlas()[3], self._positions(z_mm, y_mm, x_mm), order=0) > 0
        good = z_mm[inside.mean(axis=(1, 2)) >= MIN_BRAIN]
        return np.linspace(good[0], good[-1], slices)

    def _positions(self, z_mm, y_mm, x_mm) -> np.ndarray:
        """Template voxel of every point of the grid: float32 (3,Z,Y,X)."""
        grid = np.empty((3, len(z_mm), len(y_mm), len(x_mm)), np.float32)
        grid[0], grid[1], grid[2] = x_mm, y_mm[:, None], z_mm[:, None, None]
        grid = np.tensordot(self.linear.astype(np.float32), grid, axes=1)
        for warp in self.warps:
            grid += warp.on(z_mm, y_mm, x_mm)
        grid += _column(CENTRE_MM + self.shift_mm - VENTRICLES_MM)
        # Reading nearer to the middle of the ventricles makes them larger.
        distance = np.sum((grid / _column((24, 38, 22))) ** 2, axis=0)
        grid *= 1 - self.ventricles * np.exp(-distance / 2)
        grid += _column(VENTRICLES_MM) - _column(_origin_mm())
        return grid

    def tissues(self, z_mm: np.ndarray) -> list[np.ndarray]:
        """Where the brain is: bool (Z,208,176). Then, in its n voxels, float32 (n,) each, the
        shares of CSF, grey and white matter, whose sum is 1, and texture."""
        positions = self._positions(z_mm, *_PIXELS)
        inside = _sample(_atlas()[3], positions) > 0.5
        positions = positions[:, inside]
        grey, white, texture = (_sample(channel, positions) for channel in _atlas()[:3])
        fold, depth = self.folds.on(z_mm, *_PIXELS)[:, inside]
        # The template averages 152 people, so that its sulci are blurred. Raising the shares to
        # a power sharpens them; smooth noise on their logarithms folds each cortex anew.
        shares = [
            np.maximum(1 - grey - white, 0) * np.exp(fold + self.atrophy),
            grey * np.exp(self.thickness),
            white * np.exp(0.7 * depth),
        ]
        shares = [np.maximum(share, 1e-4) ** self.sharpness for share in shares]
        total = sum(shares)
        return [inside, *(share / total for share in shares), texture]


class _Field:
    """Smooth noise in space: cubic B-splines on a lattice of normal coefficients."""

    def __init__(self, random, spacing_mm: float, sd: float, components: int = 1):
        self.spacing_mm = spacing_mm
        self.reach = int(np.ceil(132 / spacing_mm)) + 2  # lattice nodes on either side
        nodes = (components,) + (2 * self.reach + 1,) * 3
        self.nodes = random.standard_normal(nodes, dtype=np.float32) * np.float32(sd)

    def on(self, z_mm, y_mm, x_mm) -> np.ndarray:
        """Values on a grid: float32 (components,Z,Y,X). Separable: one matrix an axis."""
        z, y, x = (self._weights(np.asarray(axis)) for axis in (z_mm, y_mm, x_mm))
        values = np.tensordot(self.nodes, z, axes=(1, 1))  # (components, y, x, Z)
        values = np.tensordot(values, y, axes=(1, 1))  # (components, x, Z, Y)
        return np.tensordot(values, x, axes=(1, 1))  # (components, Z, Y, X)

    def _weights(self, axis_mm: np.ndarray) -> np.ndarray:
        """Weight of each node at each position: float32 (positions, nodes)."""
        nodes = np.arange(-self.reach, self.reach + 1)
        t = np.abs(axis_mm[:, None] / self.spacing_mm - nodes)
        near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
        return np.where(t < 1, near, np.where(t < 2, far, 0)).astype(np.float32)


def _intensity(csf, grey, white, texture, random) -> np.ndarray:
    """T1 contrast, 1 being bright white matter: float32 (n,)."""
    levels = random.normal((0.17, 0.56, 0.88), (0.03, 0.035, 0.02))
    signal = levels[0] * csf + levels[1] * grey + levels[2] * white
    return (signal + random.uniform(0.6, 1.0) * texture).astype(np.float32)


def _framed(signal: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Window the signal by its percentiles 0.5 and 99.5 and put it in the middle: uint8."""
    low, high = np.percentile(signal, (0.5, 99.5))
    frame = np.zeros((len(inside), SIDE, SIDE), np.uint8)
    top, left = (SIDE - FIELD[0]) // 2, (SIDE - FIELD[1]) // 2
    brain = frame[:, top : top + FIELD[0], left : left + FIELD[1]]
    brain[inside] = np.rint(np.clip((signal - low) * (255 / (high - low)), 0, 255))
    return frame


@functools.cache
def _atlas() -> tuple[np.ndarray, ...]:
    """Grey and white matter, T1 texture and brain mask: float32 (197,233,189) each."""
    grey, white, t1 = (_template(kind) / np.float32(255) for kind in ("gm", "wm", "t1"))
    mask = ndimage.binary_fill_holes(t1 > 0).astype(np.float32)
    # What grey and white do not explain: deep nuclei, brain stem, the cortex's own shades.
    inside = mask > 0
    tissues = np.stack([grey[inside], white[inside], (mask - grey - white)[inside]], axis=1)
    texture = np.zeros_like(t1)
    texture[inside] = t1[inside] - tissues @ np.linalg.lstsq(tissues, t1[inside], rcond=None)[0]
    return grey, white, texture, mask


def _template(kind: str) -> np.ndarray:
    import nibabel

    return np.asanyarray(nibabel.load(_template_path(kind)).dataobj)


def _template_path(kind: str) -> Path:
    """The file inside nilearn, found without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("nilearn")
    path = Path(spec.submodule_search_locations[0], _FILE.format(kind)) if spec else None
    if path is None or not path.is_file():
        raise ImportError("the MNI152 template of nilearn is missing: pip install nilearn")
    return path


@functools.cache
def _origin_mm() -> np.ndarray:
    import nibabel

    return nibabel.load(_template_path("t1")).affine[:3, 3]


def _sample(channel: np.ndarray, positions: np.ndarray, order: int = 1) -> np.ndarray:
    return ndimage.map_coordinates(channel, positions, order=order, output=np.float32)


def _column(vector) -> np.ndarray:
    return np.asarray(vector, np.float32)[:, None, None, None]


def _rotation(angles_rad) -> np.ndarray:
    """Rotation about x, then y, then z: (3,3)."""
    turns = []
    for axis, angle in enumerate(angles_rad):
        turn, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        turns.append(turn)
    return turns[2] @ turns[1] @ turns[0]
