"""Quantiser and training steps without rewrites for speed, for benchmarks/speed.py and tests.

They compute what modules, metrics and train compute, in the plain way: NCHW, float32, ReLU
before pooling, upsampling as a layer, all distances in the search, one-hot rows for the codes,
Gaussian windows as convolutions. tests/test_speed.py compares losses and gradients.

Dimensions as in modules: B batch, D code dimension, K codes, N = B*h*w positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modules


class Upsampled(nn.Conv2d):
    """Nearest upsampling by 2, then a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2))


class Quantizer(nn.Module):
    """Nearest code by all distances (van den Oord et al. 2017, arXiv:1711.00937, eq. 1, 2)."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.register_buffer("codebook", torch.zeros(codes, dim))
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("sum", torch.zeros(codes, dim))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z (B, D, h, w) -> codes (B, D, h, w), indices (N,), commitment (), one-hot (N, K).

        The gradient of the codes goes to z (straight-through).
        """
        rows = z.permute(0, 2, 3, 1).contiguous()  # (B, h, w, D)
        indices, chosen = self.search(rows.flatten(0, 2))  # (N,), (N, K)
        codes = (chosen @ self.codebook).view_as(rows)  # (B, h, w, D)
        commitment = F.mse_loss(rows, codes)
        codes = rows + (codes - rows).detach()
        return codes.permute(0, 3, 1, 2).contiguous(), indices, commitment, chosen

    def search(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, D) -> the nearest codes as indices (N,) and as one-hot rows (N, K)."""
        e = self.codebook
        distances = flat.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * flat @ e.T
        indices = distances.argmin(1)  # (N,)
        return indices, F.one_hot(indices, len(e)).to(flat.dtype)

    @torch.no_grad()
    def update(self, flat: Tensor, chosen: Tensor, decay: float):
        """One step of the moving averages of counts and sums (appendix A.1)."""
        self.count.mul_(decay).add_(chosen.sum(0), alpha=1 - decay)
        self.sum.mul_(decay).add_(chosen.T @ flat, alpha=1 - decay)
        alive = self.count[:, None] > 1e-3
        self.codebook.copy_(torch.where(alive, self.sum / self.count[:, None], self.codebook))


class VQVAE(nn.Module):
    """The architecture of the README's table. Weights have the names of `modules.VQVAE`."""

    def __init__(self, codes: int = 512, dim: int = 64, widths: tuple[int, int] = (16, 8)):
        super().__init__()
        full, half = widths
        self.encoder = nn.Sequential(
            nn.Conv2d(1, full, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(full, half, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.pre_vq = nn.Conv2d(half, dim, 1)
        self.quantizer = Quantizer(codes, dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, half, 3, padding=1, bias=False), nn.ReLU(),
            Upsampled(half, full, 3, padding=1, bias=False), nn.ReLU(),
            Upsampled(full, 1, 3, padding=1, bias=False),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 1, H, W) -> indices (N,) int64."""
        z = self.pre_vq(self.encoder(x))  # (B, D, h, w)
        return self.quantizer.search(z.permute(0, 2, 3, 1).flatten(0, 2))[0]


def blur(x: Tensor) -> Tensor:
    """Means by SSIM's Gaussian window: (B, 1, H, W) -> (B, 1, H - 10, W - 10)."""
    g = torch.exp(-((torch.arange(11, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    g = g / g.sum()
    return F.conv2d(F.conv2d(x, g.view(1, 1, 11, 1)), g.view(1, 1, 1, 11))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM per image, (B,): Wang et al. 2004, eq. 13."""
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean((1, 2, 3))


def detail(x: Tensor) -> Tensor:
    """Root mean square, in each 16x16 patch, of the image minus its 5x5 mean."""
    high = x - F.avg_pool2d(x, 5, 1, 2)
    return (F.avg_pool2d(high.square(), 16) + 1e-5).sqrt()


def vqvae_step(model: VQVAE, optimizer, images: Tensor, config, corner: Tensor):
    """One training step on images (B, 1, H, W) -> its loss, ()."""
    z = model.pre_vq(model.encoder(images))  # (B, D, h, w)
    codes, _, commitment, chosen = model.quantizer(z)
    output = model.decoder(codes)  # (B, 1, H, W)
    (top, left), side = corner.tolist(), config.window_px
    x, y = (v[..., top : top + side, left : left + side] for v in (output, images))
    loss = F.l1_loss(output, images) + 1 - ssim(x, y).mean()
    loss = loss + config.detail_weight * F.l1_loss(detail(x), detail(y))
    loss = loss + config.commitment * commitment
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
    model.quantizer.update(flat, chosen, config.codebook_decay)
    return loss


def judge(D: modules.Discriminator, u: Tensor, level: Tensor) -> Tensor:
    """Logits (B,) of maps (B, C, h, w), in the memory format of the maps."""
    scores = D.layers(u).flatten(1)
    return scores[:, 0] + (scores[:, 1:] * modules.level_features(level)).sum(1)


def dcgan_step(gan, real, level, noise, penalise: bool) -> dict[str, Tensor]:
    """One step of D, then one of G on the same noise -> both losses."""
    config, D = gan.run.config, gan.D
    fake = gan.G(noise, level)  # (B, C, h, w)
    real_score = judge(D, real, level)
    d_loss = F.softplus(judge(D, fake.detach(), level) - real_score).mean()
    if penalise:
        for u in (real.clone(), fake.detach()):
            u.requires_grad_()
            (gradient,) = torch.autograd.grad(judge(D, u, level).sum(), u, create_graph=True)
            penalty = gradient.square().sum((1, 2, 3)).mean()
            d_loss = d_loss + config.gamma / 2 * config.penalty_every * penalty
    gan.D_optimizer.zero_grad()
    d_loss.backward()
    gan.D_optimizer.step()
    g_loss = F.softplus(real_score.detach() - judge(D, fake, level)).mean()
    gan.G_optimizer.zero_grad()
    g_loss.backward()
    gan.G_optimizer.step()
    return {"g_loss": g_loss, "d_loss": d_loss}
