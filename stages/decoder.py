"""Stage 3: a sharper decoder, trained beside a discriminator of patches.

In: the VQ-VAE and the index maps of stages 1 and 2, which do not change. Out:
`decoder_best.pt`, the VQ-VAE with a larger decoder. The guess of a detail with the least mean
error is blurred; the discriminator teaches what slices look like (as in VQGAN: Esser et al.
2021, arXiv:2012.09841, section 3.1, there for the whole VQ-VAE). `decoder_kimg = 0` skips this
stage.
"""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modules
from config import Config
from dataset import PIXELS, evenly, unit_range
from modules import VQVAE, generator_of, start_at_he, start_awake
from stages.index_maps import RealMaps, trained_vqvae
from stages.losses import Loss, loss_of, random_corner
from stages.stage import SHARPEN, Feed, Run, Stage, batch_rows, likeness, seeded, update_average
from support import device, distributed
from support.device import window_at
from support.muon import make_optimizer

# --- networks -----------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), as in van den Oord et al. 2017, section 4.1."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


@torch.no_grad()
def widen_decoder(model: VQVAE, config: Config) -> VQVAE:
    """Replace the model's decoder by a larger one that draws the same.

    After Chen et al. 2016 (Net2Net, arXiv:1511.05641): the further channels start at random,
    but the weights that read them are 0, and residual blocks add nothing at first.
    """
    half, full = map(max, config.widths[2:], config.decoder_widths)
    blocks = [ResidualBlock(half) for _ in range(config.residual_blocks)]
    upsampling = model.decoder[-1].upsampling
    wide = modules.make_decoder(config.code_dim, half, full, upsampling, *blocks)
    wide.apply(start_awake)
    for block in blocks:
        nn.init.zeros_(block.conv2.weight)
    wide.to(model.quantizer.codebook.device, memory_format=torch.channels_last)
    old, new = ([m for m in d if isinstance(m, nn.Conv2d)] for d in (model.decoder, wide))
    for small, large in zip(old, new, strict=True):
        outs, ins = small.weight.shape[:2]
        large.weight[:outs, ins:] = 0
        large.weight[:outs, :ins] = small.weight
    model.decoder = wide
    return model


def make_sharper_vqvae(config: Config) -> VQVAE:
    """The VQ-VAE that decodes samples: with the larger decoder if this stage has a length."""
    model = modules.make_vqvae(config)
    return widen_decoder(model, config) if config.decoder_kimg else model


def last_vqvae(real: RealMaps) -> VQVAE:
    """The trained VQ-VAE that decodes samples. Raises UserError (exit 4) if unusable."""
    if not real.run.config.decoder_kimg:
        return trained_vqvae(real.run)
    return trained_vqvae(real.run, "decoder", make_sharper_vqvae, **real.link)


class PatchDiscriminator(nn.Module):
    """One logit per 4x4 pixels, from the 30x30 around them: real or decoded?

    Isola et al. 2017, arXiv:1611.07004, section 3.2.2, smaller. The second input channel is the
    image minus its 5x5 mean, ten times as strong: the difference between the two lies there.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )  # fmt: skip
        self.apply(start_at_he)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, H, W), H and W multiples of 4 -> logits (B, H/4, W/4)."""
        fine = x - F.avg_pool2d(x, 5, 1, 2)  # (B, 1, H, W)
        both = torch.cat([2 * x, 10 * fine], 1)  # (B, 2, H, W)
        return self.layers(both.contiguous(memory_format=torch.channels_last))[:, 0]


# --- training -----------------------------------------------------------------------------


class Decoding:
    """The larger decoder and its average, the discriminator of patches, their optimisers."""

    def __init__(self, run: Run, model: VQVAE):
        """model: of stage 1; its decoder is where training starts."""
        config = run.config
        self.model = seeded(run.seed, 5, lambda: widen_decoder(model, config))
        self.model.requires_grad_(False)
        decoder = self.model.decoder.requires_grad_(True)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.D = seeded(run.seed, 4, PatchDiscriminator).to(run.device)
        betas = 0.0, 0.99
        self.optimizer = make_optimizer(decoder, config.optimizer, config.decoder_lr, betas)
        self.D_adam = make_optimizer(self.D, "adam", config.patch_lr, betas)

    def parts(self) -> dict:
        return {
            "decoder": self.model.decoder, "average": self.average.decoder, "D": self.D,
            "optimizer": self.optimizer, "D_adam": self.D_adam,
        }  # fmt: skip


def train_decoder(run: Run):
    """Train until `decoder_kimg`; `decoder_best.pt` holds the latest average of good SSIM."""
    config = run.config
    real, decoding = RealMaps(run), Decoding(run, trained_vqvae(run))
    slices, average = Feed(run.data.train.images, run.device), decoding.average
    stage = Stage(run, "decoder", decoding.parts(), **real.link)
    if stage.step == 0:  # the score of stage 1 sets the bar
        measure_decoder(average, real, stage)
    loss = loss_of(run.data.train, config)
    step = device.Recorded(functools.partial(decoder_step, decoding, config, loss))
    while not stage.done:
        lr = stage.lr(config.decoder_lr)
        device.set_lr(lr, decoding.optimizer)
        device.set_lr(stage.lr(config.patch_lr), decoding.D_adam)
        batch = decoder_batch(real, slices, stage)
        values = step(*batch, penalise=stage.step % config.penalty_every == 0)
        half_life = min(1000 * config.decoder_ema_kimg, 0.1 * stage.nimg)
        update_average(average.decoder, decoding.model.decoder, half_life, config.batch_size)
        stage.after_step(values, lambda: measure_decoder(average, real, stage), lr)
    stage.progress.close()


def decoder_batch(real: RealMaps, slices: Feed, stage: Stage) -> tuple[Tensor, ...]:
    """Windows of slices (B, 1, S, S), index maps (B, 64, 64), the window's corner (2,), noise.

    S = window_px. The corner lies on a cell, and the window inside the crop. noise:
    (2, B, 1, S, S), for real and for decoded windows.
    """
    run, n, S = stage.run, stage.batch_size, stage.run.config.window_px
    draw = generator_of(run.seed, SHARPEN, stage.step)
    mine, rows = distributed.share(n), run.data.train.rows[batch_rows(stage)]
    crop, side = real.code_map.crop, math.ceil(S / PIXELS)
    corner = random_corner(*crop.size, side, draw) + torch.tensor(crop[:2])
    corner = device.sent(PIXELS * corner, run.device)
    noise = run.config.patch_noise * torch.randn((2, n, 1, S, S), generator=draw)[:, mine]
    images = unit_range(window_at(slices[rows], corner, S))
    return images, real.real_maps(rows), corner, device.sent(noise, run.device)


def decoder_step(
    decoding: Decoding, config, loss: Loss, images, maps, corner, noise, penalise: bool
) -> dict[str, Tensor]:
    """One step of the discriminator of patches, then one of the decoder, on a `decoder_batch`.

    Each patch is compared with the same patch of its slice. Both get a little noise: scanner
    noise, which no code can hold, would otherwise tell them apart.
    """
    with device.autocast(images.device, config.precision):
        output = window_at(decoding.model.decode_raw(maps), corner, config.window_px)
    values = judge_patches(decoding, images + noise[0], output + noise[1], config, penalise)
    error = loss(output, images, torch.zeros_like(corner))
    values["reconstruction"] = error
    values["loss"] = error + config.adversarial_weight * values["g_loss"]
    decoding.optimizer.zero_grad(set_to_none=True)
    values["loss"].backward()
    values = {name: value.detach() for name, value in values.items()}
    distributed.average_gradients(decoding.model.decoder, *values.values())
    decoding.optimizer.step()
    return values


def judge_patches(
    decoding: Decoding, real: Tensor, fake: Tensor, config, penalise: bool
) -> dict[str, Tensor]:
    """The discriminator's step on windows (B, 1, S, S): its losses, the decoder's g_loss."""
    D = decoding.D
    both = torch.cat([real, fake.detach()])
    with device.autocast(real.device, config.precision):
        real_score, fake_score = D(both).float().chunk(2)  # (B, S/4, S/4) each
    d_loss, values = modules.relativistic_loss(real_score, fake_score), {}
    if penalise:
        with device.autocast(real.device, config.precision):
            r1, r2 = modules.gradient_penalty(D, both).chunk(2)
        patches = real_score[0].numel()
        values = {"r1": r1.mean() / patches, "r2": r2.mean() / patches}  # of one logit
        weight = config.patch_gamma / 2 * config.penalty_every
        d_loss = d_loss + weight * (values["r1"] + values["r2"])
    decoding.D_adam.zero_grad(set_to_none=True)
    d_loss.backward()
    distributed.average_gradients(D)
    decoding.D_adam.step()
    D.requires_grad_(False)
    with device.autocast(real.device, config.precision):
        fake_score = D(fake).float()
    D.requires_grad_(True)
    g_loss = modules.relativistic_loss(fake_score, real_score.detach())
    return {"g_loss": g_loss, "d_loss": d_loss, **values}


@torch.no_grad()
def measure_decoder(average: VQVAE, real: RealMaps, stage: Stage) -> dict:
    """Validation scores, ten times in a training; keeps the latest average of good SSIM."""
    if not stage.due(10):
        return {}
    validation = stage.run.data.validation
    rows = evenly(len(validation), 128)
    outputs = distributed.in_shares(average.decode, real.real_maps(validation.rows[rows]))
    scores = likeness(validation.batch(rows), outputs.cpu())
    tolerance = stage.run.config.decoder_tolerance
    stage.offer(1 - scores["ssim_validation"], tolerance, model=average)
    return scores
