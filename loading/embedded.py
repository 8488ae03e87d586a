"""Makes the embedded data set: synthetic subjects, deformed from one real brain template.

In: the numbers of a split and a subject. Out: slices uint8 (slices,256,256), lowest first.
The template is MNI152 (ICBM 2009a nonlinear symmetric, Fonov et al. 2011), which comes with
nilearn. Each subject has a random smooth deformation, pose, tissue contrast, sharpness, bias
field and noise. The same numbers of split and subject give the same slices on every call.
"""

import functools
import importlib.util
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from loading.decoding import MIN_BRAIN, SIDE

VERSION = 2  # part of the fingerprint; raise it if the same numbers give other pixels
FIELD = (208, 176)  # rows and columns in mm of the OASIS T88 frame, which the brain fills
VENTRICLES_MM = np.array([0.0, -14.0, 14.0])  # centre of the ventricles, MNI coordinates
ORIGIN_MM = np.array([-98.0, -134.0, -72.0])  # of the template's first voxel
CENTRE_MM = np.array([0.0, -18.0, 0.0])  # point of the brain at the centre of the frame
_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"

# Positions in mm from the centre of the frame: rows from anterior to posterior, columns from
# the patient's right to left (radiological).
_PIXELS = ((FIELD[0] - 1) / 2 - np.arange(FIELD[0]), (FIELD[1] - 1) / 2 - np.arange(FIELD[1]))


def subject_slices(seed: int, part: int, subject: int, slices: int) -> np.ndarray:
    """Return the slices of one subject, lowest first: uint8 (slices,256,256).

    part and subject: number of the split, and of the subject in it. Anterior is up, 1 mm per
    pixel, background 0.
    """
    random = np.random.default_rng([seed, part, subject])
    person = _Person(random)
    heights = person.heights(slices)
    inside, csf, grey, white, texture = person.tissues(heights)
    levels = random.normal((0.17, 0.56, 0.88), (0.03, 0.035, 0.02))  # T1 intensities
    signal = levels[0] * csf + levels[1] * grey + levels[2] * white
    signal = (signal + random.uniform(0.6, 1.0) * texture).astype(np.float32)
    signal *= np.exp(person.bias.on(heights, *_PIXELS)[0, inside])
    signal += 0.008 * random.standard_normal(signal.shape, dtype=np.float32)
    return _framed(signal, inside)


class _Person:
    """One subject's random shape: maps positions in the subject to template voxels."""

    def __init__(self, random: np.random.Generator):
        # Three scales: head, lobes, gyri. Most coefficients are below 0.4 of their spacing;
        # then a cubic B-spline deformation cannot fold (Choi & Lee 2000).
        scales_mm = (52, 8.0), (26, 4.2), (13, 2.4)  # spacing and standard deviation
        self.warps = [_Field(random, spacing, sd, components=3) for spacing, sd in scales_mm]
        self.folds = _Field(random, 7, 1.5, components=2)
        self.bias = _Field(random, 70, 0.12)
        angles_rad = random.normal(0, np.radians((2.5, 2, 2.5))) * (1, -1, 1)
        self.linear = Rotation.from_euler("xyz", angles_rad).as_matrix()
        self.linear /= random.normal(0.975, 0.015) * random.normal((1.04, 1, 1), 0.02)
        self.shift_mm = random.normal(0, (1.5, 2, 2))
        self.ventricles = random.uniform(-0.3, 0.42)
        self.atrophy = random.normal(0, 0.45)
        self.thickness = random.normal(0.1, 0.35)
        self.sharpness = random.uniform(1.5, 2.4)

    def heights(self, slices: int) -> np.ndarray:
        """Return heights in mm of even slices with at least 15 % brain: float64 (slices,)."""
        z_mm = np.arange(-80, 100, 2.0)
        y_mm, x_mm = (axis[::6] for axis in _PIXELS)
        inside = _sample(_atlas()[3], self._positions(z_mm, y_mm, x_mm), order=0) > 0
        good = z_mm[inside.mean(axis=(1, 2)) >= MIN_BRAIN]
        return np.linspace(good[0], good[-1], slices)

    def _positions(self, z_mm, y_mm, x_mm) -> np.ndarray:
        """Return the template voxel of every grid point: float32 (3,Z,Y,X)."""
        grid = np.empty((3, len(z_mm), len(y_mm), len(x_mm)), np.float32)
        grid[0], grid[1], grid[2] = x_mm, y_mm[:, None], z_mm[:, None, None]
        grid = np.tensordot(self.linear.astype(np.float32), grid, axes=1)
        for warp in self.warps:
            grid += warp.on(z_mm, y_mm, x_mm)
        grid += _column(CENTRE_MM + self.shift_mm - VENTRICLES_MM)
        # Sampling closer to the ventricles' centre enlarges the ventricles.
        distance = np.sum((grid / _column((24, 38, 22))) ** 2, axis=0)
        grid *= 1 - self.ventricles * np.exp(-distance / 2)
        grid += _column(VENTRICLES_MM) - _column(ORIGIN_MM)
        return grid

    def tissues(self, z_mm: np.ndarray) -> list[np.ndarray]:
        """Return the brain mask, bool (Z,208,176), and four arrays over its n voxels.

        float32 (n,): shares of CSF, grey and white matter, which sum to 1, and texture.
        """
        positions = self._positions(z_mm, *_PIXELS)
        inside = _sample(_atlas()[3], positions) > 0.5
        positions = positions[:, inside]
        grey, white, texture = (_sample(channel, positions) for channel in _atlas()[:3])
        fold, depth = self.folds.on(z_mm, *_PIXELS)[:, inside]
        # The template averages 152 people, which blurs its sulci. Raising the shares to a power
        # sharpens them. Smooth noise on their logarithms gives each subject its own folds.
        shares = [
            np.maximum(1 - grey - white, 0) * np.exp(fold + self.atrophy),
            grey * np.exp(self.thickness),
            white * np.exp(0.7 * depth),
        ]
        shares = [np.maximum(share, 1e-4) ** self.sharpness for share in shares]
        total = sum(shares)
        return [inside, *(share / total for share in shares), texture]


class _Field:
    """Smooth random field: cubic B-splines with normal coefficients on a lattice."""

    def __init__(self, random, spacing_mm: float, sd: float, components: int = 1):
        self.spacing_mm = spacing_mm
        self.reach = int(np.ceil(132 / spacing_mm)) + 2  # lattice nodes on either side
        nodes = (components,) + (2 * self.reach + 1,) * 3
        self.nodes = random.standard_normal(nodes, dtype=np.float32) * np.float32(sd)

    def on(self, z_mm, y_mm, x_mm) -> np.ndarray:
        """Return the field on a grid: float32 (components,Z,Y,X). One matrix per axis."""
        values = self.nodes  # (components, z, y, x)
        for axis_mm in (z_mm, y_mm, x_mm):  # node axis 1 goes, a grid axis comes last
            values = np.tensordot(values, self._weights(axis_mm), axes=(1, 1))
        return values

    def _weights(self, axis_mm: np.ndarray) -> np.ndarray:
        """Return the weight of each node at each position: float32 (positions, nodes)."""
        nodes = np.arange(-self.reach, self.reach + 1)
        t = np.abs(axis_mm[:, None] / self.spacing_mm - nodes)
        near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
        return np.where(t < 1, near, np.where(t < 2, far, 0)).astype(np.float32)


def _framed(signal: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Map percentiles 0.5 and 99.5 to 0 and 255, and centre the brain in its frame: uint8."""
    low, high = np.percentile(signal, (0.5, 99.5))
    frame = np.zeros((len(inside), SIDE, SIDE), np.uint8)
    top, left = (SIDE - FIELD[0]) // 2, (SIDE - FIELD[1]) // 2
    brain = frame[:, top : top + FIELD[0], left : left + FIELD[1]]
    brain[inside] = np.rint(np.clip((signal - low) * (255 / (high - low)), 0, 255))
    return frame


@functools.cache
def _atlas() -> tuple[np.ndarray, ...]:
    """Return grey matter, white matter, T1 texture and brain mask: float32 (197,233,189)."""
    grey, white, t1 = map(_template, ("gm", "wm", "t1"))
    mask = ndimage.binary_fill_holes(t1 > 0).astype(np.float32)
    # Texture is T1 that the tissues do not explain: deep nuclei, brain stem, shades of cortex.
    inside = mask > 0
    tissues = np.stack([grey[inside], white[inside], (mask - grey - white)[inside]], axis=1)
    texture = np.zeros_like(t1)
    texture[inside] = t1[inside] - tissues @ np.linalg.lstsq(tissues, t1[inside], rcond=None)[0]
    return grey, white, texture, mask


def _template(kind: str) -> np.ndarray:
    """Return one of nilearn's images, 0 to 1. Importing nilearn would take seconds."""
    spec = importlib.util.find_spec("nilearn")
    path = Path(spec.submodule_search_locations[0], _FILE.format(kind)) if spec else None
    if path is None or not path.is_file():
        raise ImportError("nilearn's MNI152 template is missing: pip install nilearn")
    return np.asanyarray(nibabel.load(path).dataobj) / np.float32(255)


def _sample(channel: np.ndarray, positions: np.ndarray, order: int = 1) -> np.ndarray:
    return ndimage.map_coordinates(channel, positions, order=order, output=np.float32)


def _column(vector) -> np.ndarray:
    return np.asarray(vector, np.float32)[:, None, None, None]
