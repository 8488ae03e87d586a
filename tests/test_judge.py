"""The trained judge, tissue areas, the number of threads: each must see what it is made for."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import disks

from dataset import Crop
from scores import judge, metrics
from stages.stage import Pace
from support import device


def test_the_judge_tells_other_shapes_and_not_equal_ones(monkeypatch):
    monkeypatch.setattr(judge, "STEPS", 40)
    sets = disks(64, 0), disks(64, 1), disks(64, 2, wide=1.35), disks(64, 3)
    real, unseen, wider, same = (judge.prepared(images, Crop()) for images in sets)
    (told, error), (equal, _) = (
        judge.judged(real, samples, {"test": unseen}, judges=2)["test"]
        for samples in (wider, same)
    )
    assert told > 0.9 and abs(equal - 0.5) < 0.15 and 0 <= error < 0.2


def test_the_judge_is_tested_on_other_samples_than_it_learns(monkeypatch):
    seen = []
    monkeypatch.setattr(judge, "trained_judge", lambda real, fake, seed: seen.append(fake))
    monkeypatch.setattr(judge, "judge_scores", lambda model, x: x.flatten(1)[:, 0].numpy())
    samples = torch.arange(10.0).view(10, 1, 1, 1)
    people = {"test": torch.full((3, 1, 1, 1), 99.0), "none": torch.full((3, 1, 1, 1), -1.0)}
    found = judge.judged(samples, samples, people, judges=3)
    assert all(len(fake) == 5 for fake in seen)
    assert len({tuple(fake.flatten().tolist()) for fake in seen}) > 1  # other halves
    assert found == {"test": (1.0, 0.0), "none": (0.0, 0.0)}


def test_codec_noise_and_frame_do_not_reach_the_judge():
    images = disks(4, 0)
    noisy = (images + 0.02 * torch.randn(images.shape)).clamp(0, 1)
    crop = Crop(8, 8, 48, 48)
    framed = images.clone()
    framed[..., :20, :] = 1  # outside the crop
    once, again, other = (judge.prepared(x, crop) / 255 for x in (images, noisy, framed))
    assert once.shape == (4, 1, 96, 96) and torch.equal(once, other)
    assert (once - again).abs().mean() < 0.5 * 0.02


def test_mirrored_slices_and_shifts_are_made():
    x = torch.zeros(64, 1, 12, 12)
    x[:, :, 4:8, 2:4] = 1
    moved = judge.augmented(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and len(moved.flatten(1).unique(dim=0)) > 20
    assert (moved[..., 6:].sum((1, 2, 3)) > moved[..., :6].sum((1, 2, 3))).float().mean() > 0.2


# --- tissue areas -------------------------------------------------------------------------


def test_thresholds_part_three_tissues():
    draw = np.random.default_rng(0)
    means = draw.choice([0.15, 0.5, 0.8], (6, 1, 64, 64), p=[0.2, 0.5, 0.3])
    images = torch.from_numpy(means + draw.normal(0, 0.03, means.shape)).float().clamp(0.06, 1)
    low, high = metrics.tissue_thresholds(images)
    assert 0.2 < low < 0.45 and 0.56 < high < 0.75
    areas = metrics.tissue_areas(images, (low, high))
    inside = metrics.brain_mask(images).flatten(1).sum(1).numpy()
    assert np.array_equal(areas.sum(1), inside)
    assert np.allclose(areas.mean(0) / inside.mean(), [0.2, 0.5, 0.3], atol=0.03)


def test_area_distance_is_the_shift_at_equal_level_and_sees_larger_ventricles():
    """Without a common range of levels, or with unknown ones, all are compared together."""
    draw = np.random.default_rng(0)
    levels = draw.random(400)
    areas = draw.normal(1000, 50, (400, 3)) + 2000 * levels[:, None]
    shifted = metrics.area_distance(areas, areas + 70, levels, levels)
    assert shifted == pytest.approx(70, abs=1e-6)
    assert metrics.area_distance(areas, areas, levels, levels) == 0
    swapped = metrics.area_distance(areas, areas[::-1], levels, levels)
    assert swapped > 100  # the same areas at other levels
    unknown, third = np.full(400, np.nan), levels / 3
    for pair in ((levels, unknown), (unknown, unknown), (third, third + 0.6)):
        together = metrics.area_distance(areas, areas[::-1] + 70, *pair)
        assert together == pytest.approx(70, abs=1e-6)
    csf = areas * [1.2, 1, 1]
    assert metrics.area_distance(csf, areas, levels, levels) > 50


# --- threads and pace ---------------------------------------------------------------------


@pytest.mark.parametrize(("others", "wanted"), [(0, 4), (1, 3), (2, 2), (4, 1), (12, 1)])
def test_threads_are_as_many_as_are_idle(monkeypatch, others, wanted):
    clock = {"wall": 0.0}

    class Pool(ThreadPoolExecutor):  # four threads that share four cores with others
        def map(self, *_):
            clock["wall"] += 0.4
            return []

    monkeypatch.setattr(device, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(time, "monotonic", lambda: clock["wall"])
    monkeypatch.setattr(time, "process_time", lambda: clock["wall"] * 16 / (4 + others))
    assert device.idle_threads(4) == wanted


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [("800000 100000", 8), ("max 100000", 16), ("50000 100000", 1), ("", 16)],
)
def test_a_container_uses_no_more_threads_than_cores(limit, wanted, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(limit)
    threads = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    assert device.all_threads(tmp_path / "cpu.max") == wanted
    threads[0] = 1  # a seed was begun on a busy machine; the next one starts from all again
    assert device.all_threads(tmp_path / "cpu.max") == wanted
    assert device.all_threads(tmp_path / "absent") == 1


def test_a_slow_machine_is_noticed_once(monkeypatch, capsys):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    pace = Pace()
    for seconds in [1.0] * 6 + [1.5] * 4 + [2.5] * 5:
        for _ in range(3):
            pace.begin()
            clock["now"] += seconds
            pace.end()
            clock["now"] += 100  # a measurement
        pace.check()
    said = capsys.readouterr().err
    assert said.count("usual time") == 1 and "2.5 times" in said
