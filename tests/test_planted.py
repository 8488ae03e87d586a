"""Slices with planted defects: their scores lie far outside the range of chance."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from config import Config
from dataset import BrainSlices, Crop, open_data
from scores.evaluation import Scorer

N = 384  # slices in a set
DRAWS = 10  # random divisions of the subjects


def some(split: BrainSlices, subjects: np.ndarray) -> BrainSlices:
    rows = np.flatnonzero(np.isin(split.subjects, subjects))
    return BrainSlices(split.images, split.rows[rows], split.subjects[rows], split.levels[rows])


def drawn(split: BrainSlices, seed: int) -> tuple[Tensor, np.ndarray]:
    rows = np.random.default_rng(seed).permutation(len(split))[:N]
    return split.batch(rows), split.levels[rows]


def scorer_of(split: BrainSlices, seed: int) -> tuple[Scorer, Tensor, np.ndarray]:
    """Half of the subjects are the reference, a quarter is unseen, a quarter "generated"."""
    subjects = np.random.default_rng(seed).permutation(np.unique(split.subjects))
    reference, fake, unseen = np.split(subjects, [len(subjects) // 2, 3 * len(subjects) // 4])
    scorer = Scorer(some(split, reference), N, Crop.around_heads(split.brightest()))
    scorer.add("test", *drawn(some(split, unseen), 1))
    return scorer, *drawn(some(split, fake), 2)


def scores(scorer: Scorer, images: Tensor, levels: np.ndarray) -> dict[str, float]:
    scorer.add("generated", images, levels)
    found = scorer.all()
    return {name: v["generated"] for name, v in found.items() if name != "n"}


# --- defects: slices, levels and reference -> slices, levels ------------------------------


def with_copies(images: Tensor, levels: np.ndarray, reference: BrainSlices):
    """A twentieth are copies: turned by 2 degrees, moved by a pixel, coded as JPEG."""
    copied, copied_levels = (x[: N // 20] for x in drawn(reference, 7))
    cos, sin = math.cos(math.radians(2)), math.sin(math.radians(2))
    way = torch.tensor([[cos, -sin, 1 / 128], [sin, cos, 0]]).expand(len(copied), 2, 3)
    places = F.affine_grid(way, copied.shape, align_corners=False)
    moved = F.grid_sample(copied, places, align_corners=False)
    pixels = (255 * moved[:, 0]).round().numpy().astype(np.uint8)
    coded = [cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, 75])[1] for x in pixels]
    read = np.stack([cv2.imdecode(x, cv2.IMREAD_GRAYSCALE) for x in coded])
    images = torch.cat([torch.from_numpy(read)[:, None].float() / 255, images[len(read) :]])
    return images, np.concatenate([copied_levels, levels[len(read) :]])


def blurred(images, levels, reference):
    return gaussian_blur(images, 9, 1.0), levels


def grainy(images, levels, reference):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 0.03 * noise * (images > 0)).clamp(0, 1), levels


def mirrored(images, levels, reference):
    """The left half, on both sides."""
    left = images[..., :128]
    return torch.cat([left, left.flip(3)], 3), levels


def without_middle(images, levels, reference):
    kept = np.resize(np.flatnonzero((levels < 0.4) | (levels > 0.6)), N)
    return images[kept], levels[kept]


def with_large_ventricles(images, levels, reference):
    """In the middle, the darkest of 3x3 pixels: about a fifth more CSF inside the brain."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 256)] * 2, indexing="ij")
    share = torch.exp(-(((x / 0.3) ** 2 + (y / 0.45) ** 2) ** 2))
    return images - share * (images + F.max_pool2d(-images, 3, 1, 1)), levels


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> BrainSlices:
    return open_data(Config(cache=str(tmp_path_factory.mktemp("cache")))).train


@pytest.fixture(scope="module")
def by_chance(subjects):
    """Name of a score -> its range over random divisions of the subjects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "judge_auc", lambda self: {})  # a minute each
        found = [scores(*scorer_of(subjects, seed)) for seed in range(DRAWS)]
        rows = {name: [row[name] for row in found] for name in found[0]}
        yield {name: (min(row), max(row)) for name, row in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "defect, widths, seen_by",
    [
        (blurred, 1, ["fine_fd_train", "recall", "spectrum_db"]),
        (grainy, 1, ["fine_fd_train"]),
        (with_copies, 1, ["memorised_share"]),
        (mirrored, 1, ["layout_fd_train", "layout_recall"]),
        (without_middle, 1, ["layout_fd_train"]),
        (with_large_ventricles, 1, ["layout_fd_train"]),
        (with_large_ventricles, 0.5, ["morphometry"]),
    ],
)
def test_a_defect_is_outside_the_range_of_chance(defect, widths, seen_by, subjects, by_chance):
    """By more than `widths` of it: of many scores, one lies a little outside by chance."""
    scorer, images, levels = scorer_of(subjects, DRAWS)
    found = scores(scorer, *defect(images, levels, scorer.source))
    for name in seen_by:
        low, high = by_chance[name]
        away = low - found[name] if "recall" in name else found[name] - high
        assert away > widths * (high - low), (name, found[name], low, high)
