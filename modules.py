"""The networks and their losses: VQ-VAE, code map, DCGAN.

Pure: tensors in, tensors out. A forward changes no state. Random numbers come from a
`torch.Generator` that the caller gives; only the initial weights come from torch's global
random state.

  images        (B, 1, H, W)  float32 [0,1]      H = W = 256, or a window of it
  index maps    (B, h, w)     int64 0..K-1       h = w = 64
  GAN space     (B, C, h, w)  float32            maps as the DCGAN draws them, cropped

Dimensions: B batch, H W pixels, h w code-map cells, D code dimension, K codes, U used codes,
N = B*h*w positions, A channels before the quantiser, C channels of GAN space, Z noise,
L slice-level features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from dataset import MAP, STEP, Crop
from support.device import sums_by_index

# --- VQ-VAE -------------------------------------------------------------------------------


class UpsampleConv(nn.Conv2d):
    """Upsampling by 2, then a 3x3 convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int, upsampling: str):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.upsampling = upsampling

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W)."""
        if self.upsampling == "nearest":
            return F.conv_transpose2d(x, self.doubling_kernel(), stride=2, padding=1)
        up = F.interpolate(x, scale_factor=2, mode=self.upsampling)       # (B, in, 2H, 2W)
        return F.conv2d(up, self.weight, padding=1)                       # (B, out, 2H, 2W)

    def doubling_kernel(self) -> Tensor:
        """Nearest upsampling and the convolution as one transposed convolution (in, out, 4, 4).

        Nearest upsampling copies each input pixel to 2x2 pixels. Several taps of the 3x3 kernel
        then read the same number, so their sum is one tap of a 4x4 kernel. 2.25 times fewer
        multiplications, no upsampled copy.
        """
        taps = self.weight.flip(2, 3)                                     # (out, in, 3, 3)
        sums = F.avg_pool2d(taps, 2, stride=1, padding=1, divisor_override=1)
        return sums.transpose(0, 1)                                       # (in, out, 4, 4)


def make_encoder(full: int, half: int) -> nn.Sequential:
    """(B, 1, H, W) -> (B, A, H/4, W/4). No biases, so black stays zero.

    Pooling stands before ReLU: the result is the same, on fewer numbers.
    """
    return nn.Sequential(
        nn.Conv2d(1, full, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(full, half, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.ReLU(),
    )


def make_decoder(dim: int, half: int, full: int, upsampling: str, *refining) -> nn.Sequential:
    """(B, D, h, w) -> (B, 1, 4h, 4w), without an output activation.

    refining: further layers, on the (B, half, h, w) cells.
    """
    return nn.Sequential(
        nn.Conv2d(dim, half, 3, padding=1, bias=False), *refining, nn.ReLU(),
        UpsampleConv(half, full, upsampling), nn.ReLU(),
        UpsampleConv(full, 1, upsampling),
    )


class Quantized(NamedTuple):
    """What `Quantizer.forward` returns. The statistics are for `Quantizer.update`."""

    embedding: Tensor  # (B, D, h, w) code vectors; their gradient goes to z
    indices: Tensor  # (B, h, w) int64
    codebook_loss: Tensor  # () |sg(z) - e|^2, second term of eq. 3
    commitment: Tensor  # () |z - sg(e)|^2, third term of eq. 3, not yet times beta
    counts: Tensor  # (K,) uses of each code
    sums: Tensor  # (K, D) sum of the vectors z that chose each code
    z: Tensor  # (N, D) detached
    errors: Tensor  # (N,) squared distance of each z to its code


class Quantizer(nn.Module):
    """Nearest of K code vectors (van den Oord et al. 2017, arXiv:1711.00937, eq. 1 and 2).

    learned_by "loss": the codebook is a parameter, moved by the second term of eq. 3.
    learned_by "ema": each code is a moving average of the vectors that chose it (appendix A.1).
    Counts start at 1, so a code that is never chosen stays where it is.
    """

    def __init__(self, codes: int, dim: int, learned_by: str):
        super().__init__()
        start = (torch.rand(codes, dim) * 2 - 1) / codes  # uniform, as in the original
        if learned_by == "loss":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("sum", start.clone())

    def forward(self, a: Tensor, projection: nn.Conv2d, dtype=torch.float32) -> Quantized:
        """a (B, A, h, w) float32 -> z, by the 1x1 `projection` -> codes; embedding in dtype."""
        B, _, h, w = a.shape
        z = cells(projection(a))                                          # (N, D)
        indices = self.search(cells(a).detach(), projection)              # (N,)
        e = F.embedding(indices, self.codebook)                           # (N, D)
        straight_through = z + (e - z).detach()                           # (N, D) section 3.2
        errors = (z - e).detach().square().sum(1)                         # (N,)
        rows = F.pad(z.detach(), (0, 1), value=1.0)                       # (N, D + 1)
        sums = sums_by_index(rows, indices, len(self.codebook))           # (K, D + 1)
        return Quantized(
            embedding=straight_through.to(dtype).view(B, h, w, -1).permute(0, 3, 1, 2),
            indices=indices.view(B, h, w),
            codebook_loss=F.mse_loss(e, z.detach()),
            commitment=F.mse_loss(z, e.detach()),
            counts=sums[:, -1].contiguous(), sums=sums[:, :-1].contiguous(),
            z=z.detach(), errors=errors,
        )

    @torch.no_grad()
    def search(self, a: Tensor, projection: nn.Conv2d) -> Tensor:
        """Index (N,) of the code nearest to each z = W a + b, from a (N, A).

        |Wa + b - e|^2 = |Wa|^2 - 2 a.W'(e - b) + |e - b|^2. The first term is the same for all
        codes and is left out, so the search takes A multiplications per code instead of D.
        """
        weight = projection.weight.flatten(1)                             # (D, A)
        shifted = self.codebook - projection.bias                         # (K, D)
        keys = torch.cat([weight.T @ shifted.T, shifted.square().sum(1)[None] / -2])
        a = F.pad(a, (0, 1), value=1.0)                                   # (N, A + 1)
        if a.device.type != "cpu":
            rows = max(1, (1 << 27) // len(self.codebook))  # 0.5 GB of scores
            return torch.cat([best(part @ keys) for part in a.split(rows)])
        # Background is exactly 0: one search for all its cells. 4,096 rows fit into the cache.
        background = F.pad(torch.zeros_like(a[:1, :-1]), (0, 1), value=1.0)
        indices = best(background @ keys).repeat(len(a))                  # (N,)
        inside = a[:, :-1].any(1).nonzero().flatten()
        indices[inside] = torch.cat([best(part @ keys) for part in a[inside].split(4096)])
        return indices

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, decay: float):
        """One step of the moving averages (appendix A.1). Codes of tiny count stay put."""
        self.count.lerp_(counts, 1 - decay)
        self.sum.lerp_(sums, 1 - decay)
        alive, mean = self.count > 1e-3, self.sum / self.count[:, None]   # (K,) (K, D)
        self.codebook.copy_(torch.where(alive[:, None], mean, self.codebook))

    @torch.no_grad()
    def replace(self, codes: Tensor, vectors: Tensor):
        """Set code vectors. Sum and count are set too, or the old sum would undo it."""
        self.codebook[codes] = vectors
        self.count[codes] = 1.0
        self.sum[codes] = vectors

    @torch.no_grad()
    def revive(self, z: Tensor, errors: Tensor, below: float, generator) -> int:
        """Move codes used less than `below` times a step to badly coded z (N, D).

        errors (N,): squared distances of z to their codes. Returns how many codes moved.
        Vectors are drawn with probability proportional to their error, as k-means++ draws its
        starts: in a brain slice most vectors are background and coded perfectly.
        """
        dead = (self.count < below).nonzero().flatten()
        if len(dead) == 0 or errors.sum() == 0:
            return 0
        dead = dead[: int((errors > 0).sum())]
        chosen = torch.multinomial(errors.cpu(), len(dead), generator=generator)
        self.replace(dead, z[chosen.to(dead.device)])
        return len(dead)


def best(scores: Tensor) -> Tensor:
    """Column (N,) of the highest score in each row (N, K). `max` is twice as fast as argmax."""
    return scores.max(1).indices


def cells(x: Tensor) -> Tensor:
    """Maps (B, C, h, w) -> their cells as rows (B*h*w, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


class VQVAE(nn.Module):
    """(B, 1, 256, 256) -> encoder -> quantiser (64x64 codes) -> decoder -> (B, 1, 256, 256)."""

    def __init__(
        self, codes: int = 512, dim: int = 64, widths: tuple[int, ...] = (16, 8, 8, 16),
        upsampling: str = "nearest", codebook: str = "ema",
    ):
        super().__init__()
        self.encoder = make_encoder(*widths[:2])
        self.pre_vq = nn.Conv2d(widths[1], dim, 1)
        self.quantizer = Quantizer(codes, dim, codebook)
        self.decoder = make_decoder(dim, *widths[2:], upsampling)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, quantize: bool = True) -> tuple[Tensor, Quantized | None]:
        """Images (B, 1, H, W) -> unclipped reconstructions (B, 1, H, W), and the codes.

        quantize False: a plain autoencoder, whose decoder reads z.
        """
        a = self.encoder(x)                                               # (B, A, h, w)
        if not quantize:
            return self.decoder(self.pre_vq(a)), None                     # (B, 1, H, W)
        with torch.autocast(x.device.type, enabled=False):  # codes lie close: float32
            quantized = self.quantizer(a.float(), self.pre_vq, a.dtype)
        return self.decoder(quantized.embedding), quantized               # (B, 1, H, W)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 1, H, W) -> index maps (B, h, w) int64.

        Raises FloatingPointError if the encoder's output is not finite.
        """

        def some(x: Tensor) -> Tensor:
            a = self.encoder(x)                                           # (B, A, h, w)
            rows = cells(a.float())                                       # (N, A)
            if not torch.isfinite(rows).all():  # argmin of NaN would be code 0, a valid picture
                raise FloatingPointError("the encoder's output is not finite")
            return self.quantizer.search(rows, self.pre_vq).view(len(x), *a.shape[2:])

        return self.in_parts(some, x)

    def decode(self, indices: Tensor) -> Tensor:
        """Index maps (B, h, w) int64 -> images (B, 1, 4h, 4w) float32, clipped to [0,1].

        Raises FloatingPointError if the decoder's output is not finite.
        """

        def some(indices: Tensor) -> Tensor:
            images = self.decode_raw(indices)                             # (B, 1, 4h, 4w)
            if not torch.isfinite(images).all():
                raise FloatingPointError("the decoder's output is not finite")
            return images.clamp(0, 1)

        return self.in_parts(some, indices)

    def decode_raw(self, indices: Tensor) -> Tensor:
        """Like `decode`, neither clipped nor checked: for training."""
        embedding = F.embedding(indices, self.quantizer.codebook)         # (B, h, w, D)
        return self.decoder(embedding.permute(0, 3, 1, 2)).float()        # (B, 1, 4h, 4w)

    def in_parts(self, function, x: Tensor) -> Tensor:
        """function(x), some rows at a time, on the weights' device; the result is on x's."""
        device = self.quantizer.codebook.device
        few = 16 if device.type == "cpu" else 128  # what fits into a CPU's cache
        return torch.cat([function(part.to(device)).to(x.device) for part in x.split(few)])


def make_vqvae(config: Config) -> VQVAE:
    """The VQ-VAE of stage 1 with its initial weights."""
    if config.original:  # keeps torch's own start, whose signals shrink from layer to layer
        return VQVAE(config.codes, config.code_dim, config.widths, "bilinear", "loss")
    model = VQVAE(config.codes, config.code_dim, config.widths)
    model.apply(start_awake)
    model.decoder[-1].weight.data.mul_(0.1)  # dark pictures: the first steps raise filters
    return model


@torch.no_grad()
def start_awake(module: nn.Module):
    """He et al.'s start; each filter's sign makes the sum of its weights positive.

    Slices and ReLU outputs are never negative and these convolutions have no bias: a filter of
    negative sum is 0 almost everywhere and seldom learns. With random signs, half of the 8
    channels before the quantiser were lost.
    """
    start_at_he(module)
    if isinstance(module, nn.Conv2d):
        module.weight.mul_(module.weight.sum((1, 2, 3), keepdim=True).sign())


# --- code map: index maps <-> GAN space ---------------------------------------------------


class CodeMap(nn.Module):
    """Places of the used codes in GAN space, and the way back.

    "coordinates": a code is its first C principal coordinates. One scale for all gives the
    first one unit variance over the training split. Near codes are similar, so an index map is
    a smooth picture. Of a generated cell, `decode` takes the nearest code; a denoiser, if there
    is one, chooses instead.
    "pc1", "raw": a code is the middle of one of U even bins of (-1, 1), ranked by principal
    component 1 or by its number. "raw" is the original recipe. Its maps are noise to a
    convolution, since training numbers codes at random.
    """

    def __init__(
        self, used: Tensor, points: Tensor, codes: int, crop: Crop | None = None,
        background: int = 0, stretched: bool = False,
    ):
        """used (U,) int64: used codes in their order. points (U, C): their places.

        crop, background: what generated maps cover, and the code around it.
        stretched: bins span each sample's own range, as in the original recipe.
        """
        super().__init__()
        self.crop, self.background, self.stretched = crop or Crop(), background, stretched
        rank = torch.full((codes,), -1)
        rank[used] = torch.arange(len(used))
        self.register_buffer("used", used)
        self.register_buffer("points", points)
        self.register_buffer("rank", rank)                                # (K,), -1: never used
        self.even = torch.equal(points, even_middles(len(used)))

    @classmethod
    def fit(cls, codebook: Tensor, counts: Tensor, order: str, channels: int, **given) -> Self:
        """From the codebook (K, D) and the training split's code histogram (K,)."""
        used = counts.nonzero().flatten()                                 # (U,)
        y = principal_coordinates(codebook[used], counts[used], channels) # (U, C or D)
        y = F.pad(y, (0, channels - y.shape[1]))                          # (U, C)
        if order != "raw":
            by_pc1 = y[:, 0].argsort(stable=True)
            used, y = used[by_pc1], y[by_pc1]
        if order == "coordinates":
            weight = counts[used].double()[:, None] / counts.sum()        # (U, 1)
            sd = (weight * y[:, :1].square()).sum().sqrt()                # ()
            return cls(used, (y / sd.clamp_min(1e-9)).float(), len(codebook), **given)
        return cls(used, even_middles(len(used)), len(codebook), **given)

    def saved(self) -> dict:
        """What `from_saved` needs: plain values and tensors."""
        return {
            "used": self.used.cpu(), "points": self.points.cpu(),
            "crop": torch.tensor(self.crop), "background": torch.tensor(self.background),
        }

    @classmethod
    def from_saved(cls, values: dict, config: Config) -> Self:
        """The inverse of `saved`. Raises ValueError unless it fits the configuration."""
        crop, background = Crop(*values["crop"].tolist()), int(values["background"])
        top, left, height, width = crop
        inside = 0 <= top <= MAP - height and 0 <= left <= MAP - width
        sides = all(side > 0 and side % STEP == 0 for side in crop.size)
        if not inside or not sides or not 0 <= background < config.codes:
            raise ValueError("its crop is no part of a map")
        used, points = values["used"], values["points"]
        code_map = cls(
            used, points, config.codes, crop, background, stretched=config.original
        )
        U = len(used)
        if not U == (code_map.rank >= 0).sum() > 0:
            raise ValueError("its codes are not those of the codebook")
        if not code_map.even and points.shape != (U, config.map_channels):
            raise ValueError("a code has no place for each channel")
        levels, counts = values["levels"], values["counts"]["train"]
        if counts.shape != (config.codes,):
            raise ValueError("its histogram is not of the codebook")
        if levels.ndim != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError("its slice levels are not from 0 to 1")
        return code_map

    def encode(self, indices: Tensor) -> Tensor:
        """Index maps (B, h, w) int64 of used codes -> (B, C, h, w) float32."""
        ranks = self.rank[indices]                                        # (B, h, w)
        return F.embedding(ranks, self.points).permute(0, 3, 1, 2)        # (B, C, h, w)

    def decode(self, u: Tensor) -> Tensor:
        """(B, C, h, w) -> index maps (B, h, w): the used code nearest to each cell.

        Copies of a single channel are averaged. Raises FloatingPointError if u is not finite.
        """
        if not torch.isfinite(u).all():
            raise FloatingPointError("the generator's output is not finite")
        u = u.float()
        if not self.even:
            ranks = nearest_row(cells(u), self.points).view(len(u), *u.shape[2:])
            return self.used[ranks]                                       # (B, h, w)
        u, U = u.mean(1), len(self.used)                                  # (B, h, w)
        if self.stretched:
            low, high = u.amin((1, 2), True), u.amax((1, 2), True)        # (B, 1, 1)
            u = (u - low) / (high - low).clamp_min(1e-12) * 2 - 1
        ranks = ((u + 1) * (U / 2)).floor().long().clamp(0, U - 1)        # +1: the last bin
        return self.used[ranks]                                           # (B, h, w)


def even_middles(bins: int) -> Tensor:
    """Middles (bins, 1) of even bins of (-1, 1)."""
    return ((torch.arange(bins) + 0.5) * (2 / bins) - 1)[:, None]


def nearest_row(x: Tensor, rows: Tensor) -> Tensor:
    """Index (N,) of the row of (U, C) nearest to each x (N, C).

    |x|^2 is the same for all rows and is left out.
    """
    keys = torch.cat([rows.T, rows.square().sum(1)[None] / -2])           # (C + 1, U)
    x = F.pad(x, (0, 1), value=1.0)                                       # (N, C + 1)
    return torch.cat([best(part @ keys) for part in x.split(4096)])


def principal_coordinates(codebook: Tensor, counts: Tensor, components: int) -> Tensor:
    """Usage-weighted principal coordinates (U, components) of code vectors (U, D).

    Each component's largest loading is positive, so equal inputs give equal orders.
    """
    weight = (counts.double() / counts.sum())[:, None]                    # (U, 1)
    centred = codebook.double() - (weight * codebook.double()).sum(0)     # (U, D)
    _, axes = torch.linalg.eigh(centred.T @ (weight * centred))  # ascending
    axes = axes.flip(1)[:, :components]                                   # (D, components)
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()     # (1, components)
    return centred @ (axes * signs)                                       # (U, components)


# --- DCGAN --------------------------------------------------------------------------------

LEVEL_FEATURES = 9


def level_features(level: Tensor) -> Tensor:
    """Slice level (B,) in [0,1] -> (B, L): 1 and four octaves of cosine and sine.

    An unknown level (NaN) gives zeros, which makes the same networks unconditional.
    """
    octaves = 2.0 ** torch.arange(-1, 3, device=level.device)             # 0.5 1 2 4
    angles = level[:, None] * math.pi * octaves                           # (B, 4)
    features = torch.cat([torch.ones_like(level)[:, None], angles.cos(), angles.sin()], 1)
    return features.nan_to_num(0.0) * level.isfinite()[:, None]           # (B, L)


class Generator(nn.Module):
    """DCGAN generator (Radford et al. 2016, arXiv:1511.06434, figure 1): Z -> maps of `size`.

    64x64 as in the paper: 4x4, then doubled four times. Other sizes: each layer draws half of
    the next one's cells, rounded up, and surplus cells are cut off (56x48 begins with 4x3).
    classic: as in the paper. Otherwise the slice level's features are appended to the noise,
    and one more layer works at full size: in the paper's last layer, 4x4 neighbouring cells are
    a linear function of few numbers, so tissue borders stay soft.
    bounded: tanh at the end, as in the paper.
    """

    def __init__(
        self, noise_dim: int, width: int, channels: int, classic: bool, bounded: bool,
        size: tuple[int, int] = (MAP, MAP),
    ):
        super().__init__()
        self.noise_dim, self.conditional = noise_dim, not classic
        sizes = [size]
        for _ in range(4):
            sizes.insert(0, tuple(math.ceil(side / 2) for side in sizes[0]))
        ins = noise_dim + LEVEL_FEATURES * self.conditional
        widths = [8 * width, 4 * width, 2 * width, width] + [max(1, width // 2)] * (not classic)
        layers = []
        for i, out in enumerate(widths):
            kind = UpTo if i else FromOne
            layers += [kind(ins, out, sizes[i], bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            ins = out
        last = UpTo(ins, channels, size) if classic else nn.Conv2d(ins, channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, last, *[nn.Tanh()] * bounded)
        self.apply(start_at_002)
        self.to(memory_format=torch.channels_last)

    def forward(self, noise: Tensor, level: Tensor) -> Tensor:
        """noise (B, Z), level (B,) in [0,1] or NaN -> (B, C, h, w), bounded: in [-1, 1]."""
        if self.conditional:
            noise = torch.cat([noise, level_features(level)], 1)          # (B, Z + L)
        return self.layers(noise[:, :, None, None])                       # (B, C, h, w)


class FromOne(nn.ConvTranspose2d):
    """The transposed convolution (made with bias=False) of a single cell: a product."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, ins, 1, 1) -> (B, outs, h, w)."""
        weight = self.weight.permute(0, 2, 3, 1)                          # (ins, h, w, outs)
        y = x.flatten(1) @ weight.flatten(1)                              # (B, h*w*outs)
        return y.view(len(x), *weight.shape[1:]).permute(0, 3, 1, 2)      # (B, outs, h, w)


class UpTo(nn.ConvTranspose2d):
    """The transposed convolution that doubles both sides, cut to `size` cells."""

    def __init__(self, ins: int, outs: int, size: tuple[int, int], bias: bool = True):
        super().__init__(ins, outs, 4, 2, 1, bias=bias)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.size
        return super().forward(x)[:, :, :h, :w]                           # (B, outs, h, w)


class Discriminator(nn.Module):
    """DCGAN discriminator: maps of `size`, sides multiples of 8 -> one logit.

    batch_norm True: as in the paper. False: no normalisation, since a sample's score and its
    gradient penalty must not depend on the other samples; and a projection on the slice level
    (Miyato and Koyama 2018, arXiv:1802.05637, eq. 3): one last layer per level feature.
    """

    def __init__(self, width: int, channels: int, batch_norm: bool, size=(MAP, MAP)):
        super().__init__()
        self.conditional = not batch_norm
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for ins in (width, 2 * width, 4 * width):
            layers.append(nn.Conv2d(ins, 2 * ins, 4, 2, 1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(2 * ins)] * batch_norm + [nn.LeakyReLU(0.2)]
        outs = 1 + LEVEL_FEATURES * self.conditional
        left = tuple(side // 16 for side in size)  # cells left after four halvings
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, outs, left))
        self.apply(start_at_002 if batch_norm else start_at_he)
        self.to(memory_format=torch.channels_last)

    def forward(self, u: Tensor, level: Tensor) -> Tensor:
        """u (B, C, h, w), level (B,) -> logits (B,)."""
        scores = self.layers(u.contiguous(memory_format=torch.channels_last)).flatten(1)
        if not self.conditional:
            return scores[:, 0]                                           # (B,)
        return scores[:, 0] + (scores[:, 1:] * level_features(level)).sum(1)


def make_generator(config: Config, size: tuple[int, int]) -> Generator:
    width, channels = config.gan_widths[0], config.map_channels
    bounded = config.order != "coordinates"
    return Generator(config.noise_dim, width, channels, config.original, bounded, size)


def make_discriminator(config: Config, size: tuple[int, int]) -> Discriminator:
    return Discriminator(config.gan_widths[1], config.map_channels, config.original, size)


def start_at_002(module: nn.Module):
    """Weights from N(0, 0.02), BatchNorm gains from N(1, 0.02): Radford et al. 2016."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def start_at_he(module: nn.Module):
    """Weights that keep the variance through ReLU: He et al. 2015, arXiv:1502.01852, eq. 10."""
    if isinstance(module, nn.Conv2d):
        taps = module.weight[0].numel()
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / taps))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """softplus(-(D(better) - D(worse))), pair by pair.

    Huang et al. 2024 (R3GAN, arXiv:2501.05441, eq. 2); the pairing loss of Jolicoeur-Martineau
    2019, arXiv:1807.00734. D's step: better = real. G's step: better = generated.
    """
    return F.softplus(worse - better).mean()


def bce_loss(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of logits against one label (Goodfellow et al. 2014, 1406.2661)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def gradient_penalty(discriminator: nn.Module, u: Tensor, *given: Tensor) -> Tensor:
    """Squared norm (B,) of D's gradient at each u: R1 on real maps, R2 on generated ones.

    Mescheder et al. 2018, arXiv:1801.04406, eq. 9 and 10, there halved and weighted by gamma.
    given: D's other inputs, the slice levels.
    """
    u = u.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(u, *given).sum(), u, create_graph=True)
    return gradient.square().sum((1, 2, 3))                               # (B,)


# --- generation ---------------------------------------------------------------------------

SAMPLE = 1000  # purpose number of `generator_of`: a sample's noise
DRAW_BATCH = 16


def generator_of(*path: int) -> torch.Generator:
    """A random generator that depends on (seed, purpose, step, ...) only.

    So resuming needs no saved random state, and sample s is the same picture in any batch and
    on any number of processes.
    """
    # The 1 at the end: a seed sequence treats (s,) and (s, 0) alike.
    state = np.random.SeedSequence((*path, 1)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def noise_of(
    samples: range, noise_dim: int, seed: int, levels: Tensor, purpose: int = SAMPLE
) -> tuple[Tensor, Tensor]:
    """Noise (n, Z) and levels (n,) from the table `levels`; row s depends on (seed, s) only.

    levels (0,): the data have no slice levels, and every level is NaN.
    """
    rows, chosen = [], []
    for s in samples:
        generator = generator_of(seed, purpose, s)
        rows.append(torch.randn(noise_dim, generator=generator))
        place = torch.randint(max(1, len(levels)), (), generator=generator)
        chosen.append(levels[place] if len(levels) else torch.tensor(math.nan))
    return torch.stack(rows), torch.stack(chosen)


@torch.no_grad()
def in_full_batches(function: Callable, *inputs: Tensor) -> Tensor:
    """function(*inputs), DRAW_BATCH rows at a time, the last ones padded; moved to the CPU.

    A batch of another size is summed in another order, and a value at the edge of a bin would
    change its code.
    """
    outputs = []
    for parts in zip(*(x.split(DRAW_BATCH) for x in inputs), strict=True):
        n = len(parts[0])
        full = (torch.cat([x, x.new_zeros(DRAW_BATCH - n, *x.shape[1:])]) for x in parts)
        outputs.append(function(*full)[:n].cpu())
    return torch.cat(outputs)


def draw_maps(
    generator: Generator, code_map: CodeMap, noise: Tensor, level: Tensor, restore=None
) -> Tensor:
    """Noise (n, Z), levels (n,) -> index maps (n, 64, 64) int64, on the CPU.

    restore: a function of the generator's output (B, C, h, w), noise (B, Z) and level (B,) that
    returns index maps (B, h, w), such as the denoiser's. Without it, `code_map.decode`.
    """

    def draw(z: Tensor, level: Tensor) -> Tensor:
        z, level = z.to(code_map.used.device), level.to(code_map.used.device)
        u = generator(z, level)                                           # (16, C, h, w)
        level = level if generator.conditional else torch.full_like(level, math.nan)
        maps = restore(u, z, level) if restore else code_map.decode(u)    # (16, h, w)
        return code_map.crop.paste(maps, code_map.background)             # (16, 64, 64)

    return in_full_batches(draw, noise, level)
