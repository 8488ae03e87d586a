"""Other ways to draw brains, at equal time and by one scorer.

    python benchmarks/compare.py RUN                    # every row that the CSV does not have
    python benchmarks/compare.py RUN --rows diffusion
    python benchmarks/compare.py --table                # the table, from the CSV
    python benchmarks/compare.py --plot F.png           # scores against minutes, from the CSV
    python benchmarks/compare.py RUN --figure F.png     # eight samples of every way to draw

RUN is the folder of a finished seed. Its data and crop are used and, by rows over index maps,
its VQ-VAE. Each row is a process of its own that trains for as long as RUN, or for --minutes.
A row over index maps trains for that time, minus the time of RUN's VQ-VAE and decoder. Some
rows draw in several ways from one training. A row that is named alone always runs; of several,
rows in the CSV are skipped. Each way draws as many slices as the
scores compare. Scores are those of `predict.py evaluate`, with test people as unseen people.
Results are added to comparison.csv beside this file, samples to --out. Rivals come from MONAI
(`pip install -r benchmarks/requirements.txt`). Their optimizer is Adam;
--lr multiplies their learning rates.
"""

import argparse
import copy
import csv
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a finished seed")
    parser.add_argument("--rows", metavar="ROW", nargs="+", help="[all]")
    parser.add_argument("--minutes", type=float, help="of training [as long as RUN]")
    parser.add_argument("--lr", type=float, default=1.0, help="factor of learning rates [1]")
    parser.add_argument("--out", default="runs/comparison", help="[runs/comparison]")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    parser.add_argument("--plot", metavar="F", help="plot scores against minutes and end")
    parser.add_argument("--figure", metavar="F", help="draw eight samples of every way and end")
    return parser.parse_args()


if __name__ == "__main__":  # --help must not wait for the import of torch
    ARGUMENTS = parse()

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pixelcnn import PixelCNN
from torch import Tensor, nn

import modules
import predict
from config import PRESETS, Config, Exit, UserError
from dataset import PIXELS, Data, open_data
from loading.decoding import read_image
from modules import generator_of
from scores.evaluation import KINDS, check_data, references
from stages.denoiser import Denoiser, denoiser_step
from stages.stage import ORDER, order_of, update_average
from support import checkpoints, device, endings, files, messages
from support.muon import Muon, make_optimizer

CSV = HERE / "comparison.csv"
SCORES = {
    "judge_auc_test": "judge's AUC", "fd_train": "relative FD", "fine_fd_train": "fine FD",
    "layout_fd_train": "layout FD",
    "precision": "precision", "recall": "recall", "coverage": "coverage",
    "ms_ssim_of_pairs": "MS-SSIM of pairs", "memorised_share": "memorised share",
}  # fmt: skip
EFFORT = {
    "minutes": "minutes", "seconds_per_1000": "s per 1,000 slices",
    "parameters_m": "parameters, M", "memory_mb": "peak memory of training, MB",
}  # fmt: skip
COLUMNS = ("row", "source", "length", "seed", "lr", *EFFORT, *SCORES)
BATCH = 16
LEVEL_BINS = 32  # classes of the slice level, for networks that take a class


# --- what rows are given ------------------------------------------------------------------


@dataclass
class Given:
    """What a row learns from, for how long, and how fast. H W: the crop of all heads."""

    run: predict.TrainedRun
    data: Data
    seconds: float
    lr: float

    def __post_init__(self):
        self.levels = torch.from_numpy(self.data.train.levels)
        self.size = tuple(PIXELS * side for side in self.run.code_map.crop.size)

    def rows(self, step: int) -> np.ndarray:
        """The training slices of a batch (B,), in shuffled epochs."""
        return order_of(self.run.seed, ORDER, len(self.data.train), step * BATCH, BATCH)

    def images(self, step: int) -> tuple[Tensor, Tensor]:
        """Cropped slices (B, 1, H, W) in [0, 1] and their levels (B,)."""
        rows = self.rows(step)
        images = self.data.train.batch(rows)
        return self.run.code_map.crop.cut(images, PIXELS), self.levels[rows]

    def maps(self, step: int) -> tuple[Tensor, Tensor]:
        """Cropped index maps (B, h, w) and their levels (B,)."""
        rows = self.rows(step)
        stored = files.mapped(self.run.folder / "codes.npy")[self.data.train.rows[rows]]
        maps = torch.from_numpy(stored.astype(np.int64))
        return self.run.code_map.crop.cut(maps), self.levels[rows]

    def pasted(self, inside: Tensor) -> Tensor:
        """Cropped slices (n, 1, H, W), on black: (n, 1, 256, 256) in [0, 1]."""
        images = inside.new_zeros(len(inside), 1, 256, 256)
        self.run.code_map.crop.cut(images, PIXELS)[:] = inside.clamp(0, 1)
        return images

    def decoded(self, maps: Tensor) -> Tensor:
        """Cropped index maps (n, h, w) -> slices (n, 1, 256, 256)."""
        code_map = self.run.code_map
        return self.run.vqvae.decode(code_map.crop.paste(maps, code_map.background))

    def steps(self, lr: float, *optimizers, share: float = 1.0) -> Iterator[int]:
        """Steps for `share` of the time; the rate falls with the time, along a cosine."""
        begun, step, seconds = time.monotonic(), 0, share * self.seconds
        while (passed := time.monotonic() - begun) < seconds:
            for optimizer in optimizers:
                rate = self.lr * lr * 0.5 * (1 + math.cos(math.pi * passed / seconds))
                device.set_lr(rate, optimizer)
            yield step
            step += 1
        messages.say(f"  {step} steps of {BATCH} in {passed:.0f} s")

    def autocast(self) -> torch.autocast:
        return device.autocast(torch.device("cpu"), self.run.config.precision)


def step_of(optimizer: torch.optim.Optimizer, loss: Tensor):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def adam(*networks: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for n in networks for p in n.parameters()], lr=1e-3, fused=True)


def in_batches(draw: Callable, *inputs: Tensor) -> Tensor:
    parts = zip(*(x.split(BATCH) for x in inputs), strict=True)
    return torch.cat([draw(*part) for part in parts])


# --- rows: each trains; returns, for each way to draw, networks and a function levels -> slices

Trained = dict[str, tuple[list[nn.Module], Callable[[Tensor], Tensor]]]


def own_ways(config: Config) -> list[str]:
    """The ways to draw that `this_project` finds in a RUN of this configuration."""
    left_out = [stage for stage in ("denoiser", "decoder") if stage in config.trained]
    name = "original" if config.original else "ours"
    return [name, *(f"ours-no-{stage}" for stage in left_out)]


def this_project(given: Given) -> Trained:
    """RUN itself; without its denoiser; without its sharper decoder (if it has them)."""
    run = given.run

    def way(run: predict.TrainedRun):
        networks = [n for n in (run.vqvae, run.generator, run.denoiser) if n is not None]
        return networks, lambda levels: run.draw(run.noise(len(levels))[0], levels)[1]

    ways = {own_ways(run.config)[0]: way(run)}
    if "denoiser" in run.config.trained:
        ways["ours-no-denoiser"] = way(replace(run, denoiser=None))
    if "decoder" in run.config.trained:
        vqvae, path = modules.make_vqvae(run.config), run.folder / "vqvae_best.pt"
        checkpoints.load_weights(vqvae, checkpoints.load_checkpoint(path)["model"], path).eval()
        ways["ours-no-decoder"] = way(replace(run, vqvae=vqvae))
    return ways


def pixel_gan(scale: int) -> Callable[[Given], Trained]:
    """This project's generator, discriminator and loss, on pixels of 1/scale of the size."""

    def row(given: Given) -> Trained:
        config, size = given.run.config, tuple(side // scale for side in given.size)
        torch.manual_seed(given.run.seed)
        G = modules.Generator(config.noise_dim, 32, 1, False, True, size)
        D = modules.Discriminator(32, 1, False, size)
        average = modules.Generator(config.noise_dim, 32, 1, False, True, size)
        average.load_state_dict(G.state_dict())
        rate, ratio = config.gan_lr[0], config.gan_lr[1] / config.gan_lr[0]
        betas = config.gan_beta1, 0.99
        g, d = (
            make_optimizer(network, config.optimizer, rate, betas, config.gan_momentum)
            for network in (G, D)
        )
        for step in given.steps(rate, g):
            device.set_lr(ratio * g.param_groups[0]["lr"], d)
            images, level = given.images(step)
            real = 2 * F.avg_pool2d(images, scale) - 1
            noise = torch.randn(BATCH, config.noise_dim)
            with given.autocast():
                fake = G(noise, level)
                both, levels = torch.cat([real, fake.detach().float()]), level.repeat(2)
                real_score, fake_score = D(both, levels).float().chunk(2)
            loss = modules.relativistic_loss(real_score, fake_score)
            if step % config.penalty_every == 0:
                with given.autocast():
                    penalty = modules.gradient_penalty(D, both, levels).mean()
                loss = loss + config.gamma * config.penalty_every * penalty
            step_of(d, loss)
            D.requires_grad_(False)
            with given.autocast():
                score = D(fake, level).float()
            step_of(g, modules.relativistic_loss(score, real_score.detach()))
            D.requires_grad_(True)
            update_average(average, G, min(5000, 0.05 * step * BATCH), BATCH)
        average.eval()

        @torch.no_grad()
        def draw(levels: Tensor) -> Tensor:
            noise = given.run.noise(len(levels))[0]
            small = (in_batches(average, noise, levels) + 1) / 2
            large = (
                F.interpolate(small, size=given.size, mode="bicubic") if scale > 1 else small
            )
            return given.pasted(large)

        return {f"pixels-{256 // scale}": ([average], draw)}

    return row


def autoregressive(given: Given) -> Trained:
    """PixelCNN (van den Oord et al. 2016) over RUN's index maps."""
    code_map = given.run.code_map
    torch.manual_seed(given.run.seed)
    prior = PixelCNN(len(code_map.used))
    optimizer = adam(prior)
    for step in given.steps(2e-3, optimizer):
        maps, level = given.maps(step)
        ranks = code_map.rank[maps]
        with given.autocast():
            scores = prior(ranks, level)
        step_of(optimizer, F.cross_entropy(scores.float().flatten(0, 2), ranks.flatten()))
    prior.eval()

    def draw(levels: Tensor) -> Tensor:
        torch.manual_seed(given.run.seed)
        ranks = [prior.draw(part, *code_map.crop.size) for part in levels.split(BATCH)]
        return given.decoded(code_map.used[torch.cat(ranks)])

    return {"autoregressive": ([given.run.vqvae, prior], draw)}


def unet(channels: int) -> nn.Module:
    """MONAI's diffusion UNet, 1 to 2 M parameters, told the slice level as a class."""
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2, in_channels=channels, out_channels=channels, num_res_blocks=1,
        channels=(32, 64, 96), attention_levels=(False, False, True), num_head_channels=32,
        num_class_embeds=LEVEL_BINS,
    )  # fmt: skip


def level_class(level: Tensor) -> Tensor:
    """Levels (B,) as classes; unknown ones are in the middle."""
    return (level.nan_to_num(0.5) * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1)


def train_diffusion(given: Given, network, batch: Callable, share: float = 1.0) -> nn.Module:
    """The average of a network that predicts the noise (Ho et al. 2020, arXiv:2006.11239).

    batch: step -> x (B, C, h, w) of unit variance, level (B,).
    """
    from monai.networks.schedulers import DDPMScheduler

    scheduler, optimizer = DDPMScheduler(num_train_timesteps=1000), adam(network)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    for step in given.steps(1e-3, optimizer, share=share):
        x, level = batch(step)
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
        noisy = scheduler.add_noise(original_samples=x, noise=noise, timesteps=t)
        with given.autocast():
            found = network(noisy, t, class_labels=level_class(level))
        step_of(optimizer, F.mse_loss(found.float(), noise))
        update_average(average, network, min(5000, 0.1 * step * BATCH), BATCH)
    return average


@torch.no_grad()
def diffused(
    given: Given, network, shape: tuple[int, ...], levels: Tensor, steps: int
) -> Tensor:
    """Samples (n, *shape) by DDIM (Song et al. 2021, arXiv:2010.02502)."""
    from monai.networks.schedulers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    scheduler.set_timesteps(steps)
    # MONAI's own spacing differs from the stride that its `step` goes: noise would be left.
    times = range(999, -1, -(1000 // steps))

    def some(x: Tensor, level: Tensor) -> Tensor:
        for t in times:
            with given.autocast():
                every = torch.full((len(x),), t)
                noise = network(x, every, class_labels=level_class(level))
            x = scheduler.step(noise.float(), t, x)[0]
        return x

    start = torch.randn((len(levels), *shape), generator=generator_of(given.run.seed, 1))
    return in_batches(some, start, levels)


def map_diffusion(given: Given) -> Trained:
    """Diffusion over the coordinates of RUN's index maps; a cell becomes the nearest code."""
    code_map = given.run.code_map
    torch.manual_seed(given.run.seed)
    scale = 1 / code_map.encode(given.maps(0)[0]).std()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        maps, level = given.maps(step)
        return scale * code_map.encode(maps), level

    channels = code_map.points.shape[1]
    network = train_diffusion(given, unet(channels), batch)

    def draw(levels: Tensor, steps: int) -> Tensor:
        u = diffused(given, network, (channels, *code_map.crop.size), levels, steps)
        return given.decoded(code_map.decode(u / scale))

    return {
        f"diffusion-{n}": ([given.run.vqvae, network], partial(draw, steps=n)) for n in (10, 50)
    }


class Diffusion(Denoiser):
    """This project's denoiser, for noise that leaves nothing of a map."""

    MOST = 40.0  # sigma; data have unit variance
    KEPT = 0


def own_diffusion(given: Given) -> Trained:
    """Diffusion over RUN's index maps by this project's denoiser, trained on whole maps."""
    run, config, code_map = given.run, given.run.config, given.run.code_map
    size = code_map.crop.size
    torch.manual_seed(run.seed)
    codebook, channels = run.vqvae.quantizer.codebook, Config.map_channels
    network = Diffusion(config.codes, channels)
    coordinates = modules.CodeMap.fit(codebook, run.counts, "coordinates", channels)
    network.fit(coordinates, run.counts)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    muon = Muon(network, config.denoiser_lr, betas=(0.9, 0.99))
    for step in given.steps(config.denoiser_lr, muon):
        maps, level = given.maps(step)
        noise = torch.randn(BATCH, channels, *size)
        sigma = network.sigmas(torch.rand(BATCH))
        start = torch.randint(2, (2,)).tolist()
        denoiser_step(network, muon, config, maps, noise, sigma, level, start=start)
        update_average(average, network, min(5000, 0.1 * step * BATCH), BATCH)

    # At sigma 40 the mean of a map still matters: that of 2,688 cells has noise of 0.8 only.
    middle = torch.cat([network.places(given.maps(step)[0]) for step in range(32)]).mean(0)

    @torch.no_grad()
    def draw(levels: Tensor, steps: int) -> Tensor:
        average.STEPS = steps
        generator = generator_of(run.seed, 1)
        noise = torch.randn((len(levels), channels, *size), generator=generator)

        def some(noise: Tensor, level: Tensor) -> Tensor:
            with given.autocast():
                return average.restore(middle.expand_as(noise), noise, level)

        return given.decoded(in_batches(some, noise, levels))

    networks = [run.vqvae, network]
    return {f"own-diffusion-{n}": (networks, partial(draw, steps=n)) for n in (10, 50)}


def latent_diffusion(given: Given) -> Trained:
    """AutoencoderKL, then diffusion of its latents (Rombach et al. 2022, arXiv:2112.10752).

    MONAI's networks; the autoencoder's loss is L1 and KL, without the perceptual and
    adversarial terms of MONAI's tutorial, whose weights need a download.
    """
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(given.run.seed)
    coder = AutoencoderKL(
        spatial_dims=2, num_res_blocks=1, channels=(16, 32, 32), latent_channels=3,
        attention_levels=(False, False, False), norm_num_groups=16,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    optimizer = adam(coder)
    for step in given.steps(1e-3, optimizer, share=0.4):
        images, _ = given.images(step)
        with given.autocast():
            output, mean, sd = coder(images)
        mean, sd = mean.float(), sd.float()
        kl = 0.5 * (mean.square() + sd.square() - sd.square().log() - 1).sum((1, 2, 3))
        step_of(optimizer, F.l1_loss(output.float(), images) + 1e-6 * kl.mean())
    coder.eval()

    @torch.no_grad()
    def latents(step: int) -> tuple[Tensor, Tensor]:
        images, level = given.images(step)
        return coder.encode(images)[0], level

    scale = 1 / latents(0)[0].std()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        z, level = latents(step)
        return z * scale, level

    network = train_diffusion(given, unet(3), batch, share=0.6)

    @torch.no_grad()
    def draw(levels: Tensor) -> Tensor:
        shape = 3, *given.run.code_map.crop.size
        z = diffused(given, network, shape, levels, 50) / scale
        return given.pasted(in_batches(coder.decode, z))

    return {"latent-diffusion": ([coder, network], draw)}


def tokens_transformer(given: Given) -> Trained:
    """MONAI's VQ-VAE, 16 times smaller, and its transformer over the tokens.

    As in MONAI's tutorial, with four halvings instead of two: its transformer keeps no keys,
    so more tokens would take minutes a sample.
    """
    from monai.networks.nets import VQVAE, DecoderOnlyTransformer

    torch.manual_seed(given.run.seed)
    codes, down, up = 256, (2, 4, 1, 1), (2, 4, 1, 1, 0)
    model = VQVAE(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(32, 64, 96, 96),
        num_res_layers=1, num_res_channels=(32, 64, 96, 96), downsample_parameters=(down,) * 4,
        upsample_parameters=(up,) * 4, num_embeddings=codes, embedding_dim=64, ddp_sync=False,
    )  # fmt: skip
    optimizer = adam(model)
    for step in given.steps(1e-3, optimizer, share=0.5):
        images, _ = given.images(step)
        output, loss = model(images)
        step_of(optimizer, F.l1_loss(output, images) + loss)
    model.eval()
    h, w = (side // 16 for side in given.size)
    prior = DecoderOnlyTransformer(codes + LEVEL_BINS, h * w + 1, 96, 6, 8)
    optimizer = adam(prior)

    def started(level: Tensor) -> Tensor:
        return codes + level_class(level)[:, None]  # the first token tells the level

    for step in given.steps(5e-4, optimizer, share=0.5):
        images, level = given.images(step)
        with torch.no_grad():
            tokens = model.index_quantize(images).flatten(1)
        with given.autocast():
            scores = prior(torch.cat([started(level), tokens[:, :-1]], 1)).float()
        step_of(optimizer, F.cross_entropy(scores[..., :codes].flatten(0, 1), tokens.flatten()))
    prior.eval()

    @torch.no_grad()
    def draw(levels: Tensor) -> Tensor:
        torch.manual_seed(given.run.seed)

        def some(level: Tensor) -> Tensor:
            tokens = started(level)
            for _ in range(h * w):
                chances = prior(tokens)[:, -1, :codes].softmax(1)
                tokens = torch.cat([tokens, torch.multinomial(chances, 1)], 1)
            return model.decode_samples(tokens[:, 1:].view(-1, h, w))

        return given.pasted(in_batches(some, levels))

    return {"transformer": ([model, prior], draw)}


@dataclass(frozen=True)
class Row:
    train: Callable[[Given], Trained]
    labels: dict[str, str]  # way to draw -> its name in the table
    over_maps: bool = False  # uses RUN's VQ-VAE and decoder, whose time counts


OURS = {
    "ours": "this project", "original": "the original recipe",
    "ours-no-denoiser": "... without its denoiser",
    "ours-no-decoder": "... without its sharper decoder",
}  # fmt: skip
ROWS = {
    "ours": Row(this_project, OURS, True),
    "diffusion": Row(
        map_diffusion,
        {f"diffusion-{n}": f"diffusion over the same maps (MONAI), DDIM {n}" for n in (10, 50)},
        True,
    ),
    "own-diffusion": Row(
        own_diffusion,
        {
            f"own-diffusion-{n}": f"diffusion over the same maps (this denoiser), {n} steps"
            for n in (10, 50)
        },
        True,
    ),
    "autoregressive": Row(
        autoregressive, {"autoregressive": "PixelCNN over the same maps"}, True
    ),
    "latent-diffusion": Row(
        latent_diffusion, {"latent-diffusion": "latent diffusion (MONAI), DDIM 50"}
    ),
    "transformer": Row(
        tokens_transformer, {"transformer": "VQ-VAE, transformer over 16x smaller maps (MONAI)"}
    ),
    "pixels-64": Row(
        pixel_gan(4), {"pixels-64": "DCGAN of pixels, a quarter of the size, enlarged"}
    ),
    "pixels-256": Row(pixel_gan(1), {"pixels-256": "DCGAN of pixels, full size"}),
}
LABELS = {way: label for row in ROWS.values() for way, label in row.labels.items()}


# --- one row ------------------------------------------------------------------------------


def seconds_of(run: predict.TrainedRun, *stages: str) -> float:
    """Seconds that RUN's stages were trained."""
    paths = [run.folder / f"{stage}_last.pt" for stage in stages if stage in run.config.trained]
    return sum(checkpoints.load_checkpoint(path)["seconds"] for path in paths)


def one_row(name: str, run: predict.TrainedRun, arguments):
    """Train, draw and score; add one line to the CSV for each way to draw."""
    data, row, trained = open_data(run.config), ROWS[name], run.config.trained
    check_data(run, data)
    device.set_threads(run.config.threads)
    before = seconds_of(run, "vqvae", "decoder") if row.over_maps else 0.0
    whole = 60 * arguments.minutes if arguments.minutes else seconds_of(run, *trained)
    if whole <= before:
        raise UserError(Exit.USAGE, f"--minutes: RUN's VQ-VAE and decoder took {before:.0f} s")
    given = Given(run, data, whole - before, arguments.lr)
    begun = time.monotonic()
    ways = row.train(given)
    seconds = before + time.monotonic() - begun
    memory = device.peak_memory_mb()
    scorer = references(run, data)
    levels = run.noise(scorer.n)[1]
    told = levels if run.conditional else torch.full_like(levels, math.nan)
    lines = []
    for way, (networks, draw) in ways.items():
        if way in OURS:
            left_out = way.removeprefix("ours-no-")
            seconds = seconds_of(run, *(s for s in trained if s != left_out))
        begun = time.monotonic()
        images = draw(levels)
        drawing = time.monotonic() - begun
        effort = {
            "minutes": seconds / 60, "seconds_per_1000": 1000 * drawing / scorer.n,
            "parameters_m": sum(p.numel() for k in networks for p in k.parameters()) / 1e6,
            "memory_mb": "" if row.over_maps else memory,  # RUN was trained before
        }  # fmt: skip
        predict.write_slices(folder_of(run, way, arguments), [images])
        scorer.add("generated", images, told.numpy())
        lines.append((way, scorer.all(), effort))
    for line in lines:
        add(run, arguments, *line)


def folder_of(run: predict.TrainedRun, way: str, arguments) -> Path:
    lr = "" if arguments.lr == 1 else f"-lr-{arguments.lr:g}"
    length = length_of(run, way, arguments).replace(" ", "-")
    name = f"{source_of(run.config)}-{way}-{length}{lr}-seed-{run.seed}"
    return Path(arguments.out) / name


def length_of(run: predict.TrainedRun, way: str, arguments) -> str:
    """How long a way is trained: --minutes, or RUN's preset, with its lengths if changed."""
    if way not in OURS and arguments.minutes:
        return f"{arguments.minutes:g} min"
    preset, trained = run.config.preset, run.config.trained
    if trained == Config(**PRESETS[preset]).trained:
        return preset
    return f"{preset}, {' + '.join(f'{kimg:g}' for kimg in trained.values())} kimg"


def source_of(config: Config) -> str:
    return Path(config.data).resolve().name if config.data else "embedded"


def add(run, arguments, name: str, scores: dict, effort: dict):
    """Append a row to the CSV, and the references if this source has none."""
    source, length = source_of(run.config), length_of(run, name, arguments)
    known = {(line["row"], line["source"]) for line in read_rows()}
    new = not CSV.exists()
    with open(CSV, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for kind in KINDS:
            row = name if kind == "generated" else f"({kind})"
            if kind != "generated" and (row, source) in known:
                continue
            values = {key: scores[key].get(kind, "") for key in SCORES}
            values |= effort if kind == "generated" else {}
            shown = {k: f"{v:.4g}" if v != "" else "" for k, v in values.items()}
            which = (row, source, length, run.seed, arguments.lr)
            writer.writerow(dict(zip(COLUMNS, which, strict=False)) | shown)


def read_rows() -> list[dict]:
    """The lines of the CSV. Of several for one seed the last one counts."""
    if not CSV.exists():
        return []
    with open(CSV, newline="", encoding="utf-8") as file:
        return list({key_of(line): line for line in csv.DictReader(file)}.values())


def key_of(line: dict) -> tuple:
    """What names a line: way, data, length, seed, factor of learning rates."""
    return *(line[name] for name in COLUMNS[:4]), float(line["lr"])


def table() -> str:
    """The CSV as a Markdown table, by data and in the order of ROWS; of seeds, mean (sd)."""
    columns, ways, rows = EFFORT | SCORES, {}, read_rows()
    order = [*LABELS, *(f"({kind})" for kind in KINDS)]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    rows.sort(key=lambda row: (sources.index(row["source"]), order.index(row["row"])))
    for row in rows:
        key = row["row"], row["source"], row["length"], float(row["lr"])
        ways.setdefault(key, []).append(row)
    lines = ["| way | data | length | seeds | " + " | ".join(columns.values()) + " |"]
    lines.append("| --- " * (4 + len(columns)) + "|")
    for (way, source, length, lr), each in ways.items():
        cells = [mean_sd([float(row[name]) for row in each if row[name]]) for name in columns]
        label = LABELS.get(way, way) + (f", learning rates x {lr:g}" if lr != 1 else "")
        seeds = ", ".join(row["seed"] for row in each)
        lines.append("| " + " | ".join([label, source, length, seeds, *cells]) + " |")
    return "\n".join(lines)


def mean_sd(values: list[float]) -> str:
    if not values:
        return "-"
    mean, sd = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0
    return (f"{mean:.0f}" if mean >= 100 else f"{mean:.3g}") + (f" ({sd:.2g})" if sd else "")


PLOTTED = {  # this project and the best others
    "ours": "#1f77b4", "own-diffusion-10": "#c9a227", "own-diffusion-50": "#d1495b",
    "pixels-256": "#3a923a",
}  # fmt: skip


def over_time(source: str = "oasis") -> Figure:
    """Judge's AUC and relative FD against minutes: a point for each seed, lines of means."""
    fig = Figure((9, 4), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    lines = [r for r in read_rows() if r["source"] == source and float(r["lr"]) == 1]
    for ax, score in zip(fig.subplots(1, 2), ("judge_auc_test", "fd_train"), strict=True):
        for way, colour in PLOTTED.items():
            lengths = {}  # length -> points (minutes, score)
            for row in lines:
                if row["row"] == way:
                    point = float(row["minutes"]), float(row[score])
                    lengths.setdefault(row["length"], []).append(point)
            if not lengths:
                continue
            means = sorted(np.mean(points, 0).tolist() for points in lengths.values())
            ax.plot(*zip(*means, strict=True), color=colour, label=LABELS[way])
            every = [point for points in lengths.values() for point in points]
            ax.plot(*zip(*every, strict=True), "o", color=colour, markersize=4)
        for row in lines:
            if row["row"] == "(real)":
                ax.axhline(float(row[score]), color="0.5", linestyle="--", label="real slices")
        ax.set(title=SCORES[score], xlabel="minutes of training, two cores", xlim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return fig


def figure(run: predict.TrainedRun, arguments) -> Figure:
    """Samples 0 to 7 of every way that was drawn for RUN's data and seed, at half size."""
    found = {
        label: folder
        for way, label in LABELS.items()
        if (folder := folder_of(run, way, arguments)).exists()
    }
    if not found:
        raise UserError(
            Exit.USAGE, f"--figure: {arguments.out} holds no samples for RUN; compare first"
        )
    fig = Figure((8 * 1.28, len(found) * 1.48), dpi=100, facecolor="white")
    FigureCanvasAgg(fig)
    axes = fig.subplots(len(found), 1, squeeze=False)[:, 0]
    fig.subplots_adjust(
        left=0, right=1, bottom=0, top=1 - 0.2 / len(found) / 1.48, hspace=0.156
    )
    for ax, (label, folder) in zip(axes, found.items(), strict=True):
        images = [read_image((folder / f"{i:05d}.png").read_bytes()) for i in range(8)]
        small = cv2.resize(np.hstack(images), (1024, 128), interpolation=cv2.INTER_AREA)
        ax.imshow(small, "gray", vmin=0, vmax=255, aspect="auto")
        ax.set_title(label, fontsize=9, loc="left", pad=3)
        ax.set_axis_off()
    return fig


def main(arguments):
    if arguments.table:
        return print(table())
    if arguments.plot:
        return over_time().savefig(arguments.plot)
    if unknown := set(arguments.rows or ()) - set(ROWS):
        raise UserError(Exit.USAGE, f"--rows {min(unknown)}: choose from {', '.join(ROWS)}")
    if not arguments.run:
        raise UserError(
            Exit.USAGE, "give RUN, the folder of a finished seed, or --table or --plot"
        )
    run = predict.load_run(arguments.run, "cpu")
    if arguments.figure:
        return figure(run, arguments).savefig(arguments.figure)
    if arguments.rows and len(arguments.rows) == 1:
        return one_row(arguments.rows[0], run, arguments)
    source = source_of(run.config)
    known = {key_of(line) for line in read_rows()}
    for name in arguments.rows or ROWS:
        wanted = {
            (way, source, length_of(run, way, arguments), str(run.seed), arguments.lr)
            for way in (own_ways(run.config) if name == "ours" else ROWS[name].labels)
        }
        if wanted - known:
            messages.say(", ".join(ROWS[name].labels.values()))
            words = [a for a in sys.argv[1:] if a not in ROWS and a != "--rows"]
            done = subprocess.run([sys.executable, __file__, *words, "--rows", name])
            if done.returncode:
                messages.warn(f"row {name} failed; the others go on")
    return print(table())


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
