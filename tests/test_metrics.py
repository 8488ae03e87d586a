"""What each measure promises: closed forms, independent implementations, negative controls."""

import math

import cv2
import numpy as np
import pytest
import pytorch_msssim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.kid import KernelInceptionDistance

from scores import metrics

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


def blobs(n, seed=0, side=176):
    """Ellipses of random shape and texture on black: (n,1,side,side), cheap stand-ins."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    out = np.empty((n, 1, side, side), np.float32)
    for image in out[:, 0]:
        a, b = rng.uniform(0.25, 0.42, 2)
        texture = cv2.resize(rng.random((16, 16)), (side, side), interpolation=cv2.INTER_CUBIC)
        inside = (rows / a) ** 2 + (columns / b) ** 2 < 1
        image[:] = np.clip(0.2 + 0.7 * texture, 0, 1) * inside
    return torch.from_numpy(out)


def noisy(x, sd, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (x + sd * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def blurred(x, sigma):
    images = [cv2.GaussianBlur(image, (0, 0), sigma) for image in x[:, 0].numpy()]
    return torch.from_numpy(np.stack(images))[:, None].clamp(0, 1)


def normal(n, f, seed=0):
    return np.random.default_rng(seed).standard_normal((n, f))


# --- image against image ------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.01, 0.1, 0.5])
def test_ssim_and_psnr_agree_with_independent_implementations(sd):
    x = blobs(4)
    y = noisy(x, sd)
    wanted = pytorch_msssim.ssim(x, y, data_range=1.0, size_average=False)
    torch.testing.assert_close(metrics.ssim(x, y), wanted, atol=1e-5, rtol=0)
    each = {"reduction": "none", "dim": (1, 2, 3)}
    wanted = peak_signal_noise_ratio(x, y, data_range=1.0, **each)
    torch.testing.assert_close(metrics.psnr(x, y), wanted, atol=1e-4, rtol=0)
    assert metrics.psnr(x[:1], x[:1]).item() == 100  # finite, so that means stay finite


def test_ms_ssim_agrees_with_pytorch_msssim_also_if_contrast_is_negative():
    x, noise = blobs(2), torch.rand(2, 1, 176, 176)
    for a, b in ((x, noisy(x, 0.1)), (noise, 1 - noise)):
        wanted = pytorch_msssim.ms_ssim(a, b, data_range=1.0, size_average=False)
        torch.testing.assert_close(metrics.ms_ssim(a, b), wanted, atol=1e-5, rtol=0)
    assert metrics.ssim(noise, 1 - noise).max() < -0.5


def test_gradient_of_ssim_core_is_that_of_pytorch_msssim():
    x, y = (t.requires_grad_() for t in (blobs(2, 1, 40), noisy(blobs(2, 1, 40), 0.1)))
    ours = metrics.ssim_core(x, y).sum()
    theirs = pytorch_msssim.ssim(x, y, data_range=1.0, size_average=False).sum()
    ours, theirs = (torch.autograd.grad(value, (x, y)) for value in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_ssim_core_and_high_pass_keep_float32_under_autocast():
    x, y = blobs(2), noisy(blobs(2), 0.02)
    wanted = metrics.ssim_core(x, y), metrics.high_pass(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = metrics.ssim_core(x, y), metrics.high_pass(x)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_inside_the_brain_the_background_does_not_flatter():
    x = torch.zeros(2, 1, 176, 176)
    x[:, :, 60:110, 60:110] = blobs(2, 3, 50) * 0.5 + 0.3
    y = torch.where(x > 0, 0.9 - x, x)  # an unrelated brain of the same outline
    assert (metrics.ssim(x, y) > 0.7).all() and (metrics.ssim_in_brain(x, y) < 0.3).all()
    inside = ((x - y)[:, :, 60:110, 60:110] ** 2).mean((1, 2, 3))
    torch.testing.assert_close(metrics.psnr_in_brain(x, y), -10 * inside.log10())


def test_brain_mask_fills_holes():
    x = torch.zeros(2, 1, 64, 64)
    x[0, 0, 10:30, 20:50] = 0.5
    x[0, 0, 15:20, 30:40] = 0  # a ventricle
    x[0, 0, 20, 0] = x[0, 0, 2, 35] = 0.5  # specks beside it and above
    mask = metrics.brain_mask(x)[0]
    assert mask[10:30, 20:50].all() and mask.sum() == 602
    y = noisy(x, 0.1)  # without a brain, the whole frame counts
    torch.testing.assert_close(metrics.ssim_in_brain(x, y)[1], metrics.ssim(x, y)[1])


WRONG = {
    "uint8": (lambda x: (x * 255).byte(), "divide by 255"),
    "float64": (lambda x: x.double(), "float32"),
    "[-1,1]": (lambda x: x * 2 - 1, "outside"),
    "0 to 255": (lambda x: x * 255, "outside"),
    "NaN": (lambda x: torch.where(x > 0.5, torch.nan, x), "NaN"),
    "infinity": (lambda x: torch.where(x > 0.5, torch.inf, x), "infinity"),
    "rank": (lambda x: x[0], "shape"),
    "three channels": (lambda x: x.expand(-1, 3, -1, -1), "shape"),
    "empty": (lambda x: x[:0], "shape"),
    "array": (lambda x: x.numpy(), "tensor"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrappers_refuse_what_would_score_wrongly(wrong):
    x = blobs(2)
    spoil, message = WRONG[wrong]
    for measure in (metrics.ssim, metrics.ms_ssim, metrics.psnr, metrics.ssim_in_brain):
        for pair in ((x, spoil(x)), (spoil(x), x)):
            with pytest.raises(ValueError, match=message):
                measure(*pair)
    features = metrics.RandomFeatures().features
    for measure in (metrics.radial_spectrum, metrics.ms_ssim_of_pairs, features):
        with pytest.raises(ValueError, match=message):
            measure(spoil(x))


def test_wrappers_refuse_unequal_and_too_small_images():
    x = blobs(2)
    for other in (x[:1], x[..., :100], x.mT[..., :170, :]):
        with pytest.raises(ValueError, match="differ in shape"):
            metrics.ssim(x, other)
    with pytest.raises(ValueError, match="at least 176"):
        metrics.ms_ssim(x[..., :175], x[..., :175])


# --- features -----------------------------------------------------------------------------


def test_random_features_are_the_same_whatever_the_global_seed():
    x = blobs(5, side=64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = metrics.RandomFeatures()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = metrics.RandomFeatures()
    assert torch.equal(first.features(x), second.features(x))
    assert first.features(x).shape == (5, 176)
    # Filters sum to 0: a flat image has no structure (all are unpadded).
    assert first.features(torch.full((1, 1, 64, 64), 0.5)).abs().max() < 1e-5


def test_high_pass_takes_away_the_local_mean():
    x = torch.rand(2, 1, 20, 30)
    wanted = x - torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
    torch.testing.assert_close(metrics.high_pass(x), wanted, atol=1e-6, rtol=0)


def test_fine_features_are_those_of_the_high_pass_at_full_size():
    x, network = blobs(2, side=64), metrics.RandomFeatures()
    grey = 0.5 + metrics.high_pass(x) / 2  # filters sum to 0, so features are half as large
    twice = torch.nn.functional.interpolate(grey, scale_factor=2)  # which `features` halves
    found = 2 * network.features(twice)
    torch.testing.assert_close(found, network.fine_features(x), atol=1e-5, rtol=1e-3)


# --- Frechet distance, KID, PRDC ----------------------------------------------------------


@few
@given(seeds, st.integers(3, 40), st.integers(1, 20))
def test_frechet_distance_is_that_of_scipy_symmetric_and_zero_for_itself(seed, n, f):
    a, b = normal(n, f, seed), normal(n + 3, f, seed + 1) * 2 + 1
    root = sqrtm(np.cov(a.T).reshape(f, f) @ np.cov(b.T).reshape(f, f)).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.cov(a.T).reshape(f, f).trace()
    wanted += np.cov(b.T).reshape(f, f).trace() - 2 * root.trace()
    assert metrics.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-4)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))
    assert metrics.frechet_distance(a, a) < 1e-9


def test_kid_agrees_with_torchmetrics():
    a, b = (torch.rand(60, 12, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    b = b**2
    kid = KernelInceptionDistance(torch.nn.Identity(), subsets=1, subset_size=60)
    kid.update(a, real=True)
    kid.update(b, real=False)
    assert metrics.kid(a, b) == pytest.approx(kid.compute()[0].item(), rel=1e-3)


def test_relative_floor_is_the_distance_of_disjoint_draws():
    train = normal(400, 6)
    floor = metrics.relative_floor(train, 100)
    assert floor == metrics.relative_floor(train, 100)
    pairs = [(normal(100, 6, s), normal(100, 6, s + 50)) for s in range(1, 21)]
    other = np.mean([metrics.frechet_distance(*pair) for pair in pairs])
    assert 0.75 < other / floor < 1.33  # draws that share half of their slices: about 2


def brute_prdc(real, fake, k):
    def balls(points):
        return [(x, sorted(math.dist(x, y) for y in points)[k]) for x in points]

    def inside(x, *some):
        return any(math.dist(x, centre) <= radius for centre, radius in some)

    around_real, around_fake = balls(real), balls(fake)
    return {
        "precision": np.mean([inside(y, *around_real) for y in fake]),
        "recall": np.mean([inside(x, *around_fake) for x in real]),
        "coverage": np.mean([any(inside(y, ball) for y in fake) for ball in around_real]),
    }


@few
@given(seeds, st.integers(1, 4), st.floats(0.3, 2), st.floats(0, 2))
def test_prdc_matches_brute_force(seed, k, scale, shift):
    real, fake = normal(20, 3, seed), normal(20, 3, seed + 1) * scale + shift
    assert metrics.prdc(real, fake, k) == pytest.approx(brute_prdc(real, fake, k))


def test_prdc_of_equal_sets_and_of_a_collapsed_generator():
    real = normal(200, 4)
    assert set(metrics.prdc(real, real).values()) == {1}
    collapsed = metrics.prdc(real, np.tile(real[:4], (50, 1)))
    assert collapsed["precision"] == 1 and collapsed["recall"] == 4 / 200
    with pytest.raises(ValueError, match="equal N"):
        metrics.prdc(real, real[:-1])


def test_feature_measures_refuse_nan():
    a, spoiled = normal(20, 3), normal(20, 3)
    spoiled[7, 1] = np.nan
    for measure in (metrics.frechet_distance, metrics.prdc, metrics.kid):
        with pytest.raises(ValueError, match="NaN"):
            measure(a, spoiled)


def test_strength_of_detail_sees_blur_but_not_place():
    x = noisy(blobs(2, side=64), 0.1)
    strength, moved = metrics.detail_strength(x), metrics.detail_strength(x.roll(16, 3))
    assert (metrics.detail_strength(blurred(x, 2)) < 0.5 * strength).all()
    torch.testing.assert_close(moved[..., 2:3], strength[..., 1:2], rtol=0, atol=1e-6)
    flat = torch.zeros(1, 1, 32, 32, requires_grad=True)
    metrics.detail_strength(flat).sum().backward()
    assert flat.grad.isfinite().all()


# --- C2ST, memorisation -------------------------------------------------------------------


def test_c2st_is_half_for_equal_sets_and_one_for_distant_ones():
    groups = np.arange(300) // 10
    real, fake = normal(300, 4), normal(300, 4, 1)
    pairs = [(normal(300, 4, s), normal(300, 4, s + 50)) for s in range(4)]
    assert abs(np.mean([metrics.c2st_auc(*pair, groups) for pair in pairs]) - 0.5) < 0.05
    assert 0.85 < metrics.c2st_auc(real, fake + 1, groups) < 0.97  # 2 sd apart: 0.92
    assert metrics.c2st_auc(real, fake + 5, groups) == 1


@pytest.mark.parametrize("seed", range(20))
def test_c2st_of_few_slices_of_few_subjects_is_a_number(seed):
    """A fold of one side has no AUC; the others do."""
    draw = np.random.default_rng(seed)
    real, fake = (draw.permutation(np.repeat(np.arange(6), 8))[:8] for _ in range(2))
    score = metrics.c2st_auc(normal(8, 4, seed), normal(8, 4, seed + 50), real, fake)
    assert 0 <= score <= 1


def test_c2st_without_a_fold_of_both_sides_is_nan():
    real, fake = [0] * 4 + [1] * 4, [1] * 4 + [2] * 4
    assert math.isnan(metrics.c2st_auc(normal(8, 4, 0), normal(8, 4, 1), real, fake))


def test_c2st_folds_by_subject_do_not_reward_knowing_the_subject():
    # Equal processes, one offset per subject. Split by slice, a classifier would know the
    # subjects: with more dimensions than subjects these are linearly separable.
    groups = np.arange(200) // 20
    real, fake = (np.repeat(normal(10, 60, s), 20, 0) for s in (0, 1))
    real, fake = real + 0.1 * normal(200, 60, 2), fake + 0.1 * normal(200, 60, 3)
    assert metrics.c2st_auc(real, fake, np.arange(200)) > 0.95
    assert metrics.c2st_auc(real, fake, groups, groups + 10) < 0.85
    with pytest.raises(ValueError, match="2 groups"):
        metrics.c2st_auc(real, fake, np.zeros(200))


def test_planted_copies_are_flagged_and_new_slices_are_not():
    train, held_out, new = normal(500, 6), normal(200, 6, 1), normal(200, 6, 2)
    copies = train[:200] + 1e-3 * normal(200, 6, 3)
    half = np.concatenate([copies[:100], new[:100]])
    limit = metrics.nearest_features(held_out, train)[0]
    of_copies, of_new, of_half = (
        metrics.memorised_share(metrics.nearest_features(x, train)[0], limit)
        for x in (copies, new, half)
    )
    assert of_copies == 1 and of_new < 0.05 and 0.5 <= of_half < 0.57


def test_the_nearest_features_are_searched_in_every_part_of_a_mapped_bank(tmp_path):
    draw = np.random.default_rng(0)
    bank = draw.normal(size=(9000, 3)).astype(np.float32)
    np.save(tmp_path / "bank.npy", bank)
    x = np.concatenate([bank[[0, 4500, 8999]], draw.normal(size=(5, 3)).astype(np.float32)])
    found, rows = metrics.nearest_features(x, np.load(tmp_path / "bank.npy", mmap_mode="r"))
    apart = np.linalg.norm(x[:, None].astype(float) - bank[None], axis=2)
    np.testing.assert_allclose(found, apart.min(1), atol=1e-12)
    assert (found[:3] == 0).all() and (rows == apart.argmin(1)).all()


# --- sets of images -----------------------------------------------------------------------


def test_a_constant_generator_fails_on_diversity():
    real = blobs(12)
    assert metrics.ms_ssim_of_pairs(real[:1].repeat(12, 1, 1, 1), 30) > 0.9999
    assert metrics.ms_ssim_of_pairs(real, 30) < 0.7
    # Two images have one pair: never an image with itself.
    wanted = metrics.ms_ssim(real[:1], real[1:2]).item()
    assert metrics.ms_ssim_of_pairs(real[:2], 40) == pytest.approx(wanted, abs=1e-5)


def test_nearest_finds_copies_and_agrees_with_brute_force():
    bank = blobs(20, 1, 128)
    x = torch.cat([bank[[7, 3]], blobs(3, 2, 128)])
    distances, indices = metrics.nearest(x, bank.split(6), 4)
    assert indices[:2, 0].tolist() == [7, 3] and (distances[:2, 0] == 0).all()
    small = [cv2.resize(i, (64, 64), interpolation=cv2.INTER_AREA) for i in bank[:, 0].numpy()]
    for row, image in enumerate(x[:, 0].numpy()):
        image = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
        wanted = np.sort([np.linalg.norm(image - s) for s in small])[:4]
        np.testing.assert_allclose(distances[row], wanted, atol=1e-4)
    assert torch.equal(metrics.nearest(x, [metrics.thumbnails(bank)], 4)[1], indices)
    assert metrics.nearest(x, [bank[:3]], 4)[1].shape == (5, 3)


def test_ssim_to_nearest_is_one_for_copies_only():
    bank = blobs(12, 1)

    def score(x, k):
        return metrics.ssim_to_nearest(x, [bank], bank.__getitem__, k)

    assert score(bank[:3], 8) == pytest.approx(1, abs=1e-5)
    x = blobs(3, 2)
    every = torch.stack([metrics.ssim(x, b[None].expand_as(x)) for b in bank])
    wanted = every.amax(0).mean().item()
    assert score(x, 12) == pytest.approx(wanted, abs=1e-5)
    assert score(x, 1) <= wanted


@pytest.mark.parametrize("cycles", [3, 20, 50])
def test_a_sinusoid_lands_in_its_ring_with_its_power(cycles):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(128) / 128)
    side = np.fft.fftfreq(128, 1 / 128)
    cells = (np.hypot(side[:, None], side).round() == cycles).sum()
    # Two of the ring's cells hold (0.2 * 128^2)^2 each.
    wanted = 10 * math.log10(2 * (0.2 * 128**2) ** 2 / cells)
    for image in (wave.expand(1, 1, 128, 128), wave[:, None].expand(1, 1, 128, 128)):
        spectrum = metrics.radial_spectrum(0.5 + 0.4 * image)
        assert spectrum.shape == (65,) and spectrum[1:].argmax() + 1 == cycles
        assert spectrum[cycles].item() == pytest.approx(wanted, abs=0.01)


def test_spectrum_difference_sees_blur_and_grain_and_is_zero_for_equal_spectra():
    real = noisy(blobs(24, 0, 128), 0.01)
    real_db = metrics.radial_spectrum(real)
    end = metrics.noise_floor(real_db)
    same, soft, softer, grain = (
        metrics.spectrum_difference(real_db, metrics.radial_spectrum(x), end)
        for x in (real, blurred(real, 1), blurred(real, 2), noisy(real, 0.1))
    )
    assert same == 0 and 1 < soft < softer and grain > 1
    with pytest.raises(ValueError, match="rings"):
        metrics.spectrum_difference(real_db, real_db, 8)


@pytest.mark.parametrize("crossing", [24, 40])
def test_noise_floor_begins_where_known_noise_equals_the_signal(crossing):
    frequency = torch.arange(129.0).clamp(min=1)
    power = frequency**-3 + float(crossing) ** -3
    assert metrics.noise_floor(10 * power.log10()) == pytest.approx(crossing, abs=2)
    assert metrics.noise_floor(torch.zeros(129)) == 16  # of noise alone: a band remains
