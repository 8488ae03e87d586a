"""Scores: reconstructions against originals, generated sets against real ones.

In: images (N,1,H,W) float32 in [0,1]; features (N,F). Out: numbers, or one number per image.
No files, no global randomness, no device of its own. Bad input (uint8, [-1,1], NaN, unequal
sizes) raises ValueError.

Dimensions: N images or feature vectors, M those of a second set, B a micro-batch, H W pixels,
h w a smaller map, F features, K codes, R rings of a spectrum.
"""

import math
from functools import cache, partial

import numpy as np
import pytorch_msssim
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

FOREGROUND = 0.05  # pixels of an original above this are brain (its background is black)
MICRO_BATCH = 16  # images at a time that fit into a CPU's cache; on a GPU 4 times as many

# --- checks -------------------------------------------------------------------------------


def check_images(x: Tensor, name: str = "images"):
    """Raise ValueError unless x is (N,1,H,W) float32 in [0,1]."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a torch tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        hint = ": divide by 255 first" if x.dtype == torch.uint8 else ""
        raise ValueError(f"{name}: expected float32 in [0,1], got {x.dtype}{hint}")
    if x.ndim != 4 or x.shape[1] != 1 or 0 in x.shape:
        raise ValueError(f"{name}: expected shape (N,1,H,W), got {tuple(x.shape)}")
    low, high = (float(v) for v in x.detach().aminmax())
    if not math.isfinite(low + high):
        raise ValueError(f"{name}: contain NaN or infinity")
    if low < -1e-5 or high > 1 + 1e-5:
        raise ValueError(
            f"{name}: values {low:.4g} to {high:.4g} are outside [0,1]; rescale or clamp first"
        )


def as_features(a, name: str = "features") -> np.ndarray:
    """(N,F) float64, from a tensor or array. Raises ValueError unless finite and 2 <= N."""
    a = np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a, dtype=np.float64)
    if a.ndim != 2 or len(a) < 2:
        raise ValueError(f"{name}: expected shape (N,F) with N >= 2, got {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError(f"{name}: contain NaN or infinity")
    return a

# --- image against image ------------------------------------------------------------------


GAUSSIAN = tuple(math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11))  # SSIM's window
BOX = (1.0,) * 5
LIBRARY = {"data_range": 1, "size_average": False}  # options of pytorch-msssim


@cache  # a captured CUDA graph reads this address
@torch.inference_mode(False)  # an inference tensor could not be used in training later
def _band(taps: tuple[float, ...], size: int, margin: int, like: tuple) -> Tensor:
    """The band matrix (rows, size) of a convolution by `taps`, normalised; see `_blur`."""
    rows = size + 2 * margin - len(taps) + 1
    diagonals = (tap * np.eye(rows, size, k - margin) for k, tap in enumerate(taps))
    dtype, device = like
    return torch.tensor(sum(diagonals) / sum(taps), dtype=dtype, device=device)


def _blur(x: Tensor, taps: tuple[float, ...], margin: int = 0) -> Tensor:
    """Convolve (..., H, W) with normalised `taps` along both sides, padded by `margin` zeros.

    A product with band matrices. In the loss of 8 windows on two cores it takes 5 ms, sums of
    shifted copies 16 ms, F.conv2d 49 ms; a VQ-VAE step takes about 45 ms. At least float32,
    also under autocast: SSIM subtracts squares that nearly cancel.
    """
    like = torch.promote_types(x.dtype, torch.float32), x.device
    columns, rows = (_band(taps, x.shape[d], margin, like) for d in (-1, -2))
    with torch.autocast(x.device.type, enabled=False):
        return rows @ (x.to(like[0]) @ columns.T)


def _ssim_maps(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure of every whole window; their product is SSIM."""
    x, y = x[:, 0].float(), y[:, 0].float()                                 # (B,H,W)
    maps = _blur(torch.stack([x, y, x * x + y * y, x * y]), GAUSSIAN)       # (4,B,h,w)
    mean_x, mean_y, squares, product = maps.unbind()                        # (B,h,w)
    means, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * means + c1) / (mean_squares + c1)
    contrast = (2 * (product - means) + c2) / (squares - mean_squares + c2)
    return luminance, contrast


# Wang et al. 2004 (doi:10.1109/TIP.2003.819861), eq. 13: window 11, sigma 1.5, data range 1
def ssim_core(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (B,) of (B,1,H,W), H W >= 11: unchecked and differentiable, for losses."""
    luminance, contrast = _ssim_maps(x, y)                                  # (B,h,w)
    return (luminance * contrast).flatten(1).mean(1)                        # (B,)


# Wang et al. 2003 (doi:10.1109/ACSSC.2003.1292216), eq. 7; negative factors count as 0
def _ms_ssim_core(x: Tensor, y: Tensor) -> Tensor:
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    result = torch.ones(len(x), device=x.device)                            # (B,)
    for level, weight in enumerate(weights):
        luminance, contrast = _ssim_maps(x, y)
        last = level == len(weights) - 1
        factor = (luminance * contrast if last else contrast).flatten(1).mean(1)  # (B,)
        result = result * factor.clamp(min=0) ** weight
        if not last:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)                   # (B,1,H/2,W/2)
    return result


def _brain_ssim_core(x: Tensor, y: Tensor) -> Tensor:
    luminance, contrast = _ssim_maps(x, y)                                  # (B,h,w)
    return _masked_mean(luminance * contrast, brain_mask(x)[:, 5:-5, 5:-5])


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B,h,w) inside the mask; over everything where the mask is empty."""
    mask = (mask | ~mask.flatten(1).any(1)[:, None, None]).float()
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)       # (B,)


def _per_image(core, x: Tensor, y: Tensor, smallest: int) -> Tensor:
    """`core` on micro-batches, after checks. Shapes must be equal: nothing is broadcast."""
    check_images(x, "first images")
    check_images(y, "second images")
    if x.shape != y.shape:
        raise ValueError(f"images differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"images are {tuple(x.shape[2:])}: at least {smallest} pixels needed")
    return in_micro_batches(core, x, y)


def in_micro_batches(core, *images: Tensor) -> Tensor:
    """core(*images), one row per image (N, ...), a few of the images (N,1,H,W) at a time."""
    n = MICRO_BATCH * (1 if images[0].device.type == "cpu" else 4)
    parts = zip(*(x.split(n) for x in images), strict=True)
    return torch.cat([core(*part) for part in parts])


def reported_ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (N,) over the full frame by pytorch-msssim, for published numbers.

    Without these checks that library returns wrong scores for uint8 or data_range=255.
    """
    return _per_image(partial(pytorch_msssim.ssim, **LIBRARY), x, y, 11)


def reported_ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM (N,), five scales, over the full frame by pytorch-msssim."""
    return _per_image(partial(pytorch_msssim.ms_ssim, **LIBRARY), x, y, 161)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (N,) over the full frame: 9 times as fast as `reported_ssim`, equal to 1e-4."""
    return _per_image(ssim_core, x, y, 11)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale SSIM (N,), five scales, over the full frame."""
    return _per_image(_ms_ssim_core, x, y, 176)  # 11 pixels at the last scale


def ssim_in_brain(x: Tensor, y: Tensor) -> Tensor:
    """Mean (N,) of the SSIM map over windows centred inside the brain of x, the original."""
    return _per_image(_brain_ssim_core, x, y, 11)


def _decibel(squared_error: Tensor) -> Tensor:
    """Peak signal 1 over the error, at most 100 dB: finite for identical images."""
    return -10 * torch.log10(squared_error.clamp(min=1e-10))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, full frame."""
    return _per_image(lambda a, b: _decibel((a - b).square().flatten(1).mean(1)), x, y, 1)


def psnr_in_brain(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB per image over the brain of x, the original."""
    return _per_image(
        lambda a, b: _decibel(_masked_mean((a - b).square()[:, 0], brain_mask(a))), x, y, 1
    )


def brain_mask(x: Tensor) -> Tensor:
    """Pixels with foreground on all four sides: the brain with its holes filled, (N,H,W)."""
    bright = x[:, 0] > FOREGROUND                                           # (N,H,W)
    inside = torch.ones_like(bright)
    for d in (1, 2):
        so_far = bright.cumsum(d, dtype=torch.int32)
        later = so_far < so_far.narrow(d, -1, 1)
        inside &= (so_far > 0) & (later | bright)
    return inside

# --- features -----------------------------------------------------------------------------


class RandomFeatures:
    """A convolutional network with fixed random weights: features without a download.

    Random embeddings for domains far from ImageNet: Naeem et al. 2020, arXiv:2002.09797. Every
    filter sums to 0; otherwise the brain's area dominates (blur and superposed brains then
    raise relative FD to 1 and 3 instead of 7 and 12). The weights are the same on every
    machine. Features: means of the rectified maps of all four layers.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights, before = [], 1
        for after in (16, 32, 64, 64):
            weight = torch.randn(after, before, 3, 3, generator=generator)
            weight -= weight.mean((1, 2, 3), keepdim=True)
            self.weights.append(weight * (2 / (9 * before)) ** 0.5)
            before = after

    @torch.no_grad()
    def _pooled(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        means = []
        for weight in self.weights:
            x = F.relu(F.conv2d(x, weight.to(x), stride=2))                 # (B,C,H/2,W/2)
            means.append(x.mean((2, 3)))                                    # (B,C)
        return torch.cat(means, 1)                                          # (B,F)

    def features(self, x: Tensor) -> Tensor:
        """(N,F) features of the image at half resolution: shape and contrast."""
        check_images(x)
        return in_micro_batches(lambda part: self._pooled(F.avg_pool2d(part, 2)), x)

    def fine_features(self, x: Tensor) -> Tensor:
        """(N,F) features of the image minus its 5x5 mean, not reduced: grain and edges."""
        check_images(x)
        return in_micro_batches(lambda part: self._pooled(high_pass(part)), x)


def high_pass(x: Tensor) -> Tensor:
    """x (B,1,H,W) minus its 5x5 mean (zeros outside)."""
    return x - _blur(x, BOX, 2)


def detail_strength(x: Tensor) -> Tensor:
    """Root mean square of `high_pass` in 16x16 patches: (B,1,H/16,W/16), differentiable."""
    return F.avg_pool2d(high_pass(x).square(), 16).add(1e-5).sqrt()

# --- set against set: features ------------------------------------------------------------


# Dowson & Landau 1982; as a score Heusel et al. 2017, arXiv:1706.08500
def frechet_distance(a, b) -> float:
    """Squared Frechet (2-Wasserstein) distance of Gaussians fitted to (N,F) and (M,F)."""
    a, b = as_features(a, "first features"), as_features(b, "second features")
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    # With S = R'R, tr (Sa^1/2 Sb Sa^1/2)^1/2 is the sum of the singular values of Ra Rb':
    # symmetric, and without the square root of a rounding error.
    ra, rb = (np.linalg.qr((z - z.mean(0)) / math.sqrt(len(z) - 1), mode="r") for z in (a, b))
    cross = np.linalg.svd(ra @ rb.T, compute_uv=False).sum()
    return max(0.0, float(shift + np.square(ra).sum() + np.square(rb).sum() - 2 * cross))


def relative_floor(train, n: int) -> float:
    """The unit of relative FD: mean of 10 distances of disjoint draws of n training slices."""
    train, rng = as_features(train), np.random.default_rng(0)
    orders = [rng.permutation(len(train)) for _ in range(10)]
    pairs = [(train[order[:n]], train[order[n : 2 * n]]) for order in orders]
    return float(np.mean([frechet_distance(*pair) for pair in pairs]))


# Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1-2; Naeem et al. 2020, arXiv:2002.09797
def prdc(real, fake, k: int = 5) -> dict[str, float]:
    """Precision (fakes look real), recall (reals are reachable), coverage.

    Balls are closed, so identical sets have precision = recall = coverage = 1.
    """
    real, fake = as_features(real, "real features"), as_features(fake, "fake features")
    if len(real) != len(fake) or not 0 < k < len(real):
        raise ValueError(f"prdc: equal N > k = {k} needed, got {len(real)} and {len(fake)}")
    radius_real = np.sort(cdist(real, real), 1)[:, k]                  # (N,)
    radius_fake = np.sort(cdist(fake, fake), 1)[:, k]                  # (N,)
    apart = cdist(real, fake)                                          # (N,N)
    return {
        "precision": float((apart <= radius_real[:, None]).any(0).mean()),
        "recall": float((apart <= radius_fake[None]).any(1).mean()),
        "coverage": float((apart.min(1) <= radius_real).mean()),
    }


# Binkowski et al. 2018, arXiv:1801.01401, section 4: cubic kernel, unbiased estimate
def kid(a, b) -> float:
    """Kernel distance. Its expectation is 0 for equal distributions; it may be negative."""
    a, b = as_features(a, "first features"), as_features(b, "second features")

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


# Lopez-Paz & Oquab 2017, arXiv:1610.06545, with AUC in place of accuracy
def c2st_auc(real, fake, groups_real, groups_fake=None) -> float:
    """Held-out AUC of a logistic regression, real against fake: 0.5 is ideal.

    No subject is in both parts of a fold. Give `groups_fake` if fakes have subjects too
    (reconstructions, other real slices); otherwise every fake is its own subject. A fold with
    one side only is left out; NaN if all are.
    """
    real, fake = as_features(real, "real features"), as_features(fake, "fake features")
    mine = [str(group) for group in groups_real]
    if groups_fake is None:
        groups_fake = (f"fake {i}" for i in range(len(fake)))
    others = [str(group) for group in groups_fake]
    groups, folds = np.array(mine + others), min(5, len(set(mine)), len(set(others)))
    if len(groups) != len(real) + len(fake) or folds < 2:
        raise ValueError("c2st: one group per slice and at least 2 groups on each side needed")
    x, y = np.concatenate([real, fake]), np.repeat([0, 1], [len(real), len(fake)])
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    scores = []
    for train, test in split.split(x, y, groups):
        if len(set(y[train])) < 2 or len(set(y[test])) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        held_out = model.fit(x[train], y[train]).decision_function(x[test])
        scores.append(roc_auc_score(y[test], held_out))
    return float(np.mean(scores)) if scores else math.nan


def nearest_features(x, bank) -> tuple[np.ndarray, np.ndarray]:
    """Distance (N,) of each vector of (N,F) to the nearest of (M,F), and its index (N,)."""
    x, parts = as_features(x), np.array_split(bank, math.ceil(len(bank) / 1024))
    distances = (cdist(x, as_features(part, "bank")) for part in parts)
    found = [(d.min(1), d.argmin(1)) for d in distances]
    least, index = (np.stack(column, 1) for column in zip(*found, strict=True))  # (N,parts)
    starts = np.cumsum([0, *map(len, parts[:-1])])
    best, rows = least.argmin(1), np.arange(len(x))
    return least[rows, best], (starts + index)[rows, best]


def memorised_share(near, near_held_out) -> float:
    """Share of samples nearer to a training slice than 99 % of unseen people's slices are.

    near (N,), near_held_out (M,): distances to the nearest training slice. Near 1 for copies;
    for new brains about 0.01, or 1/(M+1) if M < 99, as the limit is then the smallest distance.
    """
    limit = np.percentile(near_held_out, 1, method="weibull")
    return float((np.asarray(near) < limit).mean())


# --- set against set: images --------------------------------------------------------------


def ms_ssim_of_pairs(x: Tensor, pairs: int = 1000) -> float:
    """Mean MS-SSIM of random pairs of different images: 1 is a collapsed generator."""
    check_images(x)
    if len(x) < 2:
        raise ValueError("ms_ssim_of_pairs: at least 2 images needed")
    pairs = min(pairs, len(x) * (len(x) - 1) // 2)
    rng = np.random.default_rng(0)
    first = rng.integers(len(x), size=pairs)
    second = (first + rng.integers(1, len(x), size=pairs)) % len(x)
    parts = np.array_split(np.arange(pairs), math.ceil(pairs / 64))
    return float(torch.cat([ms_ssim(x[first[p]], x[second[p]]) for p in parts]).mean())


# Otsu 1979 (doi:10.1109/TSMC.1979.4310076), with two thresholds
def tissue_thresholds(x: Tensor) -> tuple[float, float]:
    """Grey levels that part CSF, grey and white matter in slices (N,1,H,W) of T1 contrast.

    They maximise the variance between three classes of the pixels inside the heads.
    """
    check_images(x)
    parts = x.split(MICRO_BATCH)
    histograms = [torch.histc(p[:, 0][brain_mask(p)], 256, 0, 1).double() for p in parts]
    counts = torch.stack(histograms).sum(0).numpy()                             # (256,)
    weight = np.concatenate([[0], np.cumsum(counts)])                           # (257,)
    moment = np.concatenate([[0], np.cumsum(counts * np.arange(256))])

    def between(low, high):
        """Share of the variance between classes that the bins low..high-1 have, (257,257)."""
        total = weight[high] - weight[low]
        return (moment[high] - moment[low]) ** 2 / np.maximum(total, 1e-9)

    first, second = np.meshgrid(np.arange(257), np.arange(257), indexing="ij")
    variance = between(0, first) + between(first, second) + between(second, 256)
    variance[first > second] = -1
    low, high = np.unravel_index(variance.argmax(), variance.shape)
    return float(low) / 256, float(high) / 256


def tissue_areas(x: Tensor, thresholds: tuple[float, float]) -> np.ndarray:
    """Pixels of CSF, grey and white matter inside the head of each slice: (N,3)."""
    check_images(x)
    low, high = thresholds

    def areas(x: Tensor) -> Tensor:
        inside, grey = brain_mask(x), x[:, 0]                                   # (B,H,W)
        dark, bright = grey < low, grey >= high
        tissues = dark & inside, ~dark & ~bright & inside, bright & inside
        return torch.stack([tissue.flatten(1).sum(1) for tissue in tissues], 1)  # (B,3)

    return in_micro_batches(areas, x).numpy()


def area_distance(areas, other, levels, other_levels, bins: int = 8) -> float:
    """Mean Wasserstein distance, in pixels, of tissue areas (N,3) and (M,3) at equal level.

    levels (N,), other_levels (M,): slice levels, compared in `bins` ranges, or all together if
    one of them is unknown (NaN) or no range has slices of both.
    """
    levels, other_levels = np.asarray(levels), np.asarray(other_levels)
    mine, theirs = (np.floor(np.minimum(x * bins, bins - 1)) for x in (levels, other_levels))
    shared = np.intersect1d(mine, theirs)
    if not len(shared) or np.isnan(mine).any() or np.isnan(theirs).any():
        mine, theirs, shared = np.zeros(len(areas)), np.zeros(len(other)), [0]
    distances = [
        wasserstein_distance(areas[mine == k, t], other[theirs == k, t])
        for k in shared
        for t in range(areas.shape[1])
    ]
    return float(np.mean(distances))


def thumbnails(x: Tensor, side: int = 64) -> Tensor:
    """(N,1,side,side), by default for `nearest`."""
    check_images(x)
    return F.adaptive_avg_pool2d(x, side)


def nearest(x: Tensor, bank, k: int = 8) -> tuple[Tensor, Tensor]:
    """Distances and indices (N,k) of the k nearest of a bank, by L2 of 64x64 thumbnails.

    x: images or thumbnails. bank: an iterable of parts (m,1,H,W) of either kind. Fewer than k
    columns if the bank is smaller.
    """
    x, start = thumbnails(x).flatten(1), 0                                  # (N,4096)
    best, found = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long)
    for part in bank:
        part = thumbnails(part).flatten(1)                                  # (m,4096)
        rough = torch.cdist(x, part)  # fast, but not 0 for copies
        mine = rough.topk(min(k, len(part)), largest=False).indices         # (N,k)
        exact = (x[:, None] - part[mine]).norm(dim=2)                       # (N,k)
        best, order = torch.cat([best, exact], 1).sort(dim=1, stable=True)
        found = torch.cat([found, mine + start], 1).gather(1, order)
        best, found, start = best[:, :k], found[:, :k], start + len(part)
    return best, found


def ssim_to_nearest(x: Tensor, bank, images_at, k: int = 8) -> float:
    """Mean over x (N,1,H,W) of the highest SSIM among the k nearest of a bank, as `nearest`.

    images_at: row numbers (n,) of the bank -> their images (n,1,H,W).
    """
    _, found = nearest(x, bank, k)                                          # (N,k)
    best = [
        ssim(one.expand(len(rows), -1, -1, -1), images_at(rows)).max()
        for one, rows in zip(x.split(1), found, strict=True)
    ]
    return float(torch.stack(best).mean())


def radial_spectrum(x: Tensor) -> Tensor:
    """(R,) mean power in dB at 0, 1, ... H/2 cycles per image (square images)."""
    check_images(x)
    n, side = len(x), x.shape[2]
    if x.shape[3] != side:
        raise ValueError(f"radial_spectrum: square images needed, got {tuple(x.shape[2:])}")
    spectra = (torch.fft.rfft2(b[:, 0]).abs().square().sum(0) for b in x.split(32))
    power = (sum(spectra) / n).cpu().flatten()                              # (H*(W/2+1),)
    rows, columns = torch.fft.fftfreq(side, 1 / side), torch.arange(side // 2 + 1)
    ring = torch.hypot(rows[:, None], columns[None].float()).round().long().flatten()
    twice = torch.where((columns > 0) & (columns < side / 2), 2.0, 1.0).repeat(side)
    total, count = (torch.bincount(ring, weights) for weights in (power * twice, twice))
    return 10 * torch.log10((total / count).clamp(min=1e-12))[: side // 2 + 1]  # (R,)


def noise_floor(real_db: Tensor) -> int:
    """Cycles per image at which the data's own noise takes over.

    White noise is flat, so the floor is the median of the last eighth of the spectrum. Noise
    takes over above the last frequency that is 3 dB (twice the power) over it. At least 16, so
    that a band to compare remains.
    """
    level = real_db[-(len(real_db) // 8) :].median()
    above = (real_db > level + 3).nonzero()
    return max(16, int(above.max()) + 1 if len(above) else 0)


def spectrum_difference(real_db: Tensor, other_db: Tensor, end: int, start: int = 8) -> float:
    """Mean |dB| between two `radial_spectrum`s from `start` to `end` - 1 cycles per image.

    end: `noise_floor` of the real data. Beyond it a model's noise is not detail.
    """
    if len(real_db) != len(other_db) or end <= start:
        raise ValueError(f"spectra of {len(real_db)}, {len(other_db)} rings: {start} to {end}?")
    return float((real_db - other_db)[start:end].abs().mean())


# --- codes -------------------------------------------------------------------------------


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of a code histogram (K,): the effective number of codes in use."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.xlogy(p, p).sum().item())
