"""Stage 5: a denoiser of index maps.

In: the index maps of stage 2. Out: `denoiser_best.pt`. A discriminator of whole maps hardly
judges single cells, so many single cells of a generated map are wrong. The denoiser learns from
real maps which codes fit together, and corrects generated maps: noise is added, then removed.
`denoiser_kimg = 0` skips this stage.
"""

import copy
import functools
import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from dataset import evenly
from modules import LEVEL_FEATURES, CodeMap, best, cells, generator_of, level_features
from stages.index_maps import RealMaps, trained_vqvae
from stages.stage import DENOISE, Run, Stage, batch_rows, seeded, update_average
from support import device, distributed
from support.muon import Muon

GRAIN = 1001  # purpose number of `generator_of`: `grain_of`
PLACE_FEATURES = 12  # P: cosine and sine in three octaves, of rows and of columns

# --- network ------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Probabilities of the codes that a noisy map held, and their mean D(x; sigma).

    It learns the posterior of each cell's code (Dieleman et al. 2022, arXiv:2211.15089, section
    3): p(k | x) ~ exp(-|x - e_k|^2 / (2 sigma^2)) * exp(c_k). The first factor depends on the
    cell alone and is known. The network learns c_k from the neighbours. So the network chooses
    between codes; one that learns the mean by squared error blurs. Noise and input scale are
    those of Karras et al. 2022 (arXiv:2206.00364, table 1, sigma_data 1). It also gets the
    slice level and each cell's place in the map.

    The network is a UNet of four resolutions. At the lowest, each cell also gets a function of
    the mean over the map: convolutions alone do not carry brightness across a whole map.

    Codes are points of a `CodeMap` of coordinates, whatever the DCGAN draws. x is in units of
    `sd`, their standard deviation. Dimensions: as in modules; w width, E embedding, P
    `place_features`.
    """

    LEAST, MOST = 0.5, 5.0  # sigma in training
    STEPS = 4  # passes that remove the noise from a generated map
    KEPT = 4  # sides of the squares of cells whose means `restore` keeps; 0: none
    FAR = 1e3  # place of codes that training never used: out of reach

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.channels = channels
        self.register_buffer("sd", torch.ones(()))
        self.register_buffer("points", torch.zeros(codes, channels))  # e, in units of sd
        w, E = 32, 32
        self.register_buffer("octaves", 2.0 ** torch.linspace(-1, 3, 8), persistent=False)
        ins = 16 + LEVEL_FEATURES
        self.embed = nn.Sequential(nn.Linear(ins, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.first = nn.Conv2d(channels + PLACE_FEATURES, w, 3, padding=1)
        widths = (w, 2 * w, 2 * w, 4 * w)  # at h, h/2, h/4, h/8
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for wide, narrow in pairwise(reversed(widths)):
            self.down.insert(0, nn.Conv2d(narrow, wide, 4, 2, 1))
            self.up.append(nn.ConvTranspose2d(wide, narrow, 4, 2, 1))
        self.mean = nn.Linear(widths[-1], widths[-1])
        self.blocks = nn.ModuleList(NoisyBlock(n, E) for n in (*widths, *reversed(widths)))
        self.head = nn.Linear(w, codes)
        for weights in (self.mean.weight, self.mean.bias, self.head.weight):
            nn.init.zeros_(weights)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def fit(self, code_map: CodeMap, counts: Tensor):
        """Set places and shares of codes from a map of coordinates and a histogram (K,)."""
        used, points = code_map.used, code_map.points  # (U,), (U, C)
        share = (counts[used] / counts.sum()).to(points)  # (U,)
        variance = share @ points.square()  # (C,): the mean is 0
        self.sd.copy_(variance.mean().sqrt().clamp_min(1e-6))
        self.points.fill_(self.FAR)
        self.points.index_copy_(0, used, points / self.sd)
        self.head.bias[used] = share.log()  # the prior without neighbours

    def sigmas(self, share: Tensor) -> Tensor:
        """Strengths of noise (n,), from shares (n,) in [0, 1) of their range on a log scale."""
        return self.LEAST * (self.MOST / self.LEAST) ** share

    def features(self, x: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        """Features (B, w, h, w) of each cell's surroundings.

        x (B, C, h, w), h and w multiples of 8; its noise sigma (B,), slice level (B,).
        """
        angles = sigma.log()[:, None] * self.octaves * (math.pi / 4)  # (B, 8)
        known = angles.sin(), angles.cos(), level_features(level)
        e = self.embed(torch.cat(known, 1))  # (B, E)
        size = (1 + sigma.square()).sqrt()[:, None, None, None]  # sd of x
        place = place_features(*x.shape[2:], x.device).expand(len(x), -1, -1, -1)
        x = torch.cat([x / size, place], 1).contiguous(memory_format=torch.channels_last)
        n, passed = len(self.down), []
        y = self.blocks[0](self.first(x), e)  # (B, w, h, w)
        for down, block in zip(self.down, self.blocks[1 : n + 1], strict=True):
            passed.append(y)
            y = block(down(y), e)  # at last (B, 4w, h/8, w/8)
        y = y + self.mean(F.silu(y).mean((2, 3)))[:, :, None, None]
        y = self.blocks[n + 1](y, e)
        for up, block in zip(self.up, self.blocks[n + 2 :], strict=True):
            y = block(up(y) + passed.pop(), e)
        return F.silu(y)

    def factors(self, features: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors, of cells (N, w + C + 2) and of codes (K, w + C + 2), float32.

        Their product (N, K) is log p(code | x) up to a constant: the logits. Cells are the rows
        of features (N, w), x (N, C) and sigma (N, 1).
        """
        precision, one = 1 / sigma.square(), torch.ones_like(sigma)
        squares = self.points.square().sum(1, keepdim=True)  # (K, 1)
        of_cells = torch.cat([features.float(), one, x * precision, precision], 1)
        head = self.head.weight, self.head.bias[:, None]
        return of_cells, torch.cat([*head, self.points, squares / -2], 1)

    def of_cells(self, rule: Callable, x: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        """`rule` of the logits (N, K) of all cells of x (B, C, h, w): (B*h*w, ...)."""
        each = sigma.repeat_interleave(x.shape[2] * x.shape[3])[:, None]  # (B*h*w, 1)
        features = cells(self.features(x, sigma, level))  # (B*h*w, w)
        with torch.autocast(x.device.type, enabled=False):  # |x - e|^2 / sigma^2 is large
            left, right = self.factors(features, cells(x), each)
            return torch.cat([rule(F.linear(part, right)) for part in left.split(1024)])

    def forward(self, x: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        """Remove noise of sigma (B,) from x (B, C, h, w), h and w multiples of 8."""
        table = F.pad(self.points, (0, 1), value=1.0).T.contiguous()  # (C + 1, K)

        def mean(logits: Tensor) -> Tensor:
            # At least e^-80: safely above denormal numbers, which make processors slow.
            logits = logits.sub_(logits.amax(1, keepdim=True)).clamp_min_(-80)
            sums = F.linear(logits.exp_(), table)  # of e p(e | x), and of p(e | x)
            return sums[:, :-1] / sums[:, -1:]

        B, C, h, w = x.shape
        mean_of_each = self.of_cells(mean, x, sigma, level)  # (B*h*w, C)
        return mean_of_each.view(B, h, w, C).permute(0, 3, 1, 2)

    def places(self, maps: Tensor) -> Tensor:
        """Index maps (B, h, w) -> x (B, C, h, w)."""
        return F.embedding(maps, self.points).permute(0, 3, 1, 2)

    def restore(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Generated x (n, C, h, w) -> index maps (n, h, w) whose cells fit together.

        As SDEdit (Meng et al. 2022, arXiv:2108.01073): add enough noise to hide what is wrong,
        then remove it by a multistep method. It extrapolates D(x; sigma) from the step before,
        linearly in log sigma, and solves the diffusion ODE for it exactly (DPM-Solver++ of Lu
        et al. 2022, arXiv:2211.01095, algorithm 2, approximates that integral). At the smallest
        sigma of training, each cell becomes its most probable code.

        So much noise also moves the layout, which the generator draws better. So each pass but
        the last replaces the means of D over squares of cells by those of the generated map, as
        in ILVR (Choi et al. 2021, arXiv:2108.02938, algorithm 1; there in x, not in D).

        noise (n, C, h, w): white, of unit variance. Raises FloatingPointError if x, or the
        result of a pass but the last, is not finite.
        """
        generated, x = x, x + self.MOST * noise
        rho = 2  # as in eq. 5 of Karras et al.; their 7 takes longer steps first
        ends = self.MOST ** (1 / rho), self.LEAST ** (1 / rho)
        sigmas = (torch.linspace(*ends, self.STEPS) ** rho).tolist()
        before, back = None, 0.0  # D in the step before, and that step's length in log sigma
        for now, then in pairwise(sigmas):
            clean = self(x, x.new_full((len(x),), now), level)
            if self.KEPT:
                moved = F.avg_pool2d(generated - clean, self.KEPT)
                clean = clean + F.interpolate(moved, scale_factor=self.KEPT, mode="bilinear")
            step = math.log(now / then)
            change = 0 if before is None else (clean - before) / back
            ahead = clean + change * (step / (1 - then / now) - 1)
            x = ahead + (x - ahead) * (then / now)
            before, back = clean, step
        if not torch.isfinite(x).all():
            raise FloatingPointError("the denoiser's input or output is not finite")
        last = x.new_full((len(x),), self.LEAST)
        return self.of_cells(best, x, last, level).view(len(x), *x.shape[2:])

    def restorer(self, code_map: CodeMap, autocast=None) -> Callable:
        """`restore` for `modules.draw_maps`: of the generator's output, its noise and level."""

        def restore(u: Tensor, z: Tensor, level: Tensor) -> Tensor:
            x = self.places(code_map.decode(u)) if code_map.even else u / self.sd
            grain = grain_of(z, *x.shape[1:])
            with autocast() if autocast else torch.autocast(u.device.type, enabled=False):
                return self.restore(x, grain, level)

        return restore


class NoisyBlock(nn.Module):
    """A residual block conditioned on noise and slice level. At its start, the identity.

    Each cell is normalised over its channels (Ba et al. 2016, arXiv:1607.06450).
    """

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.noise = nn.Linear(embedding, 2 * width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (B, width, h, w), e (B, E) -> (B, width, h, w)."""
        gain, shift = self.noise(e)[:, :, None, None].chunk(2, 1)  # (B, width, 1, 1)
        y = self.first(F.silu(x)).permute(0, 2, 3, 1)  # (B, h, w, width)
        y = F.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2) * (1 + gain) + shift
        return x + self.last(F.silu(y))


def place_features(h: int, w: int, device) -> Tensor:
    """Cosine and sine, in three octaves, of the cells' rows and columns: (P, h, w)."""
    octaves = math.pi * 2.0 ** torch.arange(3, device=device)[:, None]
    sides = []
    for n in (h, w):
        angles = torch.arange(n, device=device) / n * octaves  # (3, n)
        sides.append(torch.cat([angles.cos(), angles.sin()]))  # (6, n)
    rows, columns = sides
    return torch.cat([rows[:, :, None].expand(-1, -1, w), columns[:, None].expand(-1, h, -1)])


def grain_of(z: Tensor, *shape: int) -> Tensor:
    """Noise (n, *shape) of unit variance, white in each row, linear in z (n, Z) / |z|.

    So a restored sample is a smooth function of its z.
    """
    basis = _grain(z.shape[1], *shape).to(z.device)  # (Z, *shape)
    return torch.einsum("nz,z...->n...", F.normalize(z), basis)  # (n, *shape)


@functools.lru_cache(maxsize=1)
def _grain(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator_of(GRAIN))


def denoising_loss(
    denoiser: Denoiser, maps: Tensor, noise: Tensor, sigma: Tensor, level: Tensor, start=(0, 0)
) -> Tensor:
    """Cross-entropy (B,) in nats a cell of real maps (B, h, w), given their noisy version.

    Dieleman et al. 2022, section 3. noise (B, C, h, w), white; sigma (B,); slice level (B,).
    Every second cell each way counts, from `start` on: neighbours teach nearly the same, and
    the logits of all cells would cost as much as the network.
    """
    x = denoiser.places(maps) + sigma[:, None, None, None] * noise  # (B, C, h, w)
    some = (slice(None), slice(start[0], None, 2), slice(start[1], None, 2))
    features = denoiser.features(x, sigma, level).permute(0, 2, 3, 1)[some]  # (B, h/2, w/2, w)
    codes, x = maps[some].flatten(1), x.permute(0, 2, 3, 1)[some]
    with torch.autocast(x.device.type, enabled=False):
        each = sigma.repeat_interleave(codes.shape[1])[:, None]  # (N, 1)
        logits = F.linear(*denoiser.factors(features.flatten(0, 2), x.flatten(0, 2), each))
        surprise = F.cross_entropy(logits, codes.flatten(), reduction="none")
    return surprise.view_as(codes).mean(1)


def make_denoiser(config: Config) -> Denoiser:
    channels = config.map_channels if config.order == "coordinates" else Config.map_channels
    return Denoiser(config.codes, channels)


# --- training -----------------------------------------------------------------------------


def train_denoiser(run: Run):
    """Train on real maps until `denoiser_kimg`.

    `denoiser_best.pt` holds the averaged weights of least validation loss.
    """
    config, real = run.config, RealMaps(run)
    denoiser = seeded(run.seed, 3, lambda: make_denoiser(config)).to(run.device)
    code_map = real.code_map
    if code_map.even:  # bins; the denoiser needs coordinates
        codebook = trained_vqvae(run).quantizer.codebook.cpu()
        code_map = CodeMap.fit(codebook, real.counts, "coordinates", denoiser.channels)
    denoiser.fit(code_map.to(run.device), real.counts.to(run.device))
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    muon = Muon(denoiser, config.denoiser_lr, betas=(0.9, 0.99))
    parts = {"denoiser": denoiser, "average": average, "muon": muon}
    stage = Stage(run, "denoiser", parts, **real.link)
    step = device.Recorded(functools.partial(denoiser_step, denoiser, muon, config))
    while not stage.done:
        lr = stage.lr(config.denoiser_lr)
        device.set_lr(lr, muon)
        batch, start = denoiser_batch(denoiser, real, stage)
        loss = step(*batch, start=start)
        half_life = min(1000 * config.denoiser_ema_kimg, 0.1 * stage.nimg)
        update_average(average, denoiser, half_life, stage.batch_size)
        stage.after_step({"loss": loss}, lambda: measure_denoiser(average, real, stage), lr)
    stage.progress.close()


def denoiser_batch(denoiser: Denoiser, real: RealMaps, stage: Stage) -> tuple[tuple, tuple]:
    """Inputs of `denoising_loss`: real maps, noise, sigma and level; and its start."""
    run, n = stage.run, stage.batch_size
    mine, draw = distributed.share(n), generator_of(run.seed, DENOISE, stage.step)
    crop, chosen = real.code_map.crop, batch_rows(stage)
    maps = crop.cut(real.real_maps(run.data.train.rows[chosen]))  # (B, h, w)
    noise = torch.randn((n, denoiser.channels, *crop.size), generator=draw)[mine]
    sigma = denoiser.sigmas(torch.rand(n, generator=draw)[mine])
    start = torch.randint(2, (2,), generator=draw).tolist()
    rest = (device.sent(x, run.device) for x in (noise, sigma, real.levels[chosen]))
    return (maps, *rest), tuple(start)


def denoiser_step(
    denoiser: Denoiser, optimizer, config, *batch: Tensor, start: tuple[int, int]
) -> Tensor:
    """One step on a `denoiser_batch` -> the loss, ()."""
    with device.autocast(batch[0].device, config.precision):
        loss = denoising_loss(denoiser, *batch, start=start).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = loss.detach()
    distributed.average_gradients(denoiser, loss)
    optimizer.step()
    return loss


@torch.no_grad()
def measure_denoiser(average: Denoiser, real: RealMaps, stage: Stage) -> dict:
    """Loss on validation maps, ten times in a training; keeps the average's best weights."""
    if not stage.due(10):
        return {}
    validation, code_map = stage.run.data.validation, real.code_map
    rows = evenly(len(validation), 64)
    maps = code_map.crop.cut(real.real_maps(validation.rows[rows]))
    # A code that training never used has no place: a fixed other one replaces it.
    maps = torch.where(code_map.rank[maps] < 0, code_map.used[0], maps)
    draw = generator_of(stage.run.seed, DENOISE)
    noise = torch.randn((len(rows), average.channels, *maps.shape[1:]), generator=draw)
    sigma = average.sigmas(torch.linspace(0, 1, len(rows)))
    level = real.told(validation.levels[rows])

    def losses(*inputs: Tensor) -> Tensor:
        parts = zip(*(x.to(maps.device).split(32) for x in inputs), strict=True)
        return torch.cat([denoising_loss(average, *part) for part in parts])

    each = distributed.in_shares(losses, maps, noise, sigma, level)
    loss = distributed.first(lambda: each.mean().item())
    stage.offer(loss, denoiser=average)
    return {"loss_validation": loss}
