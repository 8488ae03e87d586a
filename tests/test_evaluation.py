"""What `evaluate` says of generators whose quality is known: new slices, copies, one slice."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from config import Config
from dataset import BrainSlices, Crop, Data
from scores import evaluation

PEOPLE, LEVELS = {"train": 40, "validation": 12, "test": 12}, 8


def slices_of(people: int, seed: int) -> np.ndarray:
    """Grey ellipses with spots, larger and brighter with the level: uint8 (n, 256, 256)."""
    draw, slices = np.random.default_rng(seed), []
    for _ in range(people):
        size = draw.uniform(0.8, 1.2)
        for level in range(LEVELS):
            image = np.zeros((256, 256), np.uint8)
            radius = int((40 + 6 * level) * size)
            cv2.ellipse(image, (128, 128), (radius, radius + 10), 0, 0, 360, 120, -1)
            for _ in range(12):
                x, y = draw.normal(128, 25, 2).astype(int).tolist()
                cv2.circle(image, (x, y), 8, int(draw.integers(60, 250)), -1)
            slices.append(image)
    return np.stack(slices)


@pytest.fixture(scope="module")
def data():
    people = [(part, i) for part, count in PEOPLE.items() for i in range(count)]
    images = np.concatenate([slices_of(n, seed) for seed, n in enumerate(PEOPLE.values())])
    names = np.repeat([f"{part}-{i}" for part, i in people], LEVELS)
    levels = np.tile(np.linspace(0, 1, LEVELS), len(people))
    made = {}
    for part in PEOPLE:
        rows = np.flatnonzero(np.char.startswith(names, part))
        made[part] = BrainSlices(images, rows, names[rows], levels[rows])
    return Data(**made, images=images, fingerprint="f", stamp="", report={})


def run_of(drawn: np.ndarray):
    """A run that reconstructs with some blur, and that generates the slices `drawn`."""
    images = torch.from_numpy(drawn)[:, None].float() / 255
    levels = torch.linspace(0, 1, LEVELS).repeat(len(drawn) // LEVELS)

    def maps(x):
        return (torch.nn.functional.avg_pool2d(x, 4)[:, 0] * 15).long()

    def reconstruct(x):
        blurred = [cv2.GaussianBlur(image, (0, 0), 2) for image in x[:, 0].numpy()]
        return maps(x), torch.from_numpy(np.stack(blurred))[:, None]

    return SimpleNamespace(
        config=Config(samples=96, codes=16), fingerprint="f", seed=0,
        stamp="", folder="run", counts=torch.ones(16), reconstruct=reconstruct,
        conditional=True, code_map=SimpleNamespace(crop=Crop()),
        sample=lambda n: (maps(images[:n]), images[:n]), noise=lambda n: (None, levels[:n]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def score(data):
    """From a generator's slices to its scores."""
    return lambda drawn: evaluation.evaluate(run_of(drawn), data)


def test_fresh_slices_of_new_people_score_as_real_ones(score):
    result = score(slices_of(12, 99))
    g = result["generation"]
    for name in ("fd_train", "layout_fd_train", "fine_fd_train"):
        assert g[name]["generated"] < 2 * g[name]["real"] + 1, name
    for name in ("fd_train", "fine_fd_train"):  # blur is seen
        assert g[name]["reconstruction"] > 3 * g[name]["real"], name
    assert g["memorised_share"]["generated"] < 0.1
    assert g["memorised_share"]["planted_copies"] == 1
    assert g["c2st_auc"]["generated"] < 0.7 < g["c2st_auc"]["reconstruction"]
    assert g["level_error"]["generated"] < 0.2 and g["level_error"]["unseen_people"] < 0.2
    judged, areas = g["judge_auc_test"], g["morphometry"]
    assert abs(judged["generated"] - 0.5) < 0.2 and abs(judged["real"] - 0.5) < 0.2
    assert judged["reconstruction"] > 0.8  # blur again
    assert 0 < judged["standard_error"] < 0.1 and areas["generated"] < 3
    assert 0 < result["reconstruction"]["ssim"]["mean"] < 1
    assert all(label in evaluation.table(result) for label in evaluation.LABELS.values())


@pytest.mark.slow
def test_one_slice_again_and_again_fails_on_diversity(score):
    g = score(np.repeat(slices_of(1, 99)[4:5], 12 * LEVELS, 0))["generation"]
    assert g["recall"]["generated"] == 0 == g["layout_recall"]["generated"]
    assert g["ms_ssim_of_pairs"]["generated"] > 0.999 > g["ms_ssim_of_pairs"]["real"]
    assert g["fd_train"]["generated"] > 5 * g["fd_train"]["real"]
    assert g["level_error"]["generated"] > 1.5 * g["level_error"]["unseen_people"]


def test_a_split_is_measured_part_by_part_in_order(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    rows = np.arange(300)[::-1]
    split = BrainSlices(images, rows, rows.astype(str), np.full(300, np.nan, np.float32))
    sizes = []

    def measure(x):
        sizes.append(len(x))
        return x.flatten(1)

    found = evaluation.in_parts(measure, split)
    assert torch.equal(found, split.batch(range(300)).flatten(1))
    assert max(sizes) == evaluation.PART and sum(sizes) == 300
    some = np.array([5, 2, 250])
    assert torch.equal(evaluation.in_parts(measure, split, some), found[some])


def test_areas_are_compared_alike_if_the_levels_of_one_set_are_unknown(data):
    scorer = evaluation.Scorer(data.train, 96, Crop())
    images = data.train.batch(scorer.rows["real"])
    scorer.add("generated", images, np.full(96, np.nan))
    unknown = scorer.morphometry()
    scorer.add("generated", images, data.train.levels[scorer.rows["real"]])
    known = scorer.morphometry()
    for found in (unknown, known):
        assert found["generated"] == pytest.approx(found["real"])
    assert unknown["real"] != pytest.approx(known["real"])
