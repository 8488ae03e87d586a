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
from torchmetrics.functional import image as reference
from torchmetrics.image.fid import FrechetInceptionDistance
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
    return torch.from_numpy(
        np.stack([cv2.GaussianBlur(i, (0, 0), sigma) for i in x[:, 0].numpy()])
    )[:, None].clamp(0, 1)


def normal(n, f, seed=0):
    return np.random.default_rng(seed).standard_normal((n, f))


# --- image against image ------------------------------------------------------------------


def by_definition(x, y):
    """Mean SSIM and mean contrast-structure of two (H,W) arrays, window by window, float64."""
    g = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(g, g) / g.sum() ** 2

    def mean(a):
        views = np.lib.stride_tricks.sliding_window_view(a, (11, 11))
        return np.einsum("ijkl,kl->ij", views, window)

    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = mean(x), mean(y)
    covariance = mean(x * y) - mx * my
    contrast = (2 * covariance + 0.0009) / (mean(x * x) - mx**2 + mean(y * y) - my**2 + 0.0009)
    luminance = (2 * mx * my + 0.0001) / (mx**2 + my**2 + 0.0001)
    return (luminance * contrast).mean(), contrast.mean()


@pytest.mark.parametrize("sd", [0.01, 0.1, 0.5])
def test_ssim_and_psnr_agree_with_independent_implementations(sd):
    x = blobs(4)
    y = noisy(x, sd)
    got = metrics.ssim(x, y)
    wanted = pytorch_msssim.ssim(x, y, data_range=1.0, size_average=False)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    wanted = [by_definition(a[0], b[0])[0] for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    # torchmetrics also counts windows that reach over the border, into a reflection: cut off.
    _, full = reference.structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none", return_full_image=True
    )
    torch.testing.assert_close(got, full[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-4, rtol=0)
    wanted = reference.peak_signal_noise_ratio(
        x, y, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(metrics.psnr(x, y), wanted, atol=1e-4, rtol=0)


def test_ms_ssim_agrees_with_pytorch_msssim_and_with_its_definition():
    x = blobs(2)
    y = noisy(x, 0.1)
    got = metrics.ms_ssim(x, y)
    wanted = pytorch_msssim.ms_ssim(x, y, data_range=1.0, size_average=False)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    for a, b, value in zip(x[:, 0].numpy(), y[:, 0].numpy(), got, strict=True):
        product = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            whole, contrast = by_definition(a, b)
            product *= (whole if scale == 4 else contrast) ** weight
            a, b = (i.reshape(len(i) // 2, 2, -1, 2).mean((1, 3)) if scale < 4 else i
                    for i in (a, b))  # fmt: skip
        assert value.item() == pytest.approx(product, abs=1e-4)


def test_ssim_of_unrelated_noise_with_negative_contrast_agrees_too():
    x = torch.rand(2, 1, 176, 176, generator=torch.Generator().manual_seed(0))
    wanted = pytorch_msssim.ms_ssim(x, 1 - x, data_range=1.0, size_average=False)
    torch.testing.assert_close(metrics.ms_ssim(x, 1 - x), wanted)
    assert metrics.ssim(x, 1 - x).max() < -0.5


def test_gradient_of_ssim_core_is_that_of_pytorch_msssim():
    x, y = (t.requires_grad_() for t in (blobs(2, 1, 40), noisy(blobs(2, 1, 40), 0.1)))
    ours = torch.autograd.grad(metrics.ssim_core(x, y).sum(), (x, y))
    theirs = torch.autograd.grad(
        pytorch_msssim.ssim(x, y, 1.0, size_average=False).sum(), (x, y)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_ssim_core_keeps_float32_under_autocast():
    x, y = blobs(2), noisy(blobs(2), 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metrics.ssim_core(x, y), metrics.ssim_core(x.float(), y))


def test_psnr_by_hand():
    x = torch.zeros(1, 1, 16, 16)
    assert metrics.psnr(x, x + 0.1).item() == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(x, x).item() == 100  # finite, so that means stay finite


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
PAIRWISE = (metrics.ssim, metrics.ms_ssim, metrics.psnr, metrics.ssim_in_brain)
ALONE = (metrics.radial_spectrum, metrics.ms_ssim_of_pairs)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrappers_refuse_what_would_score_wrongly(wrong):
    x = blobs(2)
    spoil, message = WRONG[wrong]
    for measure in PAIRWISE:
        for pair in ((x, spoil(x)), (spoil(x), x)):
            with pytest.raises(ValueError, match=message):
                measure(*pair)
    for measure in (*ALONE, metrics.RandomFeatures().features):
        with pytest.raises(ValueError, match=message):
            measure(spoil(x))


def test_wrappers_refuse_unequal_and_too_small_images():
    x = blobs(2)
    for other in (x[:1], x[..., :100], x.mT[..., :170, :]):
        with pytest.raises(ValueError, match="differ in shape"):
            metrics.ssim(x, other)
    with pytest.raises(ValueError, match="at least 161"):
        metrics.ms_ssim(x[..., :160], x[..., :160])
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.ssim(x[:1], x[:2])


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
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(metrics.high_pass(x), wanted, atol=1e-6, rtol=0)


def test_fine_features_see_grain_and_blur_that_coarse_ones_hardly_see():
    real, network, ratios = blobs(96, 0, 96), metrics.RandomFeatures(), {}
    sets = (real, blobs(96, 1, 96), noisy(real, 0.05), blurred(real, 1.5))
    for name in ("features", "fine_features"):
        a, other, *damaged = (getattr(network, name)(x) for x in sets)
        floor = metrics.frechet_distance(a, other)
        ratios[name] = np.array([metrics.frechet_distance(a, b) for b in damaged]) / floor
    assert (ratios["fine_features"] > 4).all()
    assert (ratios["fine_features"] > 5 * ratios["features"]).all()


# --- Frechet distance, KID, PRDC ----------------------------------------------------------


def test_frechet_distance_matches_the_closed_form_for_gaussians():
    # N(0, diag s^2) and N(m, diag t^2): |m|^2 + sum (s - t)^2. The samples are whitened first,
    # so that their means and covariances are exact and only rounding is left.
    def exact(n, seed):
        z = normal(n, 6, seed)
        z = z - z.mean(0)
        return z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T

    s, t, m = np.array([1, 2, 3, 0.1, 1, 5]), np.array([2, 2, 1, 0.4, 1, 3]), np.arange(6) / 3
    got = metrics.frechet_distance(exact(50, 0) * s, exact(80, 1) * t + m)
    assert got == pytest.approx(np.square(m).sum() + np.square(s - t).sum(), rel=1e-9)


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


class Flat(torch.nn.Module):
    """Images to features as they are, so that torchmetrics sees the same features."""

    num_features = 12

    def forward(self, x):
        return x.flatten(1).float()


def test_frechet_distance_and_kid_agree_with_torchmetrics():
    a, b = (torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    b = b**2
    fid = FrechetInceptionDistance(Flat(), normalize=False, input_img_size=(3, 2, 2))
    kid = KernelInceptionDistance(Flat(), subsets=1, subset_size=60)
    for measure in (fid, kid):
        measure.update(a, real=True)
        measure.update(b, real=False)
    ours = metrics.frechet_distance(a.flatten(1), b.flatten(1))
    assert ours == pytest.approx(fid.compute().item(), rel=1e-3)
    ours = metrics.kid(a.flatten(1), b.flatten(1))
    assert ours == pytest.approx(kid.compute()[0].item(), rel=1e-3)


def test_relative_floor_is_the_distance_of_disjoint_draws():
    train = normal(400, 6)
    floor = metrics.relative_floor(train, 100)
    assert floor == metrics.relative_floor(train, 100)
    pairs = [(normal(100, 6, s), normal(100, 6, s + 50)) for s in range(1, 21)]
    other = np.mean([metrics.frechet_distance(*pair) for pair in pairs])
    assert 0.75 < other / floor < 1.33  # draws that share half of their slices: about 2


def brute_prdc(real, fake, k):
    def distance(a, b):
        return math.dist(a, b)

    def radius(points, i):
        return sorted(distance(points[i], p) for p in points)[k]

    r = [radius(real, i) for i in range(len(real))]
    q = [radius(fake, i) for i in range(len(fake))]
    hits = [[distance(x, y) <= r[i] for i, x in enumerate(real)] for y in fake]
    back = [any(distance(x, y) <= q[j] for j, y in enumerate(fake)) for x in real]
    near = [min(distance(x, y) for y in fake) <= r[i] for i, x in enumerate(real)]
    return {
        "precision": np.mean([any(h) for h in hits]),
        "recall": np.mean(back),
        "coverage": np.mean(near),
    }


@few
@given(seeds, st.integers(1, 4), st.floats(0.3, 2), st.floats(0, 2))
def test_prdc_matches_brute_force(seed, k, scale, shift):
    real, fake = normal(20, 3, seed), normal(20, 3, seed + 1) * scale + shift
    assert metrics.prdc(real, fake, k) == pytest.approx(brute_prdc(real, fake, k))


def test_prdc_moves_the_way_its_definitions_say():
    real, again = normal(200, 4), normal(200, 4, 1)
    same = metrics.prdc(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = metrics.prdc(real, again + 100)
    assert set(far.values()) == {0}
    shrunken = metrics.prdc(real, again * 0.2)  # a collapsed generator
    assert shrunken["precision"] > 0.98 and shrunken["recall"] < 0.2
    spread = metrics.prdc(real, again * 4)  # the reverse
    assert spread["precision"] < 0.35 and spread["recall"] > 0.9
    duplicated = metrics.prdc(real, np.tile(real[:4], (50, 1)))
    assert duplicated["precision"] == 1 and duplicated["recall"] == 4 / 200
    with pytest.raises(ValueError, match="equal N"):
        metrics.prdc(real, again[:-1])


@few
@given(seeds, st.integers(2, 8))
def test_feature_measures_of_a_set_itself_swapped_and_under_growing_noise(seed, f):
    a, b = normal(150, f, seed), normal(150, f, seed + 1)
    noise, groups = normal(150, f, seed + 2), np.arange(150) // 5
    assert metrics.kid(a, b) == pytest.approx(metrics.kid(b, a), abs=1e-9)
    assert metrics.kid(a, a) < 0 < metrics.kid(a, a + 1)  # unbiased: below 0 for a copy
    there, back = metrics.prdc(a, b), metrics.prdc(b, a)
    assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])
    assert (metrics.nearest_features(a, a)[0] == 0).all()
    # One set moved ever further by the same noise.
    worse = [b + step * noise for step in (0, 2, 8)]
    first, second, third = (metrics.frechet_distance(a, x) for x in worse)
    assert first < second < third
    first, second, third = (metrics.kid(a, b + step) for step in (0, 1, 3))
    assert first < second < third
    first, second, third = (metrics.prdc(a, x)["precision"] for x in worse)
    assert first >= second >= third and first > third
    first, second, third = (metrics.nearest_features(x, a)[0].mean() for x in worse)
    assert first < second < third
    shifted = [metrics.c2st_auc(a, b + step, groups) for step in (0, 1, 4)]
    assert shifted[0] < shifted[1] < shifted[2] <= 1
    near, _ = metrics.nearest_features(b, a)
    copies = [
        metrics.memorised_share(metrics.nearest_features(a + step * noise, a)[0], near)
        for step in (0, 1e-3, 0.3, 3)
    ]
    close, far = copies[:3], copies[3]  # both of the last two can be near 0, in any order
    assert close == sorted(close, reverse=True) and copies[0] == 1 and far < 0.2


@pytest.mark.parametrize("change", ["shift", "shrink", "noise", "duplicate"])
def test_frechet_distance_rises_with_every_damage(change):
    real, again = normal(300, 5), normal(300, 5, 1)
    damaged = {
        "shift": again + 1,
        "shrink": again * 0.5,
        "noise": again + normal(300, 5, 2),
        "duplicate": np.tile(again[:3], (100, 1)),
    }[change]
    floor = metrics.frechet_distance(real, again)
    assert metrics.frechet_distance(real, damaged) > 4 * floor


def test_feature_measures_refuse_nan():
    a = normal(20, 3)
    spoiled = np.where(a > 1, np.nan, a)
    assert np.isnan(spoiled).any()
    for measure in (metrics.frechet_distance, metrics.prdc, metrics.kid):
        with pytest.raises(ValueError, match="NaN"):
            measure(a, spoiled)


def test_strength_of_detail_sees_blur_but_not_place():
    x = noisy(blobs(2, side=64), 0.1)
    blurred = torch.from_numpy(cv2.GaussianBlur(x[0, 0].numpy(), (0, 0), 2))[None, None]
    assert (metrics.detail_strength(blurred) < 0.5 * metrics.detail_strength(x[:1])).all()
    shifted = x.roll(16, 3)
    strength, moved = metrics.detail_strength(x), metrics.detail_strength(shifted)
    torch.testing.assert_close(moved[..., 2:3], strength[..., 1:2], rtol=0, atol=1e-6)
    flat = torch.zeros(1, 1, 32, 32, requires_grad=True)
    metrics.detail_strength(flat).sum().backward()
    assert flat.grad.isfinite().all()


# --- C2ST, memorisation -------------------------------------------------------------------


def test_c2st_is_half_for_equal_sets_and_one_for_distant_ones():
    groups = np.arange(300) // 10
    aucs = [
        metrics.c2st_auc(normal(300, 4, s), normal(300, 4, s + 50), groups) for s in range(4)
    ]
    assert abs(np.mean(aucs) - 0.5) < 0.05
    assert metrics.c2st_auc(normal(300, 4), normal(300, 4, 1) + 5, groups) == 1


@pytest.mark.parametrize("seed", range(20))
def test_c2st_of_few_slices_of_few_subjects_is_a_number(seed):
    """A fold of one side has no AUC; the others do."""
    draw = np.random.default_rng(seed)
    real, fake = (draw.permutation(np.repeat(np.arange(6), 8))[:8] for _ in range(2))
    score = metrics.c2st_auc(normal(8, 4, seed), normal(8, 4, seed + 50), real, fake)
    assert 0 <= score <= 1


def test_c2st_without_a_fold_of_both_sides_is_nan():
    real, fake = [0] * 4 + [1] * 4, [1] * 4 + [2] * 4
    score = metrics.c2st_auc(normal(8, 4, 0), normal(8, 4, 1), real, fake)
    assert math.isnan(score)


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
    near = {
        name: metrics.nearest_features(x, train)[0]
        for name, x in (("copies", copies), ("held out", held_out), ("new", new))
    }
    assert near["new"][0] == pytest.approx(np.linalg.norm(train - new[0], axis=1).min())
    assert metrics.memorised_share(near["copies"], near["held out"]) == 1
    assert metrics.memorised_share(near["new"], near["held out"]) < 0.05
    half = np.concatenate([near["copies"][:100], near["new"][:100]])
    assert 0.5 <= metrics.memorised_share(half, near["held out"]) < 0.57


# --- sets of images -----------------------------------------------------------------------


def test_the_nearest_features_are_searched_in_every_part_of_a_mapped_bank(tmp_path):
    draw = np.random.default_rng(0)
    bank = draw.normal(size=(9000, 3)).astype(np.float32)
    np.save(tmp_path / "bank.npy", bank)
    x = np.concatenate([bank[[0, 4500, 8999]], draw.normal(size=(5, 3)).astype(np.float32)])
    found, rows = metrics.nearest_features(x, np.load(tmp_path / "bank.npy", mmap_mode="r"))
    apart = np.linalg.norm(x[:, None].astype(float) - bank[None], axis=2)
    np.testing.assert_allclose(found, apart.min(1), atol=1e-12)
    assert (found[:3] == 0).all() and (rows == apart.argmin(1)).all()


def test_a_constant_generator_fails_on_diversity():
    real = blobs(12)
    assert metrics.ms_ssim_of_pairs(real[:1].repeat(12, 1, 1, 1), 30) > 0.9999
    assert metrics.ms_ssim_of_pairs(noisy(real[:1].repeat(12, 1, 1, 1), 0.01), 30) > 0.95
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
    all_pairs = torch.stack([metrics.ssim(x, b[None].expand_as(x)) for b in bank])
    wanted = all_pairs.amax(0).mean().item()
    assert score(x, 12) == pytest.approx(wanted, abs=1e-5)
    assert score(x, 1) <= wanted


@pytest.mark.parametrize("cycles", [3, 20, 50])
def test_a_sinusoid_lands_in_its_ring_with_its_power(cycles):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(128) / 128)
    for image in (wave.expand(1, 1, 128, 128), wave[:, None].expand(1, 1, 128, 128)):
        spectrum = metrics.radial_spectrum(0.5 + 0.4 * image)
        assert spectrum.shape == (65,)
        assert spectrum[1:].argmax() + 1 == cycles
        # Two of the ring's cells hold (0.2 * 128^2)^2 each.
        rows, columns = np.meshgrid(np.fft.fftfreq(128, 1 / 128), np.fft.fftfreq(128, 1 / 128))
        cells = (np.hypot(rows, columns).round() == cycles).sum()
        wanted = 10 * math.log10(2 * (0.2 * 128**2) ** 2 / cells)
        assert spectrum[cycles].item() == pytest.approx(wanted, abs=0.01)


def test_spectrum_difference_sees_blur_and_is_zero_for_equal_spectra():
    real = noisy(blobs(24, 0, 128), 0.01)
    real_db = metrics.radial_spectrum(real)
    end = metrics.noise_floor(real_db)
    differences = [
        metrics.spectrum_difference(real_db, metrics.radial_spectrum(x), end)
        for x in (real, blurred(real, 1), blurred(real, 2))
    ]
    assert differences[0] == 0 and 1 < differences[1] < differences[2]
    grain = metrics.radial_spectrum(noisy(real, 0.1))
    both_ways = [
        metrics.spectrum_difference(*p, end) for p in ((real_db, grain), (grain, real_db))
    ]
    assert both_ways[0] == both_ways[1] > 1
    below = metrics.radial_spectrum(blurred(real, 1)) < real_db
    assert below[8:end].all()
    with pytest.raises(ValueError, match="rings"):
        metrics.spectrum_difference(real_db, real_db, 8)


@pytest.mark.parametrize("crossing", [24, 40])
def test_noise_floor_begins_where_known_noise_equals_the_signal(crossing):
    frequency = torch.arange(129.0).clamp(min=1)
    power = frequency**-3 + float(crossing) ** -3
    assert metrics.noise_floor(10 * power.log10()) == pytest.approx(crossing, abs=2)


def test_noise_floor_of_noise_alone_leaves_a_band():
    assert metrics.noise_floor(torch.zeros(129)) == 16
