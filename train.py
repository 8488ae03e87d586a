"""The training stages: VQ-VAE, index maps, sharper decoder, DCGAN, denoiser.

In: a `Config` and the slices of `dataset.open_data`. Out, in one folder per seed:
`vqvae_best.pt`; `codes.npy` and `codes.pt`, index maps of every slice and the code map;
`decoder_best.pt`, `dcgan_best.pt`, `denoiser_best.pt`; `log.csv`. Each stage resumes where it
stopped. The sharper decoder and the denoiser are in stages/. Also a script:
`python train.py --stage vqvae|codes|decoder|dcgan|denoiser`.
"""

from config import TRAINED, Config, Exit, UserError
from support.cli import FIELDS, Parser, add_options, config_from, flag_of

if __name__ == "__main__":  # a mistyped flag must not wait for the import of torch
    PARSER = Parser("Train one stage, or all of them. The same command again resumes.")
    PARSER.add_argument(
        "--stage", choices=("all", "vqvae", "codes", "decoder", "dcgan", "denoiser"),
        default="all",
        help="in this order; dcgan and denoiser do not need each other [all in turn]",
    )  # fmt: skip
    add_options(PARSER)
    ARGUMENTS = PARSER.parse_args()

import contextlib
import copy
import functools
import math
import os

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

import modules
from dataset import MAP, PIXELS, BrainSlices, Crop, Data, evenly, open_data, unit_range
from modules import VQVAE, CodeMap, generator_of
from scores import metrics
from stages.decoder import last_vqvae, train_decoder
from stages.denoiser import train_denoiser
from stages.index_maps import RealMaps, trained_vqvae
from stages.losses import loss_of, random_corner
from stages.stage import (
    CROP,
    JITTER,
    MONITOR,
    NOISE,
    REVIVE,
    START,
    Feed,
    Run,
    Stage,
    batch_rows,
    likeness,
    open_seed,
    order_of,
    require_file,
    seeded,
    update_average,
)
from support import checkpoints, device, distributed, endings, files, messages, runs
from support.muon import make_optimizer

# --- stage 1: VQ-VAE ----------------------------------------------------------------------


def train_vqvae(run: Run):
    """Train until `vqvae_kimg`; `vqvae_best.pt` holds the weights of best validation SSIM."""
    config, train = run.config, run.data.train
    model = seeded(run.seed, 0, lambda: modules.make_vqvae(config)).to(run.device)
    optimizer = make_optimizer(model, config.optimizer, config.lr, (0.9, 0.999))
    stage = Stage(run, "vqvae", {"model": model, "optimizer": optimizer})
    delay = 0 if config.original else int(config.codebook_delay * stage.steps)
    slices, crop = Feed(train.images, run.device), crop_of(train, config)
    loss = loss_of(train, config)
    step = device.Recorded(functools.partial(vqvae_step, model, optimizer, config, loss))
    while not stage.done:
        if stage.step == delay and not config.original:
            start_codebook(model, train, run)
        lr = stage.lr(config.lr)
        device.set_lr(lr, optimizer)
        images = unit_range(crop.cut(slices[train.rows[batch_rows(stage)]], PIXELS))
        draw = generator_of(run.seed, CROP, stage.step)
        corner = random_corner(*images.shape[2:], config.window_px, draw)
        corner = device.sent(corner, run.device)
        values, coded = step(images, corner, quantize=stage.step >= delay)
        if coded is not None:
            values = values | {"revived": revive_codes(model, *coded, stage)}
        stage.after_step(values, lambda: measure_vqvae(model, stage), lr)
    stage.progress.close()


def vqvae_step(
    model: VQVAE, optimizer, config, loss, images: Tensor, corner: Tensor, quantize: bool
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """One step on images (B, 1, H, W): eq. 3 of arXiv:1711.00937, then the codebook.

    images: this process's share of the batch. corner (2,): of the loss's window. quantize
    False: a plain autoencoder. At first z moves fast, and codes that follow it would be lost.
    Returns losses, and z and errors of `modules.Quantized` if codes may be revived.
    """
    with device.autocast(images.device, config.precision):
        output, quantized = model(images, quantize)
    total = loss(output.float(), images, corner)
    values = {"reconstruction": total}
    if quantized is not None:
        total = total + config.commitment * quantized.commitment
        values["commitment"] = quantized.commitment
        if config.original:
            total = total + quantized.codebook_loss
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    values = {name: value.detach() for name, value in {"loss": total, **values}.items()}
    distributed.average_gradients(model, *values.values())
    optimizer.step()
    if quantized is None or config.original:
        return values, None
    distributed.sum_(quantized.counts, quantized.sums)
    model.quantizer.update(quantized.counts, quantized.sums, config.codebook_decay)
    return values, (quantized.z, quantized.errors)


def crop_of(train: BrainSlices, config: Config) -> Crop:
    """The crop around all heads of the training split; whole slices in the original recipe."""
    return Crop() if config.original else Crop.around_heads(train.brightest())


@torch.no_grad()
def start_codebook(model: VQVAE, train: BrainSlices, run: Run):
    """Start the codes as encoder outputs, spread by k-means++ (Arthur, Vassilvitskii 2007)."""
    rows = order_of(run.seed, START, len(train), 0, min(64, len(train)))
    z = model.pre_vq(model.encoder(train.batch(rows).to(run.device)))  # (B, D, h, w)
    # Background is one vector, repeated many times: it counts once.
    vectors = modules.cells(z).cpu().unique(dim=0)  # (N, D)
    codes = len(model.quantizer.codebook)
    draw = generator_of(run.seed, START)
    vectors = vectors[torch.randperm(len(vectors), generator=draw)[: 32 * codes]]
    if distributed.first(lambda: len(vectors) < codes):
        return
    # One process chooses: other machines may round, and then choose, differently.
    start = distributed.first(
        lambda: kmeans_plusplus(vectors.numpy(), codes, random_state=run.seed)[0]
    )
    start = torch.from_numpy(start).to(run.device)
    model.quantizer.replace(torch.arange(codes, device=run.device), start)


def revive_codes(model: VQVAE, z: Tensor, errors: Tensor, stage: Stage) -> Tensor:
    """Move dead codes every `revive_every` steps, in the first 70 % of training.

    Returns the number of moved codes, as a float ().
    """
    config, step, revived = stage.run.config, stage.step, 0
    if step % config.revive_every == config.revive_every - 1 and step < 0.7 * stage.steps:
        draw = generator_of(stage.run.seed, REVIVE, step)
        whole = map(distributed.gathered, (z, errors))
        revived = model.quantizer.revive(*whole, config.revive_below, draw)
    return errors.new_full((), float(revived))


@torch.no_grad()
def measure_vqvae(model: VQVAE, stage: Stage) -> dict:
    """Validation scores, ten times in a training; keeps the best weights."""
    if not stage.due(10):
        return {}
    validation = stage.run.data.validation
    images = validation.batch(evenly(len(validation), 128))
    indices = distributed.in_shares(model.encode, images)
    scores = likeness(images, distributed.in_shares(model.decode, indices))
    counts = torch.bincount(indices.flatten(), minlength=stage.run.config.codes)
    stage.offer(-scores["ssim_validation"], model=model)
    if stage.done:
        warn_of_blanks(stage, images)
    used = int((counts > 0).sum())
    return scores | {"perplexity": metrics.perplexity(counts), "used_codes": used}


def warn_of_blanks(stage: Stage, images: Tensor):
    """Warn if the best SSIM is no better than that of black slices.

    Most of a slice is black, so the SSIM of a dead decoder looks like a score.
    """
    black = metrics.ssim(images, torch.zeros_like(images)).mean().item()
    if stage.best is None or -stage.best < black + 0.01:
        best = "none" if stage.best is None else f"{-stage.best:.3f}"
        messages.warn(
            f"the VQ-VAE has learned nothing: SSIM of reconstructions {best}, of black slices "
            f"{black:.3f}; try a lower --lr, or a larger --vqvae-kimg"
        )


# --- stage 2: index maps ------------------------------------------------------------------


def extract_codes(run: Run):
    """Write `codes.npy` (slices, 64, 64) uint16, all splits, and `codes.pt`, the code map."""
    require_file(run.path("vqvae_best.pt"), "vqvae")
    weights = checkpoints.checksum(run.path("vqvae_best.pt"))
    if distributed.first(lambda: codes_are_current(run, weights)):
        return
    model = trained_vqvae(run)
    write_maps(model, run)
    distributed.first(lambda: write_code_map(model, run, weights))


def codes_are_current(run: Run, weights: int) -> bool:
    """Whether both files are whole and were made with these VQ-VAE weights."""
    path, maps = run.path("codes.pt"), run.path("codes.npy")
    if not (path.exists() and maps.exists()):
        return False
    try:
        values = checkpoints.load_checkpoint(path, stage="codes", **run.fingerprint())
        with checkpoints.reading(path):
            return values["vqvae"] == weights and values["maps"] == checkpoints.checksum(maps)
    except UserError as problem:
        messages.warn(f"{problem}; extracting the index maps again")
        return False


@torch.no_grad()
def write_maps(model: VQVAE, run: Run):
    """Write codes.npy (slices, 64, 64) uint16. All processes encode, the first one writes."""
    slices, n = run.data.images, 64 * distributed.count()  # (slices, 256, 256) uint8
    target = files.replacing(run.path("codes.npy"))
    if not distributed.is_first():
        target = contextlib.nullcontext(os.devnull)  # the others only help to encode

    def encode(pixels: np.ndarray) -> Tensor:
        return model.encode(unit_range(torch.from_numpy(np.array(pixels)))).short()

    with target as path, open(path, "wb") as file:
        files.write_npy_header(file, np.uint16, (len(slices), MAP, MAP))
        starts = range(0, len(slices), n)
        for start in messages.progress(starts, total=len(starts), label="index maps"):
            maps = distributed.in_shares(encode, slices[start : start + n])
            file.write(maps.numpy().view(np.uint16).tobytes())  # a type that torch lacks
            run.signals.check(lambda: None)


@torch.no_grad()
def write_code_map(model: VQVAE, run: Run, weights: int):
    """Write codes.pt, from codes.npy: used codes, their places, the crop, slice levels."""
    config, data = run.config, run.data
    maps = files.mapped(run.path("codes.npy"))
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {name: histogram(maps, split.rows, config.codes) for name, split in splits.items()}
    black = torch.zeros(1, 1, 256, 256)
    code_map = CodeMap.fit(
        model.quantizer.codebook.cpu(), counts["train"], config.order, config.map_channels,
        crop=crop_of(data.train, config), background=int(model.encode(black)[0, 0, 0]),
    )  # fmt: skip
    U, total = len(code_map.used), metrics.perplexity(counts["train"])
    if U < 2:
        problem = "the codebook collapsed to one code; try a lower --lr or another --seed"
        raise UserError(Exit.DIVERGED, problem)
    values = {"stage": "codes", **run.fingerprint(), **code_map.saved(), "counts": counts}
    values |= {"vqvae": weights, "maps": checkpoints.checksum(run.path("codes.npy"))}
    values |= {"levels": level_table(data.train.levels)}
    checkpoints.save_checkpoint(run.path("codes.pt"), values)
    messages.say(f"codes: {U} of {config.codes} used, perplexity {total:.0f} (training split)")


def histogram(maps: np.ndarray, rows: np.ndarray, codes: int) -> Tensor:
    """Uses of each code in these rows of maps: (K,) int64."""
    parts = np.array_split(rows, max(1, len(rows) // 1024))
    counts = sum(np.bincount(maps[part].ravel(), minlength=codes) for part in parts)
    return torch.from_numpy(counts)


def level_table(levels: np.ndarray) -> Tensor:
    """1,024 slice levels distributed as the training split's known ones; (0,) if none is."""
    known = levels[np.isfinite(levels)]
    if len(known) == 0:
        return torch.zeros(0)
    quantiles = np.quantile(known, (np.arange(1024) + 0.5) / 1024, method="nearest")
    return torch.from_numpy(quantiles.astype(np.float32))


# --- stage 4: DCGAN -----------------------------------------------------------------------


class Gan(RealMaps):
    """Both networks, the generator's average, their optimisers, and the maps they learn from.

    The default recipe: relativistic pairs with R1 and R2 (R3GAN, arXiv:2501.05441). R1 and R2
    are computed every `penalty_every` steps with that multiple of their weight (lazily: Karras
    et al. 2020, arXiv:1912.04958, appendix B).
    """

    beta2 = 0.99

    def __init__(self, run: Run):
        super().__init__(run)
        self.make_networks()

    def make_networks(self):
        run, config, size = self.run, self.run.config, self.code_map.crop.size
        self.G = seeded(run.seed, 1, lambda: modules.make_generator(config, size))
        self.D = seeded(run.seed, 2, lambda: modules.make_discriminator(config, size))
        for network in (self.G, self.D):
            distributed.share_batch_norm(network.to(run.device))
        self.average = copy.deepcopy(self.G).eval().requires_grad_(False)
        betas = config.gan_beta1, self.beta2
        self.G_optimizer, self.D_optimizer = (
            make_optimizer(network, config.optimizer, lr, betas, config.gan_momentum)
            for network, lr in zip((self.G, self.D), config.gan_lr, strict=True)
        )

    def parts(self) -> dict:
        return {
            "G": self.G, "D": self.D, "average": self.average,
            "G_optimizer": self.G_optimizer, "D_optimizer": self.D_optimizer,
        }  # fmt: skip

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """This process's share of real maps (B, C, h, w), their levels (B,), noise (B, Z)."""
        run, n = self.run, stage.batch_size
        mine, chosen = distributed.share(n), batch_rows(stage)
        maps = self.code_map.crop.cut(self.real_maps(run.data.train.rows[chosen]))
        u = self.code_map.encode(maps)  # (B, C, h, w)
        if self.code_map.even:
            u = self.jitter(u.expand(-1, run.config.map_channels, -1, -1), stage, mine)
        draw = generator_of(run.seed, NOISE, stage.step)
        noise = torch.randn((n, run.config.noise_dim), generator=draw)[mine]
        levels = device.sent(self.levels[chosen], run.device)
        return u, levels, device.sent(noise, run.device)

    def jitter(self, u: Tensor, stage: Stage, mine: slice) -> Tensor:
        """Move binned values within their bins: by exact values D could recognise real maps."""
        draw = generator_of(self.run.seed, JITTER, stage.step)
        jitter = torch.rand((stage.batch_size, 1, *u.shape[2:]), generator=draw)[mine]
        return u + (device.sent(jitter, self.run.device) * 2 - 1) / len(self.code_map.used)

    def autocast(self):
        return device.autocast(self.run.device, self.run.config.precision)

    def discriminator_loss(
        self, real: Tensor, fake: Tensor, level: Tensor, penalise: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """D's loss, its logits (B,) of the real maps, and the penalties if they are due."""
        config = self.run.config
        both, levels = torch.cat([real, fake]), torch.cat([level, level])
        with self.autocast():
            real_score, fake_score = self.D(both, levels).float().chunk(2)
        loss = modules.relativistic_loss(real_score, fake_score)
        if not penalise:
            return loss, real_score, {}
        with self.autocast():
            r1, r2 = modules.gradient_penalty(self.D, both, levels).chunk(2)
        r1, r2 = r1.mean(), r2.mean()
        loss = loss + config.gamma / 2 * config.penalty_every * (r1 + r2)
        return loss, real_score, {"r1": r1, "r2": r2}

    def generator_loss(self, fake_score: Tensor, real_score: Tensor) -> Tensor:
        """G's loss. real_score is of D one step before, which costs no further pass."""
        return modules.relativistic_loss(fake_score, real_score.detach())


class OriginalGan(Gan):
    """The original recipe: BCE, real and generated maps in separate batches (BatchNorm)."""

    beta2 = 0.999

    def jitter(self, u: Tensor, stage: Stage, mine: slice) -> Tensor:
        return u

    def discriminator_loss(self, real, fake, level, penalise):
        with self.autocast():
            scores = self.D(real, level).float(), self.D(fake, level).float()
        loss = modules.bce_loss(scores[0], 1.0) + modules.bce_loss(scores[1], 0.0)
        return loss, scores[0], {}

    def generator_loss(self, fake_score, real_score):
        return modules.bce_loss(fake_score, 1.0)


def train_dcgan(run: Run):
    """Train until `gan_kimg`; `dcgan_best.pt` is the latest generator of good validation FD."""
    config = run.config
    gan = OriginalGan(run) if config.original else Gan(run)
    stage = Stage(run, "dcgan", gan.parts(), **gan.link)
    monitor = None if stage.done else Monitor(gan)
    step = device.Recorded(functools.partial(dcgan_step, gan))
    while not stage.done:
        lr, d_lr = map(stage.lr, config.gan_lr)
        device.set_lr(lr, gan.G_optimizer)
        device.set_lr(d_lr, gan.D_optimizer)
        penalise = stage.step % config.penalty_every == 0
        values = step(*gan.batch(stage), penalise=penalise)
        half_life = min(config.ema_kimg * 1000, 0.05 * stage.nimg)
        update_average(gan.average, gan.G, half_life, config.gan_batch_size)
        stage.after_step(values, lambda: monitor.measure(stage), lr)
    stage.progress.close()


def dcgan_step(
    gan: Gan, real: Tensor, level: Tensor, noise: Tensor, penalise: bool
) -> dict[str, Tensor]:
    """One step of the discriminator, then one of the generator, on a `Gan.batch`."""
    with gan.autocast():
        fake = gan.G(noise, level)  # (B, C, h, w)
    d_loss, real_score, penalties = gan.discriminator_loss(
        real, fake.detach().float(), level, penalise
    )
    gan.D_optimizer.zero_grad(set_to_none=True)
    d_loss.backward()
    distributed.average_gradients(gan.D, d_loss, *penalties.values())
    gan.D_optimizer.step()

    gan.D.requires_grad_(False)
    with gan.autocast():
        fake_score = gan.D(fake, level).float()
    g_loss = gan.generator_loss(fake_score, real_score)
    gan.G_optimizer.zero_grad(set_to_none=True)
    g_loss.backward()
    distributed.average_gradients(gan.G, g_loss)
    gan.G_optimizer.step()
    gan.D.requires_grad_(True)
    values = {"g_loss": g_loss, "d_loss": d_loss, **penalties}
    return {name: value.detach() for name, value in values.items()}


class Monitor:
    """Measures samples during the DCGAN's training: collapse, distance to validation slices."""

    @torch.no_grad()
    def __init__(self, gan: Gan):
        run, self.gan = gan.run, gan
        self.vqvae, config = last_vqvae(gan), run.config
        self.network = metrics.RandomFeatures()
        train, validation = run.data.train, run.data.validation
        n = min(config.monitor_samples, len(validation), len(train) // 2)
        self.floor, self.n = metrics.relative_floor(self.features(train, 4 * n), n), n
        self.real = self.features(validation, self.n)
        maps = gan.real_maps(train.rows[evenly(len(train), 64)])
        self.real_spread = mean_distance(gan.code_map.encode(maps))
        numbers = range(max(64, self.n))
        self.noise = modules.noise_of(
            numbers, config.noise_dim, run.seed, gan.level_table, MONITOR
        )

    def features(self, split: BrainSlices, count: int) -> Tensor:
        """Features (count, F) of evenly spaced slices of a split, 64 in memory at a time."""
        parts = np.array_split(evenly(len(split), count), math.ceil(count / 64))
        return torch.cat([self.network.features(split.batch(part)) for part in parts])

    def features_of(self, maps: Tensor) -> Tensor:
        """Features (n, F) of index maps (n, 64, 64), decoded."""
        return self.network.features(modules.in_full_batches(self.vqvae.decode, maps))

    @torch.no_grad()
    def measure(self, stage: Stage) -> dict:
        """Return diversity (real maps: 1) for each row, and fd_validation for eight of them.

        Both without the denoiser, which would hide what the generator has not learned.
        """
        gan, full = self.gan, stage.due(8)
        n = self.n if full else 64
        draw = functools.partial(modules.draw_maps, gan.average, gan.code_map)
        maps = distributed.in_shares(draw, *(part[:n] for part in self.noise))
        diversity = mean_distance(gan.code_map.encode(maps[:64])) / self.real_spread
        values = {"diversity": diversity}
        if full:
            features = distributed.in_shares(self.features_of, maps)
            score = distributed.first(
                lambda: metrics.frechet_distance(features, self.real) / self.floor
            )
            values["fd_validation"] = score
            stage.offer(score, gan.run.config.gan_tolerance, generator=gan.average)
            if stage.done and diversity < 0.1:
                messages.warn(
                    f"the samples of seed {stage.run.seed} are nearly alike: diversity "
                    f"{diversity:.3f} (real maps: 1); try another --seed or a larger --gamma"
                )
        return values


def mean_distance(u: Tensor) -> float:
    """Mean Euclidean distance of all pairs of maps (B, C, h, w); 0 after a collapse."""
    return torch.pdist(u.flatten(1).cpu()).mean().item()


# --- all stages ---------------------------------------------------------------------------

STAGES = {
    "vqvae": train_vqvae, "codes": extract_codes, "decoder": train_decoder,
    "dcgan": train_dcgan, "denoiser": train_denoiser,
}  # fmt: skip
MIN_SLICES = 6  # of validation and test: precision and recall need 5 neighbours


def run_stages(run: Run, names):
    """Run these stages, but not those of length 0.

    A signal saves and ends them; out of memory is exit 8.
    """
    with run.signals:
        for name in names:
            if name in TRAINED and name not in run.config.trained:
                continue
            try:
                STAGES[name](run)
                device.release_memory()
            except Exception as problem:
                if name not in TRAINED or not device.is_out_of_memory(problem):
                    raise
                flag, size = batch_of(run.config, name)
                advice = f"out of memory in stage {name}; try {flag} {max(1, size // 2)}"
                raise UserError(Exit.MEMORY, advice) from None


def batch_of(config: Config, stage: str) -> tuple[str, int]:
    """The flag of a stage's batch size, and its value."""
    name = TRAINED[stage].batch_size
    return flag_of(FIELDS[name]), getattr(config, name)


def check_shares(config: Config):
    """Raise UserError (exit 2) unless each process gets an even share of each batch."""
    n = distributed.count()
    for flag, size in (batch_of(config, stage) for stage in config.trained):
        if size % n:
            raise UserError(
                Exit.USAGE, f"{flag} {size} does not divide evenly among {n} processes"
            )


def check_enough(data: Data):
    """Raise UserError (exit 3) before training if there are too few slices for the scores."""
    sizes = len(data.train) // 2, len(data.validation), len(data.test)
    least = max(MIN_SLICES, distributed.count())  # each process measures a share
    if min(sizes) < least:
        raise UserError(
            Exit.DATA,
            f"too few slices: training {len(data.train)}, validation {sizes[1]}, "
            f"test {sizes[2]}; needed are {2 * least}, {least} and {least}",
        )


@distributed.joined()
def main(arguments):
    config = config_from(arguments)
    device.choose_device(config.device)
    check_shares(config)
    runs.check_out(config)
    data = open_data(config)
    check_enough(data)
    given = data.fingerprint, "seed" in arguments, "runs" in arguments
    folder, seeds = distributed.first(lambda: runs.results_folder(config, *given))
    with runs.writing_alone(folder):
        run = open_seed(folder, config, seeds[0], data)
        with messages.logging_to(run.path("run.log")):
            run_stages(run, STAGES if arguments.stage == "all" else [arguments.stage])
            messages.say(f"{arguments.stage} done: {run.folder}")


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
