"""The networks and what lies between them: VQ-VAE, code map, DCGAN, denoiser; their losses.

Pure: tensors in, tensors out. No files, no devices, no surprises in `forward`: a quantiser
returns its statistics, and whoever trains it calls `update`. Only the networks' first weights
come from torch's global random state.

  images        (B, 1, H, W)  float32 [0,1]      H = W = 256, or a part of it
  index maps    (B, h, w)     int64 0..K-1       h = w = 64
  GAN space     (B, C, h, w)  float32            what the DCGAN draws: unit variance or (-1,1),
                                                 of the maps' box

Dimensions: B batch, H W pixels, h w code-map cells, D code dimension, K codes, U used codes,
N = B*h*w positions, A channels before the quantiser, C channels of GAN space or coordinates,
Z noise, L level features, E features of the strength of noise.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

# --- VQ-VAE -------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), as in van den Oord et al. 2017, section 4.1."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class UpsampleConv(nn.Conv2d):
    """Upsampling by 2, then a 3x3 convolution.

    With nearest upsampling both are one convolution at the low resolution: an output pixel of
    parity (i, j) sees only 2x2 distinct inputs, so four small kernels (sums of the taps of the
    3x3 kernel that fall on the same input) give four times the channels, which are then
    interleaved: as `pixel_shuffle` does, but in runs of 2 * out numbers. The same function,
    borders included, with 2.25 times fewer multiplications and without the upsampled copy.
    """

    def __init__(self, in_channels: int, out_channels: int, upsampling: str):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.upsampling = upsampling
        # taps[i, r, t]: does tap t of the 3x3 kernel fall on low-resolution offset r - 1
        # for output parity i? Even pixels see (-1, 0, 0), odd ones (0, 0, +1).
        even, odd = [[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]
        self.register_buffer("taps", torch.tensor([even, odd]).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsampling == "bilinear":
            up = F.interpolate(x, scale_factor=2, mode="bilinear")        # (B, in, 2H, 2W)
            return F.conv2d(up, self.weight, padding=1)                   # (B, out, 2H, 2W)
        folded = torch.einsum("irt,jsu,octu->ijocrs", self.taps, self.taps, self.weight)
        parities = cells(F.conv2d(x, folded.flatten(0, 2), padding=1))    # (B*H*W, 4*out)
        B, _, H, W = x.shape
        out = self.out_channels
        rows = Swap.apply(parities.view(B, H, W, 2, 2 * out))             # (B, H, 2, W, 2*out)
        return rows.view(B, 2 * H, 2 * W, out).permute(0, 3, 1, 2)        # (B, out, 2H, 2W)


class Swap(torch.autograd.Function):
    """(B, H, a, b, n) -> (B, H, b, a, n), n even: a copy that moves two numbers as one.

    Of a single channel, whose runs are of two numbers, in a third to a tenth of the time.
    """

    @staticmethod
    def forward(ctx, x):
        pair = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[x.element_size()]
        return x.contiguous().view(pair).transpose(2, 3).contiguous().view(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return Swap.apply(gradient)


def make_encoder(full: int, half: int) -> nn.Sequential:
    """(B, 1, H, W) -> (B, A, H/4, W/4). Pooling before ReLU: the same, on fewer numbers."""
    return nn.Sequential(
        nn.Conv2d(1, full, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(full, half, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.ReLU(),
    )


def make_decoder(
    dim: int, half: int, full: int, blocks: int, upsampling: str
) -> nn.Sequential:
    """(B, D, h, w) -> (B, 1, 4h, 4w), without an output activation.

    Residual blocks are for decoders alone: in the encoder, they make maps that are harder to
    learn.
    """
    return nn.Sequential(
        nn.Conv2d(dim, half, 3, padding=1, bias=False),
        *(ResidualBlock(half) for _ in range(blocks)),
        nn.ReLU(),
        UpsampleConv(half, full, upsampling),
        nn.ReLU(),
        UpsampleConv(full, 1, upsampling),
    )


class Quantized(NamedTuple):
    """What one pass through the quantiser yields.

    The statistics are for `Quantizer.update`; after `backward`, which needs the codes as they
    were.
    """

    embedding: Tensor  # (B, D, h, w) code vectors, with the gradient of z (straight-through)
    indices: Tensor  # (B, h, w) int64
    codebook_loss: Tensor  # () |sg(z) - e|^2, second term of eq. 3
    commitment: Tensor  # () |z - sg(e)|^2, third term of eq. 3, not yet times beta
    counts: Tensor  # (K,) how often each code was used
    sums: Tensor  # (K, D) sum of the vectors z that chose it
    inputs: Tensor  # (N, A) what z = W a + b is made of, detached
    errors: Tensor  # (N,) squared distance of each z to its code


class StraightThrough(torch.autograd.Function):
    """Code vectors forward; backward, the gradient goes to z = V (a, 1) as if they were z.

    van den Oord et al. 2017, section 3.2. z itself, D numbers a cell, is never made.
    """

    @staticmethod
    def forward(ctx, rows, V, codebook, indices):
        """rows (N, A + 1), each of them (a, 1); V (D, A + 1); -> (N, D)."""
        ctx.save_for_backward(rows, V)
        return F.embedding(indices, codebook)

    @staticmethod
    def backward(ctx, gradient):
        rows, V = (x.to(gradient.dtype) for x in ctx.saved_tensors)
        return (gradient @ V).float(), (gradient.T @ rows).float(), None, None


class Quantizer(nn.Module):
    """Nearest of K code vectors (van den Oord et al. 2017, arXiv:1711.00937, eq. 1 and 2).

    learned_by "loss": the codebook is a parameter, moved by the second term of eq. 3.
    learned_by "ema": it is a moving average of the vectors that chose it (appendix A.1);
    counts start at 1, so that a code that is never chosen stays where it is.
    """

    def __init__(self, codes: int, dim: int, learned_by: str):
        super().__init__()
        start = (torch.rand(codes, dim) * 2 - 1) / codes  # uniform, as the original
        if learned_by == "loss":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("sum", start.clone())

    @torch.no_grad()
    def search(self, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Index of the code nearest to z = W a + b, found without making z.

        |Wa+b-e|^2 = |Wa|^2 - 2 a.W'(e-b) + |e-b|^2, whose first term is the same for all
        codes: A multiplications per code in place of D. a (N, A), W (D, A), b (D,) -> (N,).
        On a CPU in pieces, so that the scores stay in the cache, and the background, which is
        exactly 0 behind convolutions without bias, is searched once for all its cells.
        """
        shifted = self.codebook - bias                                    # (K, D)
        keys = torch.cat([weight.T @ shifted.T, shifted.square().sum(1)[None] / -2])
        a = F.pad(a, (0, 1), value=1.0)                                   # (N, A + 1)
        if a.device.type != "cpu":
            rows = max(1, (1 << 27) // len(self.codebook))  # 0.5 GB of scores
            return torch.cat([best(part @ keys) for part in a.split(rows)])
        zero = torch.zeros_like(a[:1])
        zero[:, -1] = 1.0
        indices = best(zero @ keys).repeat(len(a))                        # (N,)
        inside = a[:, :-1].any(1).nonzero().flatten()
        indices[inside] = torch.cat([best(part @ keys) for part in a[inside].split(4096)])
        return indices

    def forward(self, a: Tensor, projection: nn.Conv2d, dtype=torch.float32) -> Quantized:
        """a (B, A, h, w) float32, the input of the 1x1 `projection` to D channels z."""
        B, _, h, w = a.shape
        weight, bias = projection.weight.flatten(1), projection.bias      # (D, A), (D,)
        V = torch.cat([weight, bias[:, None]], 1)                         # (D, A + 1)
        flat, e = cells(a), self.codebook                                 # (N, A), (K, D)
        rows = F.pad(flat, (0, 1), value=1.0)                             # (N, A + 1)
        indices = self.search(flat.detach(), weight, bias)                # (N,)
        embedding = StraightThrough.apply(rows, V, e.to(dtype), indices)  # (N, D)
        errors = self.errors(flat, weight.detach(), bias.detach(), indices)
        rows = rows.detach()
        sums = sums_by_code(rows, indices, len(e))                        # (K, A + 1)
        squares = rows.T @ rows                                           # (A + 1, A + 1)
        numbers = len(flat) * e.shape[1]
        return Quantized(
            embedding=embedding.view(B, h, w, -1).permute(0, 3, 1, 2),    # (B, D, h, w)
            indices=indices.view(B, h, w),
            codebook_loss=(
                errors.detach().sum() + slope(total_error(e, V.detach(), sums, squares))
            ) / numbers,
            commitment=(
                errors.sum() + slope(total_error(e.detach(), V, sums, squares))
            ) / numbers,
            counts=sums[:, -1].contiguous(),
            sums=sums @ V.detach().T,                                     # (K, D)
            inputs=flat.detach(),
            errors=errors.detach(),
        )

    def errors(self, a: Tensor, weight: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
        """|z - sg(e)|^2 per position (N,), from the A numbers a of z = W a + b."""
        shifted = self.codebook.detach() - bias                           # (K, D)
        keys = torch.cat([shifted @ weight * -2, shifted.square().sum(1)[:, None]], 1)
        chosen = F.embedding(indices, keys)                               # (N, A + 1)
        squares = (a @ (weight.T @ weight) + chosen[:, :-1]) * a          # (N, A)
        return (squares.sum(1) + chosen[:, -1]).clamp_min(0)              # (N,)

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, decay: float):
        """One step of the moving averages, appendix A.1. Codes of negligible count stay put."""
        self.count.lerp_(counts, 1 - decay)
        self.sum.lerp_(sums, 1 - decay)
        alive, mean = self.count > 1e-3, self.sum / self.count[:, None]   # (K,) (K, D)
        self.codebook.copy_(torch.where(alive[:, None], mean, self.codebook))

    @torch.no_grad()
    def replace(self, codes: Tensor, vectors: Tensor):
        """Set code vectors, and with them sum and count, or the old sum would undo it."""
        self.codebook[codes] = vectors
        self.count[codes] = 1.0
        self.sum[codes] = vectors

    @torch.no_grad()
    def revive(
        self, inputs: Tensor, errors: Tensor, projection: nn.Conv2d, below: float,
        generator: torch.Generator,
    ) -> int:
        """Move codes used less than `below` times a step to vectors that are coded badly.

        inputs (N, A), errors (N,): as in `Quantized`. Returns how many codes were moved.
        Vectors are drawn with probability proportional to their squared error, as k-means++
        draws its starts: in a brain slice most vectors are background and coded perfectly.
        """
        dead = (self.count < below).nonzero().flatten()
        if len(dead) == 0 or errors.sum() == 0:
            return 0
        dead = dead[: int((errors > 0).sum())]
        chosen = torch.multinomial(errors.cpu(), len(dead), generator=generator)
        self.replace(dead, project(inputs[chosen.to(dead.device)], projection))
        return len(dead)


def sums_by_code(rows: Tensor, indices: Tensor, codes: int) -> Tensor:
    """Sum of the rows (N, C) that chose each code, by indices (N,): (K, C).

    On a GPU as products with rows of zeros and ones: its `index_add_` adds in another order
    each time, so that the same seed would end at other bits.
    """
    if rows.device.type == "cpu":
        return rows.new_zeros(codes, rows.shape[1]).index_add_(0, indices, rows)
    return sums_by_product(rows, indices, codes)


def sums_by_product(rows: Tensor, indices: Tensor, codes: int) -> Tensor:
    every = torch.arange(codes, device=rows.device)[:, None]              # (K, 1)
    few = max(1, (1 << 26) // codes)  # 0.25 GB of zeros and ones
    parts = zip(rows.split(few), indices.split(few), strict=True)
    return sum((every == chosen).to(part.dtype) @ part for part, chosen in parts)


def total_error(codebook: Tensor, V: Tensor, sums: Tensor, squares: Tensor) -> Tensor:
    """Sum of |V h - e|^2 over N positions h = (a, 1): (), from few numbers.

    V (D, A + 1); codebook (K, D); sums (K, A + 1) of the h that chose each code; squares
    (A + 1, A + 1), the sum of h h'. With it V and the codes learn from N positions without
    another look at them.
    """
    own = (V.T @ V * squares).sum() + sums[:, -1] @ codebook.square().sum(1)
    return own - 2 * (sums @ V.T * codebook).sum()


def slope(x: Tensor) -> Tensor:
    """0, with the gradient of x."""
    return x - x.detach()


def best(scores: Tensor) -> Tensor:
    """Column (N,) of the highest of each row (N, K): argmax, in less than half of its time."""
    return scores.max(1).indices


def project(a: Tensor, projection: nn.Conv2d) -> Tensor:
    """The 1x1 convolution on a list of cells: (N, A) -> z (N, D)."""
    return F.linear(a, projection.weight.flatten(1), projection.bias)


class VQVAE(nn.Module):
    """(B, 1, 256, 256) -> encoder -> quantiser (64x64 codes) -> decoder -> (B, 1, 256, 256)."""

    def __init__(
        self,
        codes: int = 512,
        dim: int = 64,
        widths: tuple[int, int, int, int] = (16, 8, 8, 16),
        upsampling: str = "nearest",
        codebook: str = "ema",
    ):
        super().__init__()
        self.encoder = make_encoder(*widths[:2])
        self.pre_vq = nn.Conv2d(widths[1], dim, 1)
        self.quantizer = Quantizer(codes, dim, codebook)
        self.decoder = make_decoder(dim, *widths[2:], blocks=0, upsampling=upsampling)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, quantize: bool = True) -> tuple[Tensor, Quantized | None]:
        """Images (B, 1, H, W) -> reconstructions (B, 1, H, W), not clipped, and the codes.

        quantize False: the plain autoencoder, whose decoder reads z itself.
        """
        a = self.encoded(x)                                               # (B, A, h, w)
        if not quantize:
            return self.decoder(self.pre_vq(a)), None                     # (B, 1, H, W)
        with torch.autocast(x.device.type, enabled=False):  # codes differ by little: float32
            quantized = self.quantizer(a.float(), self.pre_vq, a.dtype)
        return self.decoder(quantized.embedding), quantized               # (B, 1, H, W)

    def encoded(self, x: Tensor) -> Tensor:
        """Images (B, 1, H, W) -> the encoder's output (B, A, H/4, W/4).

        Of 0 it makes 0, since it has no biases. So on a CPU it looks only at the box outside of
        which all images are 0 (on a GPU, to ask for that box would be to wait for it).
        """
        if x.device.type != "cpu" or len(x) == 0:
            return self.encoder(x.contiguous(memory_format=torch.channels_last))
        margins = blank_margins(x)
        inside = F.pad(x, [-4 * margin for margin in margins])
        a = self.encoder(inside.contiguous(memory_format=torch.channels_last))
        return F.pad(a, margins)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 1, H, W) -> index maps (B, h, w) int64."""
        return self.in_parts(self.encode_some, x)

    def encode_some(self, x: Tensor) -> Tensor:
        a = self.encoded(x)                                               # (B, A, h, w)
        flat = cells(a.float())                                           # (N, A)
        if not torch.isfinite(flat).all():  # the argmin of NaN would be code 0, a fine picture
            raise FloatingPointError("the encoder's output is not finite")
        weight, bias = self.pre_vq.weight.flatten(1), self.pre_vq.bias
        return self.quantizer.search(flat, weight, bias).view(len(x), *a.shape[2:])

    def decode(self, indices: Tensor) -> Tensor:
        """Index maps (B, h, w) int64 -> images (B, 1, 4h, 4w) float32, clipped to [0,1]."""
        return self.in_parts(self.decode_some, indices)

    def decode_some(self, indices: Tensor) -> Tensor:
        images = self.decode_raw(indices)                                 # (B, 1, 4h, 4w)
        if not torch.isfinite(images).all():
            raise FloatingPointError("the decoder's output is not finite")
        return images.clamp(0, 1)

    def in_parts(self, function, x: Tensor) -> Tensor:
        """function(x), a few rows at a time, on the weights' device; it ends up where x is."""
        device = self.quantizer.codebook.device
        few = 16 if device.type == "cpu" else 128  # what a CPU's cache holds
        return torch.cat([function(part.to(device)).to(x.device) for part in x.split(few)])

    def decode_raw(self, indices: Tensor) -> Tensor:
        """The same, neither clipped nor checked: for training."""
        embedding = F.embedding(indices, self.quantizer.codebook)         # (B, h, w, D)
        return self.decoder(embedding.permute(0, 3, 1, 2)).float()        # (B, 1, 4h, 4w)


@torch.no_grad()
def blank_margins(x: Tensor) -> list[int]:
    """Cells left, right, above and below that see only 0 in all images (B, 1, H, W).

    None where nothing is seen at all. H and W are multiples of 4. A cell, 4x4 pixels, sees 3
    pixels more on each side: 1 by the first convolution, 2 by the second, at half the size.
    """
    seen = (x.amax((0, 1)) != 0) | (x.amin((0, 1)) != 0)                  # (H, W)
    margins = []
    for line in (seen.any(0), seen.any(1)):
        where = line.nonzero().flatten().tolist() or [0, len(line) - 1]
        blank = where[0], len(line) - 1 - where[-1]  # pixels before and after
        margins += [max(0, pixels - 3) // 4 for pixels in blank]
    return margins


def make_vqvae(config: Config, sharper: bool = False) -> VQVAE:
    """At its start. sharper: with the larger decoder of stage 3."""
    model = VQVAE(
        config.codes,
        config.code_dim,
        config.widths,
        config.upsampling,
        config.codebook,
    )
    # The original recipe keeps torch's own start, whose signals shrink from layer to layer.
    if config.codebook == "ema":
        model.apply(start_awake)
        model.decoder[-1].weight.data.mul_(0.1)  # dark pictures: the first steps raise filters
    return widen_decoder(model, config) if sharper else model


@torch.no_grad()
def widen_decoder(model: VQVAE, config: Config) -> VQVAE:
    """Give the model a larger decoder that draws the same, and so goes on from there.

    After Chen et al. 2016 (Net2Net, arXiv:1511.05641): its further channels start at random,
    but with weights of 0 in what reads them, and residual blocks add nothing at first.
    """
    widths = map(max, config.widths[2:], config.decoder_widths)
    wide = make_decoder(config.code_dim, *widths, config.residual_blocks, config.upsampling)
    wide.apply(start_awake)
    wide.to(model.quantizer.codebook.device, memory_format=torch.channels_last)
    old, new = ([m for m in d if isinstance(m, nn.Conv2d)] for d in (model.decoder, wide))
    for small, large in zip(old, new, strict=True):
        outs, ins = small.weight.shape[:2]
        large.weight[:outs, ins:] = 0
        large.weight[:outs, :ins] = small.weight
    model.decoder = wide
    return model


@torch.no_grad()
def start_awake(module: nn.Module):
    """He's start, each filter's sign chosen so that its weights have a positive sum.

    Slices and the outputs of ReLU are nowhere negative and these convolutions have no bias: a
    filter of negative sum rests at 0 almost everywhere and seldom wakes. With random signs
    half of the 8 channels before the quantiser were lost, which ones being up to the seed.
    A residual block adds nothing at first.
    """
    start_at_he(module)
    if isinstance(module, nn.Conv2d):
        module.weight.mul_(module.weight.sum((1, 2, 3), keepdim=True).sign())
    if isinstance(module, ResidualBlock):  # its convolutions have been started before it
        nn.init.zeros_(module.conv2.weight)


class PatchDiscriminator(nn.Module):
    """One logit for every 4x4 pixels, by the 30x30 about them: of a slice, or drawn?

    Isola et al. 2017, arXiv:1611.07004, section 3.2.2, smaller. It sees the image, and beside
    it the image minus its 5x5 mean, ten times as strong: what the two differ in.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )
        self.apply(start_at_he)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, H, W), H and W multiples of 4 -> logits (B, H/4, W/4)."""
        fine = x - F.avg_pool2d(x, 5, 1, 2)                               # (B, 1, H, W)
        seen = torch.cat([2 * x, 10 * fine], 1)                           # (B, 2, H, W)
        return self.layers(seen.contiguous(memory_format=torch.channels_last))[:, 0]


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of a code histogram (K,): how many codes are in use, effectively."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.xlogy(p, p).sum().item())


# --- code map: index maps <-> GAN space ---------------------------------------------------

MAP = (64, 64)  # cells of an index map
STEP, LEAST = 8, 32  # cells: a box's sides are multiples, and hold a window and a crop


def sides_about(cells: Tensor) -> tuple[slice, slice]:
    """Rows and columns of the smallest box about these cells (h, w) that networks can take."""
    sides = []
    for line in (cells.any(1), cells.any(0)):
        where, n = line.nonzero().flatten().tolist() or [0], len(line)
        length = where[-1] + 1 - where[0]
        length = min(n, max(LEAST, math.ceil(length / STEP) * STEP))
        start = (where[0] + where[-1] + 1 - length) // 2
        start = min(max(0, start), n - length)
        sides.append(slice(start, start + length))
    return tuple(sides)


class Box(nn.Module):
    """The box of cells that networks draw: outside of it all training maps are the same.

    Much of a slice is background about the head. Where every map of the training split has one
    and the same code nothing is to be learned, and a generated map has that code, too.
    """

    def __init__(self, common: Tensor | None = None):
        """common (h, w) int64: the code that all training maps have, -1 where they differ.

        None: the box is all of a map.
        """
        super().__init__()
        self.register_buffer("common", torch.full(MAP, -1) if common is None else common)
        self.rows, self.columns = sides_about(self.common < 0)
        self.size = tuple(side.stop - side.start for side in (self.rows, self.columns))

    def inside(self, maps: Tensor) -> Tensor:
        """The box of maps (B, h, w)."""
        return maps[:, self.rows, self.columns]

    def around(self, box: Tensor) -> Tensor:
        """The inverse, for maps like those of the training split."""
        maps = self.common.expand(len(box), -1, -1).clone()               # (B, h, w)
        maps[:, self.rows, self.columns] = box
        return maps


class CodeMap(nn.Module):
    """The used codes' places in the space that the DCGAN works in, and the way back.

    "coordinates": a code is its first C principal coordinates, scaled as one so that the first
    has unit variance over the training split; a generated cell becomes the nearest code. What
    is near is similar, in the codebook's own metric, and an index map is a smooth picture.
    "pc1", "raw": a code is the middle of one of U even bins of (-1, 1), ranked along principal
    component 1 or by its number (the original recipe, in which the map is noise: training
    numbers codes at random); binning goes back.
    """

    def __init__(self, used: Tensor, points: Tensor, codes: int, box: Box | None = None):
        """used (U,) int64: the used codes in their order; points (U, C): their places.

        box: what of a map is drawn, for those who crop before and fill up after.
        """
        super().__init__()
        self.box = box or Box()
        rank = torch.full((codes,), -1)
        rank[used] = torch.arange(len(used))
        self.register_buffer("used", used)
        self.register_buffer("points", points)
        self.register_buffer("rank", rank)                                # (K,), -1: never used
        self.even = torch.equal(points, even_middles(len(used)))

    @classmethod
    def fit(cls, codebook: Tensor, counts: Tensor, order: str, channels: int) -> "CodeMap":
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
            return cls(used, (y / sd.clamp_min(1e-9)).float(), len(codebook))
        return cls(used, even_middles(len(used)), len(codebook))

    def encode(self, indices: Tensor) -> Tensor:
        """Index maps (B, h, w) int64 -> (B, C, h, w) float32.

        Raises ValueError for a code that the training split never used.
        """
        if (self.rank[indices] < 0).any():
            raise ValueError("an index map holds a code that the code map has not seen")
        return self.places(indices)

    def places(self, indices: Tensor) -> Tensor:
        """The same of codes that are known to be used: nothing waits for the device."""
        ranks = self.rank[indices]                                        # (B, h, w)
        return F.embedding(ranks, self.points).permute(0, 3, 1, 2)        # (B, C, h, w)

    def spread(self, u: Tensor) -> Tensor:
        """Bins: (B, C, h, w) -> (B, 1, h, w), each sample over all of (-1, 1).

        As the original recipe does. Coordinates are left as they are.
        """
        if not self.even:
            return u
        u = u.mean(1, True)                                               # (B, 1, h, w)
        low, high = u.amin((2, 3), True), u.amax((2, 3), True)            # (B, 1, 1, 1)
        return (u - low) / (high - low).clamp_min(1e-12) * 2 - 1

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
        ranks = ((u + 1) * (U / 2)).floor().long().clamp(0, U - 1)        # +1: the last bin
        return self.used[ranks]                                           # (B, h, w)


def cells(x: Tensor) -> Tensor:
    """The cells of maps in rows: (B, C, h, w) -> (B*h*w, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def even_middles(bins: int) -> Tensor:
    """Middles (bins, 1) of even bins of (-1, 1)."""
    return ((torch.arange(bins) + 0.5) * (2 / bins) - 1)[:, None]


def nearest_row(x: Tensor, rows: Tensor) -> Tensor:
    """Index of the row of (U, C) nearest to each x (N, C), as |x|^2 matters to none: (N,)."""
    keys = torch.cat([rows.T, rows.square().sum(1)[None] / -2])           # (C + 1, U)
    x = F.pad(x, (0, 1), value=1.0)                                       # (N, C + 1)
    return torch.cat([best(part @ keys) for part in x.split(4096)])


def principal_coordinates(codebook: Tensor, counts: Tensor, components: int) -> Tensor:
    """Usage-weighted principal coordinates (U, components) of code vectors (U, D).

    The sign of each component is fixed by its largest loading, so that equal inputs give
    equal orders.
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

    An unknown level (NaN) gives zeros: the same networks, unconditional.
    """
    octaves = 2.0 ** torch.arange(-1, 3, device=level.device)             # 0.5 1 2 4
    angles = level[:, None] * math.pi * octaves                           # (B, 4)
    features = torch.cat([torch.ones_like(level)[:, None], angles.cos(), angles.sin()], 1)
    return features.nan_to_num(0.0) * level.isfinite()[:, None]           # (B, L)


class Generator(nn.Module):
    """DCGAN generator (Radford et al. 2016, arXiv:1511.06434, figure 1), Z -> maps of `size`.

    Of 64x64 as in the paper: 4x4, then twice as large four times. Else each layer draws what
    half of the next needs, rounded up, and what is too much is cut off: 56x48 begins with 4x3.
    classic: as in the paper. Else the slice level's features stand beside the noise, and one
    more layer works at full size: in the paper's last layer 4x4 neighbouring cells are a linear
    function of few numbers, and borders between tissues stay soft.
    bounded: tanh at the end, as in the paper; without it any number may come out.
    contrast: the gain of `raise_contrast` that `draw` applies to its output; 0 until set.
    """

    def __init__(
        self, noise_dim: int, width: int, channels: int, classic: bool, bounded: bool, size=MAP
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
            up = UpTo(ins, out, sizes[i], bias=False) if i else FromOne(ins, out, sizes[0])
            layers += [up, nn.BatchNorm2d(out), nn.ReLU()]
            ins = out
        last = UpTo(ins, channels, size) if classic else nn.Conv2d(ins, channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, last, *[nn.Tanh()] * bounded)
        self.register_buffer("contrast", torch.zeros(()))
        self.apply(start_at_002)
        self.to(memory_format=torch.channels_last)

    def forward(self, noise: Tensor, level: Tensor) -> Tensor:
        """noise (B, Z), level (B,) in [0,1] or NaN -> (B, C, h, w), bounded: in [-1, 1]."""
        if self.conditional:
            noise = torch.cat([noise, level_features(level)], 1)          # (B, Z + L)
        return self.layers(noise[:, :, None, None])                       # (B, C, h, w)


class FromOne(nn.ConvTranspose2d):
    """The transposed convolution of one cell (B, ins, 1, 1), without bias: a product."""

    def __init__(self, ins: int, outs: int, size: tuple[int, int]):
        super().__init__(ins, outs, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.permute(0, 2, 3, 1)                          # (ins, h, w, outs)
        y = x.flatten(1) @ weight.flatten(1)                              # (B, h*w*outs)
        return y.view(len(x), *weight.shape[1:]).permute(0, 3, 1, 2)      # (B, outs, h, w)


class UpTo(nn.ConvTranspose2d):
    """The transposed convolution that doubles both sides, and the first `size` of its cells."""

    def __init__(self, ins: int, outs: int, size: tuple[int, int], bias: bool = True):
        super().__init__(ins, outs, 4, 2, 1, bias=bias)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.size
        return super().forward(x)[:, :, :h, :w]                           # (B, outs, h, w)


def raise_contrast(u: Tensor, gain: Tensor) -> Tensor:
    """u (B, C, h, w) + gain * (u - its 3x3 mean): what is flat stays flat."""
    return u + gain * (u - F.avg_pool2d(u, 3, 1, 1, count_include_pad=False))


class Discriminator(nn.Module):
    """DCGAN discriminator, maps of `size`, sides multiples of 8 -> one number (a logit).

    batch_norm True: as in the paper. False: no normalisation (one sample's score, and the
    gradient penalty on it, must not depend on the others), and a projection on the slice level
    (Miyato and Koyama 2018, arXiv:1802.05637, eq. 3): one last layer per level feature.
    """

    def __init__(self, width: int, channels: int, batch_norm: bool, size=MAP):
        super().__init__()
        self.conditional = not batch_norm
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for ins in (width, 2 * width, 4 * width):
            layers.append(nn.Conv2d(ins, 2 * ins, 4, 2, 1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(2 * ins)] * batch_norm + [nn.LeakyReLU(0.2)]
        outs = 1 + LEVEL_FEATURES * self.conditional
        left = tuple(side // 16 for side in size)  # cells, after four halvings
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, outs, left))
        self.apply(start_at_002 if batch_norm else start_at_he)
        self.to(memory_format=torch.channels_last)

    def forward(self, u: Tensor, level: Tensor) -> Tensor:
        """u (B, C, h, w), level (B,) -> logits (B,)."""
        scores = self.layers(u.contiguous(memory_format=torch.channels_last)).flatten(1)
        if not self.conditional:
            return scores[:, 0]                                           # (B,)
        return scores[:, 0] + (scores[:, 1:] * level_features(level)).sum(1)


def make_generator(config: Config, size=MAP) -> Generator:
    classic, bounded = config.gan_loss == "bce", config.order != "coordinates"
    width, channels = config.gan_widths[0], config.map_channels
    return Generator(config.noise_dim, width, channels, classic, bounded, size)


def make_discriminator(config: Config, size=MAP) -> Discriminator:
    batch_norm = config.gan_loss == "bce"
    return Discriminator(config.gan_widths[1], config.map_channels, batch_norm, size)


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

    Huang et al. 2024 (R3GAN, arXiv:2501.05441, eq. 2; the pairing loss of Jolicoeur-Martineau
    2019, arXiv:1807.00734). D's step: better = real; G's step: better = generated.
    """
    return F.softplus(worse - better).mean()


def bce_loss(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of logits against one label (Goodfellow et al. 2014, 1406.2661)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def gradient_penalty(discriminator: nn.Module, u: Tensor, *given: Tensor) -> Tensor:
    """Squared norm (B,) of D's gradient at each u: R1 on real maps, R2 on generated ones.

    Mescheder et al. 2018, arXiv:1801.04406, eq. 9 and 10, there halved and weighted by gamma.
    given: what else D is told, its slice levels.
    """
    u = u.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(u, *given).sum(), u, create_graph=True)
    return gradient.square().sum((1, 2, 3))                               # (B,)


# --- denoiser -----------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Which codes a map held before noise was added, and their mean: D(x; sigma).

    The posterior of a cell's code is learned, not just its mean (as in Dieleman et al. 2022,
    arXiv:2211.15089, section 3): p(k | x) ~ exp(-|x - e_k|^2 / (2 sigma^2)) * exp(c_k). The
    first factor, what the noise lets a cell say of itself, is known; the network learns the
    second, what its neighbourhood says. So between codes it decides, where a network that
    learns the mean by its squared error hesitates, and blurs. Of Karras et al. 2022
    (arXiv:2206.00364): the noise, and the scale of the network's input (table 1, sigma_data 1).
    It judges cells by their neighbours, which a discriminator of whole maps hardly does. It is
    told neither slice level nor place: where things lie is the generator's business.

    A code is to it what it is to a `CodeMap` of coordinates, whatever the DCGAN draws; x is in
    units of `sd`, their standard deviation.
    """

    LEAST, MOST = 0.5, 4.0  # sigma: noise that it learns from
    STEPS = 4  # passes that take away the most of it, which a map is given
    FAR = 1e3  # where codes lie that training never used: out of reach

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.channels = channels
        self.register_buffer("sd", torch.ones(()))
        self.register_buffer("points", torch.zeros(codes, channels))      # e, in units of sd
        w, E = 32, 32
        self.register_buffer("octaves", 2.0 ** torch.linspace(-1, 3, 8), persistent=False)
        self.embed = nn.Sequential(nn.Linear(16, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.first = nn.Conv2d(channels, w, 3, padding=1)
        down, up = nn.Conv2d, nn.ConvTranspose2d
        self.down = nn.ModuleList([down(w, 2 * w, 4, 2, 1), down(2 * w, 2 * w, 4, 2, 1)])
        self.up = nn.ModuleList([up(2 * w, 2 * w, 4, 2, 1), up(2 * w, w, 4, 2, 1)])
        widths = (w, 2 * w, 2 * w, 2 * w, 2 * w, w)
        self.blocks = nn.ModuleList([NoisyBlock(width, E) for width in widths])
        self.head = nn.Linear(w, codes)
        nn.init.zeros_(self.head.weight)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def fit(self, code_map: CodeMap, counts: Tensor):
        """Take places and shares of codes from a map of coordinates and a histogram (K,)."""
        used, points = code_map.used, code_map.points                     # (U,), (U, C)
        share = (counts[used] / counts.sum()).to(points)                  # (U,)
        variance = share @ points.square()                                # (C,): the mean is 0
        self.sd.copy_(variance.mean().sqrt().clamp_min(1e-6))
        self.points.fill_(self.FAR)
        self.points.index_copy_(0, used, points / self.sd)
        self.head.bias[used] = share.log()  # as if a cell had no neighbours

    def features(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What is about each cell of x (B, C, h, w), with noise of sigma (B,): (B, w, h, w)."""
        angles = sigma.log()[:, None] * self.octaves * (math.pi / 4)      # (B, 8)
        e = self.embed(torch.cat([angles.sin(), angles.cos()], 1))        # (B, E)
        size = (1 + sigma.square()).sqrt()[:, None, None, None]           # of x
        full = self.blocks[0](self.first(x / size), e)                    # (B, w, h, w)
        half = self.blocks[1](self.down[0](full), e)                      # (B, 2w, h/2, w/2)
        y = self.blocks[3](self.blocks[2](self.down[1](half), e), e)      # (B, 2w, h/4, w/4)
        y = self.blocks[4](self.up[0](y) + half, e)
        return F.silu(self.blocks[5](self.up[1](y) + full, e))

    def factors(self, features: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of cells (N, w + C + 2) and of codes (K, w + C + 2), float32.

        Their product (N, K) is log p(code | x) but for a constant, the logits. Cells lie in the
        rows of features (N, w), x (N, C) and sigma (N, 1).
        """
        precision, one = 1 / sigma.square(), torch.ones_like(sigma)
        squares = self.points.square().sum(1, keepdim=True)               # (K, 1)
        seen = torch.cat([features.float(), one, x * precision, precision], 1)
        head = self.head.weight, self.head.bias[:, None]
        return seen, torch.cat([*head, self.points, squares / -2], 1)

    def of_cells(self, x: Tensor, sigma: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """`rule` of the logits (N, K) of the cells of x (B, C, h, w): (B*h*w, ...)."""
        each = sigma.repeat_interleave(x.shape[2] * x.shape[3])[:, None]  # (B*h*w, 1)
        features = cells(self.features(x, sigma))                         # (B*h*w, w)
        with torch.autocast(x.device.type, enabled=False):  # |x - e|^2 / sigma^2 is large
            seen, keys = self.factors(features, cells(x), each)
            return torch.cat([rule(F.linear(part, keys)) for part in seen.split(1024)])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B, C, h, w), h and w multiples of 4, with noise of sigma (B,): without it."""
        table = F.pad(self.points, (0, 1), value=1.0).T.contiguous()      # (C + 1, K)

        def mean(logits: Tensor) -> Tensor:
            # What is nearly impossible is at e^-80: below, a processor counts slowly, unless
            # it was asked not to, as scripts do.
            logits = logits.sub_(logits.amax(1, keepdim=True)).clamp_min_(-80)
            sums = F.linear(logits.exp_(), table)  # of e by p(e | x), and of p(e | x)
            return sums[:, :-1] / sums[:, -1:]

        B, C, h, w = x.shape
        return self.of_cells(x, sigma, mean).view(B, h, w, C).permute(0, 3, 1, 2)

    def places(self, maps: Tensor) -> Tensor:
        """Index maps (B, h, w) -> x (B, C, h, w)."""
        return F.embedding(maps, self.points).permute(0, 3, 1, 2)

    def restore(self, x: Tensor, noise: Tensor) -> Tensor:
        """Generated x (n, C, h, w) -> index maps (n, h, w), whose cells fit together.

        As SDEdit (Meng et al. 2022, arXiv:2108.01073): enough noise to drown what is wrong,
        then down to none by a multistep method (DPM-Solver++ of Lu et al. 2022,
        arXiv:2211.01095, algorithm 2): D is taken to go on changing as it did in the step
        before, linearly in log sigma, and the equation of that D is solved exactly. At the
        least noise that it knows, each cell becomes its most probable code.
        noise: (n, C, h, w), white, of unit variance. Raises FloatingPointError if x or
        what all passes but the last make of it is not finite.
        """
        x = x + self.MOST * noise
        rho = 2  # as in eq. 5 of Karras et al., whose 7 takes longer steps first
        ends = self.MOST ** (1 / rho), self.LEAST ** (1 / rho)
        sigmas = (torch.linspace(*ends, self.STEPS) ** rho).tolist()
        before, back = None, 0.0  # D in the step before, and that step's length in log sigma
        for now, then in pairwise(sigmas):
            clean, step = self(x, x.new_full((len(x),), now)), math.log(now / then)
            change = 0 if before is None else (clean - before) / back
            ahead = clean + change * (step / (1 - then / now) - 1)
            x = ahead + (x - ahead) * (then / now)
            before, back = clean, step
        if not torch.isfinite(x).all():
            raise FloatingPointError("the denoiser's input or output is not finite")
        last = x.new_full((len(x),), self.LEAST)
        return self.of_cells(x, last, best).view(len(x), *x.shape[2:])


def grain_of(z: Tensor, *shape: int) -> Tensor:
    """White noise (n, *shape) of unit variance that is a linear function of z (n, Z) / |z|.

    With it a restored sample is still a function of its z, and a smooth one; noise of
    independent z is independent.
    """
    basis = _grain(z.shape[1], *shape).to(z.device)                       # (Z, *shape)
    return torch.einsum("nz,z...->n...", F.normalize(z), basis)           # (n, *shape)


@functools.lru_cache(maxsize=1)
def _grain(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator_of(GRAIN))


class NoisyBlock(nn.Module):
    """A residual block that knows how much noise there is; at its start, the identity.

    Each cell is normalised over its channels (Ba et al. 2016, arXiv:1607.06450). Statistics
    over a map are not those of the crops that it learns from: less of a crop is background.
    """

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.noise = nn.Linear(embedding, 2 * width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        gain, shift = self.noise(e)[:, :, None, None].chunk(2, 1)         # (B, width, 1, 1)
        y = self.first(F.silu(x)).permute(0, 2, 3, 1)                     # (B, h, w, width)
        y = F.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2) * (1 + gain) + shift
        return x + self.last(F.silu(y))


def denoising_loss(
    denoiser: Denoiser, maps: Tensor, noise: Tensor, sigma: Tensor, start=(0, 0)
) -> Tensor:
    """Nats (B,) a cell by which the codes of real maps (B, h, w) surprise, seen through noise.

    The cross-entropy of Dieleman et al. 2022, section 3. noise (B, C, h, w), white; sigma (B,).
    Every second cell each way counts, from `start` on: neighbours teach nearly the same, and
    512 codes for every cell would cost as much as the network.
    """
    x = denoiser.places(maps) + sigma[:, None, None, None] * noise        # (B, C, h, w)
    some = (slice(None), slice(start[0], None, 2), slice(start[1], None, 2))
    features = denoiser.features(x, sigma).permute(0, 2, 3, 1)[some]      # (B, h/2, w/2, w)
    codes, x = maps[some].flatten(1), x.permute(0, 2, 3, 1)[some]
    with torch.autocast(x.device.type, enabled=False):
        each = sigma.repeat_interleave(codes.shape[1])[:, None]           # (N, 1)
        logits = F.linear(*denoiser.factors(features.flatten(0, 2), x.flatten(0, 2), each))
        surprise = F.cross_entropy(logits, codes.flatten(), reduction="none")
    return surprise.view_as(codes).mean(1)


def make_denoiser(config: Config) -> Denoiser:
    channels = config.map_channels if config.order == "coordinates" else Config.map_channels
    return Denoiser(config.codes, channels)


# --- generation ---------------------------------------------------------------------------


def generator_of(*path: int) -> torch.Generator:
    """A random generator that is a function of (seed, purpose, step, ...) and nothing else.

    With it, continuing a run needs no saved random state, and sample s is the same picture in
    any batch and on any number of processes.
    """
    # The 1 at the end: a seed sequence takes (s,) and (s, 0) for the same.
    state = np.random.SeedSequence((*path, 1)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


SAMPLE, GRAIN = 1000, 1001  # the purposes of generators: a sample's noise; the denoiser's
DRAW_BATCH = 16  # samples are drawn in batches of exactly this size


def noise_of(
    samples: range, noise_dim: int, seed: int, levels: Tensor, purpose: int = SAMPLE
) -> tuple[Tensor, Tensor]:
    """Noise (n, Z) and a level (n,) from the table `levels`; row s depends on (seed, s) alone.

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
def draw(
    generator: Generator,
    code_map: CodeMap,
    vqvae: VQVAE,
    noise: Tensor,
    level: Tensor,
    stretch: bool = False,
    decode: bool = True,
    denoiser: Denoiser | None = None,
    autocast: AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Noise (n, Z) and level (n,) -> index maps (n, h, w) int64, images (n, 1, H, W) or None.

    float32 but for the denoiser's passes, which are under `autocast`; in batches of one size,
    the last one filled up: the processor sums a batch of another size in another order, and a
    value at the edge of a bin would change its code.
    """
    maps, images = [], []
    for z, where in zip(noise.split(DRAW_BATCH), level.split(DRAW_BATCH), strict=True):
        n = len(z)
        z = F.pad(z, (0, 0, 0, DRAW_BATCH - n)).to(code_map.used.device)  # (16, Z)
        where = F.pad(where, (0, DRAW_BATCH - n)).to(z.device)            # (16,)
        u = raise_contrast(generator(z, where), generator.contrast)       # (16, C, h, w)
        if stretch:
            u = code_map.spread(u)
        if denoiser is None:
            indices = code_map.decode(u)                                  # (16, h, w)
        else:  # it sees coordinates: of bins, those of the codes that they stand for
            bins = code_map.even
            x = denoiser.places(code_map.decode(u)) if bins else u / denoiser.sd
            with autocast or nullcontext():
                indices = denoiser.restore(x, grain_of(z, *x.shape[1:]))
        indices = code_map.box.around(indices)                          # (16, H/4, W/4)
        maps.append(indices[:n].cpu())
        if decode:
            images.append(vqvae.decode(indices)[:n].cpu())                # (n, 1, H, W)
    return torch.cat(maps), torch.cat(images) if decode else None


# --- the tables of the README -------------------------------------------------------------


def architecture_rows(model: VQVAE) -> list[tuple[str, ...]]:
    """One row per layer, as the README shows them, from a pass of nothing through `model`."""
    rows, hooks = [], []

    def shape(x: Tensor) -> str:
        return "(" + " x ".join(str(n) for n in x.shape[1:]) + ")"

    def record(module, inputs, output):
        x = inputs[0]
        if isinstance(module, nn.ReLU):
            last = max(i for i, row in enumerate(rows) if row[0] == "Conv2d")
            rows[last] = (rows[last][0] + " + ReLU", *rows[last][1:])
        elif isinstance(module, nn.MaxPool2d):
            rows.append(("Max2D Pool", "-", "2", "-", "-", shape(x), shape(output)))
        elif isinstance(module, Quantizer):
            z, projection = output.embedding, inputs[1]
            pre_vq = (str(projection.out_channels), "1", "1", "0", shape(x), shape(z))
            rows.append(("Pre_VQ Conv2d", *pre_vq))
            rows.append(("Vector Quantized", *"----", shape(z), shape(output.indices[:, None])))
        elif isinstance(module, nn.Conv2d):
            if isinstance(module, UpsampleConv):
                up = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                rows.append(("Upsampling", "-", "2", "-", "-", shape(x), shape(up)))
                x = up
            numbers = (module.out_channels, module.kernel_size[0], module.stride[0])
            padding = module.padding[0]
            rows.append(("Conv2d", *map(str, numbers), str(padding), shape(x), shape(output)))

    for module in model.modules():
        hooks.append(module.register_forward_hook(record))
    model(torch.zeros(1, 1, 256, 256))
    for hook in hooks:
        hook.remove()
    rows[-1] = ("Final Conv2d", *rows[-1][1:])
    return rows


def architecture_table(model: VQVAE) -> str:
    """The rows above as a Markdown table."""
    head = ("Layer", "Filters", "Kernel", "Stride", "Padding", "Input Shape", "Output Shape")
    lines = [head, (":---:",) * len(head), *architecture_rows(model)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
