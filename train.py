"""The stages: VQ-VAE, index maps, decoder, DCGAN, denoiser. Each continues where it stopped.

In: a `Config` and the slices of `dataset.open_data`. Out, in one folder per seed:
`vqvae_best.pt`, `codes.npy` with `codes.pt` (index maps of every slice, uint16, and the code
map), `decoder_best.pt`, `dcgan_best.pt`, `denoiser_best.pt`, `log.csv`. Also a script:
`python train.py --stage vqvae|codes|decoder|dcgan|denoiser`.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from config import SEEN, Config, Exit, Parser, UserError, add_options, config_from

if __name__ == "__main__":  # a mistyped flag must not wait for torch
    PARSER = Parser("Train one stage, or all of them. The same command again continues.")
    PARSER.add_argument(
        "--stage", choices=("all", "vqvae", "codes", "decoder", "dcgan", "denoiser"),
        default="all", help="vqvae; codes (needs vqvae); decoder, if it has a length; dcgan; "
        "denoiser (these need codes, dcgan the decoder, denoiser dcgan) [all in turn]",
    )  # fmt: skip
    add_options(PARSER)
    ARGUMENTS = PARSER.parse_args()

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import kmeans_plusplus
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

import metrics
import modules
import processes
import runtime
from dataset import BrainSlices, Data, evenly, open_data, unit_range
from modules import VQVAE, Box, CodeMap, Denoiser, generator_of
from optimizers import Muon, make_optimizer

COLUMNS = (
    "stage", "nimg", "seconds", "images_per_s", "lr",
    "loss", "reconstruction", "commitment", "perplexity", "used_codes", "revived",
    "ssim_validation", "psnr_validation",
    "g_loss", "d_loss", "r1", "r2", "diversity", "fd_validation", "loss_validation",
)  # fmt: skip

ROWS = 40  # rows of log.csv per stage
CHECKPOINT_EVERY_S = 60
WARM_UP = 0.05  # share of a stage's steps over which the learning rate rises
PLAIN = 0.1  # share of the VQ-VAE's steps before its codebook starts from what z has become
DETAIL = 2.0  # weight of the strength of detail in the reconstruction loss
WINDOW = 128  # side, in pixels, of what SSIM and patches see of a slice in one step
ADVERSARIAL = 0.1  # weight of the patches' verdict in the decoder's loss
DECODER_LR, PATCH_LR, PATCH_GAMMA = 1e-3, 2e-3, 1e-4
PATCH_NOISE = 0.005  # sd of the noise on what the discriminator of patches sees
DECODER_HALF_LIFE = 1500  # of the average of the decoder's weights, in slices seen
SSIM_ALIKE = 1.25  # a sharper decoder may have so much more of 1 - SSIM than stage 1's
REVIVE_EVERY = 25  # steps between two looks for unused codes, in the first 70 % of training
FD_ALIKE = 1.2  # fd_validation wavers by so much near its floor, while layout is still learnt
COLLAPSED = 0.1  # diversity under which samples are nearly alike, after a quarter of the steps
CROP_CELLS, DENOISER_LR, DENOISER_HALF_LIFE = 32, 3e-3, 2000  # the last in crops seen
GAN_MOMENTUM = 0.5  # of the DCGAN's kernels: its aim moves
TO_MOST = 0.7  # below 1, more of a denoiser's crops have much noise, which is learned last
REVIVE_BELOW = 0.7  # uses per step, on average, under which a code counts as unused

LOWER = {"vqvae": "a lower --lr, or ", "dcgan": "lower --gan-lr, or "}  # if it diverges

# What a random number is for: with seed and position it makes its generator.
WEIGHTS, ORDER, CROP, REVIVE, NOISE, JITTER, START, MONITOR, DENOISE, SHARPEN = range(1, 11)


@dataclass
class Run:
    """One seed's folder and everything that its stages need."""

    folder: Path
    config: Config
    seed: int
    data: Data
    device: torch.device
    signals: runtime.Signals = field(default_factory=runtime.Signals)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = runtime.Log(self.folder / "log.csv", COLUMNS)

    def fingerprint(self) -> dict:
        """What a checkpoint must have been made with to be continued here."""
        return {
            "config": self.config.identity(), "seed": self.seed, "data": self.data.fingerprint,
        }  # fmt: skip

    def path(self, name: str) -> Path:
        return self.folder / name


class Stage:
    """A training stage's place: images seen, best score, log rows, checkpoints, signals."""

    def __init__(self, run: Run, name: str, kimg: float, batch_size: int, parts: dict, **given):
        """parts: what is saved. given: further values that a checkpoint must match."""
        self.run, self.name, self.parts, self.batch_size = run, name, parts, batch_size
        self.steps = max(1, math.ceil(kimg * 1000 / batch_size))
        self.every = max(1, self.steps // ROWS)  # steps per row
        self.expected = {"stage": name, **run.fingerprint(), **given}
        self.nimg, self.best, self.seconds, self.row_seconds = 0, None, 0.0, 0.0
        self.sums: dict[str, Tensor] = {}  # since the last row: sum, and of how many steps
        self.last = run.path(f"{name}_last.pt")
        self.restore()
        self.saved = self.clock = time.monotonic()
        self.shown = runtime.Progress(
            self.steps * batch_size, f"seed {run.seed} {name}", SEEN[name], self.nimg
        )

    @property
    def step(self) -> int:
        return self.nimg // self.batch_size

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def restore(self):
        values = processes.first_then_all(lambda: runtime.load_last(self.last, **self.expected))
        if values is None:
            if processes.is_first():
                self.run.log.keep(self.name, -1)
            return
        with runtime.reading(self.last):
            for name, part in self.parts.items():
                part.load_state_dict(values["parts"][name])
            for name in ("nimg", "best", "seconds", "row_seconds"):
                setattr(self, name, values[name])
            self.sums = {k: v.to(self.run.device) for k, v in values["sums"].items()}
        if processes.is_first():
            self.run.log.keep(self.name, self.nimg)
        if not self.done:
            runtime.say(f"{self.name}: continuing at {self.nimg} images seen")

    def save(self):
        """Write `last`; for all processes, by the first."""
        self.tick()
        processes.first(self.write)
        self.saved = time.monotonic()

    def write(self):
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        values = {
            name: getattr(self, name) for name in ("nimg", "best", "seconds", "row_seconds")
        }
        values |= {"sums": self.sums, "parts": parts}
        runtime.save_checkpoint(self.last, self.expected | values, keep_previous=True)

    def offer(self, score: float, alike: float = 1.0, **weights: torch.nn.Module):
        """Keep these weights as the best if `score` is finite and lower than any before.

        alike: up to this factor above the lowest, a score is as good; later weights are kept.
        """
        if not math.isfinite(score) or (self.best is not None and score >= self.best * alike):
            return
        self.best = score if self.best is None else min(score, self.best)
        path = self.run.path(f"{self.name}_best.pt")
        state = {name: module.state_dict() for name, module in weights.items()}
        values = self.expected | {"nimg": self.nimg, "score": score} | state
        processes.first(lambda: runtime.save_checkpoint(path, values))

    def tick(self):
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def lr(self, base: float) -> float:
        """Cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) after a linear warm-up."""
        if self.run.config.schedule == "constant":
            return base
        warm = min(1.0, (self.step + 1) / (WARM_UP * self.steps + 1))
        return base * warm * max(0.01, 0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))

    def after_step(self, values: dict[str, Tensor], measure: Callable[[], dict], lr: float):
        """Count the step; then a log row, a checkpoint, an end by signal, if they are due."""
        for name, value in values.items():
            once = torch.stack([value.detach(), torch.ones_like(value)])
            self.sums[name] = self.sums.get(name, 0) + once
        self.nimg += self.batch_size
        self.shown.add(self.batch_size)
        row_due = self.step % self.every == 0 or self.done
        if row_due or self.run.device.type == "cpu":  # elsewhere a look would stall the device
            self.check_finite(values)
        if row_due:
            self.write_row(measure(), lr)
        if processes.agreed(self.done or time.monotonic() - self.saved > CHECKPOINT_EVERY_S):
            self.save()
        self.run.signals.check(self.save)

    def check_finite(self, values: dict[str, Tensor]):
        bad = [name for name, value in values.items() if not torch.isfinite(value).all()]
        if bad:
            raise UserError(
                Exit.DIVERGED,
                f"{self.name} diverged: {bad[0]} is not finite at step {self.step} "
                f"({self.nimg} images seen) of seed {self.run.seed}; {self.last.name} is from "
                f"before. Try {LOWER.get(self.name, '')}--precision float32",
            )

    def write_row(self, measured: dict, lr: float):
        self.tick()
        steps = (self.step - 1) % self.every + 1
        means = {name: (total / n).item() for name, (total, n) in self.sums.items()}
        rate = steps * self.batch_size / max(self.seconds - self.row_seconds, 1e-9)
        self.sums, self.row_seconds = {}, self.seconds
        if processes.is_first():
            self.run.log.add(
                stage=self.name, nimg=self.nimg, seconds=round(self.seconds, 1),
                images_per_s=round(rate, 1), lr=lr, **means, **measured,
            )  # fmt: skip
        if measured:
            runtime.release_memory()  # or what measuring took would lie among what steps take


def set_lr(lr: float, optimizer: torch.optim.Optimizer):
    """On a GPU the rate is a number there, (), where a `runtime.Recorded` step finds it."""
    groups = optimizer.param_groups
    device = next(weight.device for group in groups for weight in group["params"])
    for group in groups:
        if device.type != "cuda":
            group["lr"] = lr
            continue
        if not isinstance(group["lr"], Tensor) or group["lr"].device != device:
            group |= {"lr": torch.zeros((), device=device), "capturable": True}
        group["lr"].fill_(lr)


def order_of(seed: int, purpose: int, n: int, start: int, count: int) -> np.ndarray:
    """Items start .. start+count-1 of an endless sequence of shuffled epochs of range(n)."""
    places = np.arange(start, start + count)
    epochs = range(start // n, (start + count - 1) // n + 1)
    parts = [permutation(seed, purpose, n, e)[places[places // n == e] % n] for e in epochs]
    return np.concatenate(parts)


def batch_rows(stage: Stage) -> np.ndarray:
    """This process's share of the batch, as positions in the training split: (B,)."""
    run, n = stage.run, stage.batch_size
    order = order_of(run.seed, ORDER, len(run.data.train), stage.nimg, n)
    return order[processes.share(n)]


@functools.lru_cache(maxsize=4)
def permutation(seed: int, purpose: int, n: int, epoch: int) -> np.ndarray:
    return torch.randperm(n, generator=generator_of(seed, purpose, epoch)).numpy()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without waiting for what a GPU is at."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class Feed:
    """Rows of a memory map as tensors on a device; on a GPU, all of it is there if it fits.

    array: (n, ...). Kept is a copy that takes at most `SHARE` of the GPU's free
    memory; else, and on a CPU, rows are read when they are asked for.
    """

    SHARE = 0.5

    def __init__(self, array: np.ndarray, device: torch.device):
        self.array, self.device, self.kept = array, device, None
        if array.nbytes <= self.SHARE * free_memory(device):
            one = self[np.arange(1)]
            kept = torch.empty(array.shape, dtype=one.dtype, device=device)
            for rows in np.array_split(np.arange(len(array)), max(1, len(array) // 1024)):
                kept[rows[0] : rows[-1] + 1] = self[rows]
            self.kept = kept

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        if self.kept is None:
            return sent(torch.from_numpy(self.array[rows]), self.device)
        return self.kept[sent(torch.from_numpy(rows), self.device)]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; 0 elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def seeded(seed: int, network: int, make: Callable):
    """Call `make` with torch's global random state set, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(seed, WEIGHTS, network).initial_seed())
        return make()


def require(run: Run, name: str, kimg: float):
    """Raise UserError (exit 4) unless stage `name` of this run is done."""
    path = run.path(f"{name}_last.pt")
    require_file(path, name)
    values = runtime.load_checkpoint(path, stage=name, **run.fingerprint())
    if values["nimg"] < kimg * 1000:
        raise UserError(
            Exit.CHECKPOINT, f"{path}: stage {name} is not finished; run --stage {name} again"
        )


def require_file(path: Path, stage: str):
    if not path.exists():
        raise UserError(
            Exit.CHECKPOINT,
            f"{path}: no such file; run --stage {stage} first, with this --out",
        )


# --- stage 1: VQ-VAE ----------------------------------------------------------------------


def train_vqvae(run: Run):
    """Train until `vqvae_kimg`; `vqvae_best.pt` holds the weights of best validation SSIM."""
    config, train = run.config, run.data.train
    model = seeded(run.seed, 0, lambda: modules.make_vqvae(config)).to(run.device)
    optimizer = make_optimizer(model, config.optimizer, config.lr, (0.9, 0.999))
    parts = {"model": model, "optimizer": optimizer}
    stage = Stage(run, "vqvae", config.vqvae_kimg, config.batch_size, parts)
    plain = int(PLAIN * stage.steps) if config.codebook == "ema" else 0
    variance, heads = data_variance(train, config), heads_in(train, config)
    slices = Feed(train.images, run.device)
    step = runtime.Recorded(functools.partial(vqvae_step, model, optimizer, config, variance))
    while not stage.done:
        if stage.step == plain and config.codebook == "ema":
            start_codebook(model, train, run)
        lr = stage.lr(config.lr)
        set_lr(lr, optimizer)
        images = unit_range(slices[train.rows[batch_rows(stage)]][heads])
        corner = corner_of(images, generator_of(run.seed, CROP, stage.step))
        values, badly_coded = step(images, corner, quantize=stage.step >= plain)
        if badly_coded is not None:
            values = values | {"revived": revive_codes(model, *badly_coded, stage)}
        stage.after_step(values, lambda: measure_vqvae(model, stage, run), lr)
    stage.shown.close()


def vqvae_step(
    model: VQVAE, optimizer, config, variance: float, images, corner, quantize: bool
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """One step on images (B, 1, H, W): eq. 3 of arXiv:1711.00937, and the codebook.

    images: this process's share of the batch; gradients and statistics are the whole batch's.
    corner: of the window that the loss looks at, (2,). quantize False: the plain autoencoder.
    At first z moves fast, and codes that follow it would be lost; they start when it has
    settled. Returns losses, and `inputs` and `errors` of `modules.Quantized` for revival.
    """
    with runtime.autocast(images.device, config.precision):
        output, quantized = model(images, quantize)
    reconstruction = reconstruction_loss(output.float(), images, config, variance, corner)
    loss, values = reconstruction, {"reconstruction": reconstruction}
    if quantized is not None:
        loss = loss + config.commitment * quantized.commitment
        values["commitment"] = quantized.commitment
    if config.codebook == "loss":
        loss = loss + quantized.codebook_loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    values = {name: value.detach() for name, value in {"loss": loss, **values}.items()}
    processes.average_gradients(model, *values.values())
    optimizer.step()
    if quantized is None or config.codebook == "loss":
        return values, None
    processes.sum_(quantized.counts, quantized.sums)
    model.quantizer.update(quantized.counts, quantized.sums, config.codebook_decay)
    return values, (quantized.inputs, quantized.errors)


def revive_codes(model: VQVAE, inputs: Tensor, errors: Tensor, stage: Stage) -> Tensor:
    """Now and then, move codes that nothing uses. Returns how many were, as a float ()."""
    step, revived = stage.step, 0
    if step % REVIVE_EVERY == REVIVE_EVERY - 1 and step < 0.7 * stage.steps:
        draw = generator_of(stage.run.seed, REVIVE, step)
        whole = map(processes.gathered, (inputs, errors))
        revived = model.quantizer.revive(*whole, model.pre_vq, REVIVE_BELOW, draw)
    return errors.new_full((), float(revived))


def reconstruction_loss(output, images, config, variance: float, corner: Tensor) -> Tensor:
    """L1, and in the window at corner (2,) 1 - SSIM and the difference in strength of detail.

    Or squared error over data variance. Of output and images (B, 1, H, W). Where a decoder
    cannot know a detail, the best guess by error is to leave it out: the third term wants as
    much of it as there was, wherever it lies.
    """
    if config.reconstruction == "mse":
        return F.mse_loss(output, images) / variance
    windows = window_at(output, corner), window_at(images, corner)
    losses = metrics.in_micro_batches(window_loss, *windows)  # (B,)
    return F.l1_loss(output, images) + losses.mean()


def corner_of(images: Tensor, draw: torch.Generator) -> Tensor:
    """Top and left of a random window of images (.., H, W): (2,) int64, on their device."""
    ways = (side - WINDOW + 1 for side in images.shape[-2:])
    corner = torch.stack([torch.randint(n, (), generator=draw) for n in ways])
    return sent(corner, images.device)


def window_at(images: Tensor, corner: Tensor) -> Tensor:
    """The window of images (.., H, W) that begins at corner (2,): (.., WINDOW, WINDOW)."""
    if corner.device.type == "cpu":
        top, left = corner.tolist()
        return images[..., top : top + WINDOW, left : left + WINDOW]
    places = corner[:, None] + torch.arange(WINDOW, device=corner.device)  # no value is asked
    return images.index_select(-2, places[0]).index_select(-1, places[1])


def window_loss(x: Tensor, y: Tensor) -> Tensor:
    """1 - SSIM and the difference in strength of detail, of each of (B, 1, H, W): (B,)."""
    detail = metrics.detail_strength(x) - metrics.detail_strength(y)
    return 1 - metrics.ssim_core(x, y) + DETAIL * detail.abs().flatten(1).mean(1)


def data_variance(train: BrainSlices, config: Config) -> float:
    """Variance of the training slices' pixels, from at most 512 of them; 1 if no loss asks."""
    if config.reconstruction != "mse":
        return 1.0
    return max(train.batch(evenly(len(train), 512)).var().item(), 1e-6)


def heads_in(train: BrainSlices, config: Config) -> tuple:
    """Index of what of slices (.., 256, 256) is trained on: about all heads, much is black.

    Of 512 training slices, in whole cells of index maps, with all cells that see a head (3
    pixels further: `modules.blank_margins`). The original recipe takes all.
    """
    if config.reconstruction == "mse":
        return (...,)
    seen = torch.from_numpy(train.images[train.rows[evenly(len(train), 512)]].max(0))
    pixels = seen.shape[-1] // modules.MAP[-1]  # to a cell
    see = F.max_pool2d(seen[None].float(), pixels + 6, pixels, padding=3)[0] > 0  # (64, 64)
    sides = modules.sides_about(see)
    return (..., *(slice(pixels * side.start, pixels * side.stop) for side in sides))


@torch.no_grad()
def start_codebook(model: VQVAE, train: BrainSlices, run: Run):
    """Codes start as encoder outputs, spread by k-means++ (Arthur and Vassilvitskii 2007)."""
    rows = order_of(run.seed, START, len(train), 0, min(64, len(train)))
    z = model.pre_vq(model.encoder(train.batch(rows).to(run.device)))  # (B, D, h, w)
    # Background is one vector, many times: it counts once.
    vectors = z.permute(0, 2, 3, 1).flatten(0, 2).cpu().unique(dim=0)  # (N, D)
    codes = len(model.quantizer.codebook)
    draw = generator_of(run.seed, START)
    vectors = vectors[torch.randperm(len(vectors), generator=draw)[: 32 * codes]]
    # One process chooses: another machine might round, and then choose, otherwise.
    start = processes.first(
        lambda: (
            kmeans_plusplus(vectors.numpy(), codes, random_state=run.seed)[0]
            if len(vectors) >= codes
            else None
        )
    )
    if start is None:
        return
    start = torch.from_numpy(start).to(run.device)
    model.quantizer.replace(torch.arange(codes, device=run.device), start)


@torch.no_grad()
def measure_vqvae(model: VQVAE, stage: Stage, run: Run) -> dict:
    """Validation scores for the log, ten times in a training; keeps the best weights."""
    if not (stage.done or stage.step % (stage.every * max(1, ROWS // 10)) == 0):
        return {}
    validation = run.data.validation
    rows = evenly(len(validation), 128)
    images = validation.batch(rows[processes.share(len(rows))])
    indices = model.encode(images)
    outputs = model.decode(indices)
    counts = torch.bincount(indices.flatten(), minlength=run.config.codes)
    processes.sum_(counts)
    scores = likeness(images, outputs)
    stage.offer(-scores["ssim_validation"], model=model)
    if stage.done:
        warn_of_blanks(stage, images)
    used = int((counts > 0).sum())
    return scores | {"perplexity": modules.perplexity(counts), "used_codes": used}


def likeness(images: Tensor, outputs: Tensor) -> dict[str, float]:
    """Scores of reconstructions, for the log; of each process's share."""
    scores = torch.stack([metrics.ssim(images, outputs), metrics.psnr(images, outputs)], 1)
    ssim, psnr = processes.gathered(scores).mean(0).tolist()
    return {"ssim_validation": ssim, "psnr_validation": psnr}


def warn_of_blanks(stage: Stage, images: Tensor):
    """A slice is black for the most part: the SSIM of a dead decoder looks like a score.

    images: this process's share of those that the best score is of.
    """
    black = processes.gathered(metrics.ssim(images, torch.zeros_like(images))).mean().item()
    if stage.best is None or -stage.best < black + 0.01:
        best = "none" if stage.best is None else f"{-stage.best:.3f}"
        runtime.warn(
            f"the VQ-VAE has learned nothing: SSIM of reconstructions {best}, of black slices "
            f"{black:.3f}; try a lower --lr, or a larger --vqvae-kimg"
        )


def trained_vqvae(run: Run, stage: str = "vqvae", **given) -> VQVAE:
    """The best weights of stage 1, or 3. Raises UserError (exit 4) if they are unusable.

    given: further values that their checkpoint must match.
    """
    require(run, stage, getattr(run.config, f"{stage}_kimg"))
    path = run.path(f"{stage}_best.pt")
    model = modules.make_vqvae(run.config, sharper=stage == "decoder")
    values = runtime.load_checkpoint(path, stage=stage, **run.fingerprint(), **given)
    return runtime.load_weights(model, values.get("model"), path).to(run.device).eval()


def last_vqvae(real: "RealMaps") -> VQVAE:
    """The VQ-VAE that samples are decoded with: of stage 3, if there is one, else of 1."""
    stage, link = ("decoder", real.link) if real.run.config.decoder_kimg else ("vqvae", {})
    return trained_vqvae(real.run, stage, **link)


# --- stage 2: index maps ------------------------------------------------------------------


def extract_codes(run: Run):
    """Write `codes.npy` (slices, 64, 64) uint16, all splits, and `codes.pt`, the code map."""
    require_file(run.path("vqvae_best.pt"), "vqvae")
    weights = runtime.checksum(run.path("vqvae_best.pt"))
    if processes.first(lambda: codes_are_current(run, weights)):
        return
    model = trained_vqvae(run)
    write_maps(model, run)
    processes.first(lambda: write_code_map(model, run, weights))


def write_code_map(model: VQVAE, run: Run, weights: int):
    """codes.pt, from codes.npy: which codes the training split uses, and their places."""
    maps = np.load(run.path("codes.npy"), mmap_mode="r")
    counts = {
        name: histogram(maps, split.rows, run.config.codes) for name, split in splits(run)
    }
    code_map = CodeMap.fit(
        model.quantizer.codebook.cpu(),
        counts["train"],
        run.config.order,
        run.config.map_channels,
    )
    if len(code_map.used) < 2:
        raise UserError(
            Exit.DIVERGED,
            "the codebook collapsed to one code; try a lower --lr or another --seed",
        )
    values = {"stage": "codes", **run.fingerprint(), "vqvae": weights, "counts": counts}
    values |= {
        "maps": runtime.checksum(run.path("codes.npy")),
        "used": code_map.used,
        "points": code_map.points,
        "common": common_codes(maps, run),
    }
    values |= {"levels": level_table(run.data.train.levels)}
    runtime.save_checkpoint(run.path("codes.pt"), values)
    U, total = len(code_map.used), modules.perplexity(counts["train"])
    runtime.say(
        f"codes: {U} of {run.config.codes} used, perplexity {total:.0f} (training split)"
    )


def write_maps(model: VQVAE, run: Run):
    """Encode every slice of the source into codes.npy, (slices, 64, 64) uint16."""
    parts = index_maps(model, run)
    if not processes.is_first():
        for _ in parts:
            pass  # this process's share of the work is in them
        return
    with runtime.replacing(run.path("codes.npy")) as temporary, open(temporary, "wb") as file:
        for number, maps in enumerate(parts):
            if number == 0:
                shape = (len(run.data.images), *maps.shape[1:])
                runtime.write_npy_header(file, maps.dtype, shape)
            file.write(maps.tobytes())


def index_maps(model: VQVAE, run: Run) -> Iterator[np.ndarray]:
    """Index maps (n, 64, 64) uint16 of every slice of the source, in order, n at a time."""
    pixels, n = run.data.images, 64 * processes.count()  # (slices, 256, 256) uint8
    starts = range(0, len(pixels), n)
    for start in runtime.progress(starts, total=len(starts), label="index maps"):
        part = pixels[start : start + n]
        maps = encode_slices(model, part[processes.share(len(part))])
        yield np.concatenate(processes.collected(maps))
        run.signals.check(lambda: None)


def codes_are_current(run: Run, weights: int) -> bool:
    """Whether both files are whole and were made with these VQ-VAE weights."""
    path, maps = run.path("codes.pt"), run.path("codes.npy")
    if not (path.exists() and maps.exists()):
        return False
    try:
        values = runtime.load_checkpoint(path, stage="codes", **run.fingerprint())
        with runtime.reading(path):
            whole = "common" in values  # else of an earlier version
            alike = values["vqvae"] == weights and values["maps"] == runtime.checksum(maps)
            return whole and alike
    except UserError as problem:
        runtime.warn(f"{problem}; extracting the index maps anew")
        return False


def splits(run: Run) -> list[tuple[str, BrainSlices]]:
    data = run.data
    return [("train", data.train), ("validation", data.validation), ("test", data.test)]


@torch.no_grad()
def encode_slices(model: VQVAE, pixels: np.ndarray) -> np.ndarray:
    """Slices (B, 256, 256) uint8 -> index maps (B, 64, 64) uint16."""
    images = torch.from_numpy(pixels.astype(np.float32) / 255)[:, None]  # (B, 1, 256, 256)
    return model.encode(images).numpy().astype(np.uint16)


def histogram(maps: np.ndarray, rows: np.ndarray, codes: int) -> Tensor:
    """How often each code occurs in these rows of maps: (K,) int64."""
    counts = np.zeros(codes, np.int64)
    for part in np.array_split(rows, max(1, len(rows) // 1024)):
        counts += np.bincount(maps[part].ravel(), minlength=codes)
    return torch.from_numpy(counts)


def common_codes(maps: np.ndarray, run: Run) -> Tensor:
    """The code that all training maps have at a cell, -1 where they differ: (64, 64) int64.

    The original recipe draws whole maps: nowhere is one said to be common.
    """
    if run.config.gan_loss == "bce":
        return Box().common
    rows = run.data.train.rows
    low = high = maps[rows[0]]
    for part in np.array_split(rows, math.ceil(len(rows) / 1024)):
        low = np.minimum(low, maps[part].min(0))
        high = np.maximum(high, maps[part].max(0))
    return torch.from_numpy(np.where(low == high, low.astype(np.int64), -1))


def level_table(levels: np.ndarray) -> Tensor:
    """1,024 slice levels that are distributed as the training split's known ones; or none."""
    known = levels[np.isfinite(levels)]
    if len(known) == 0:
        return torch.zeros(0)
    quantiles = np.quantile(known, (np.arange(1024) + 0.5) / 1024, method="nearest")
    return torch.from_numpy(quantiles.astype(np.float32))


def code_map_of(values: dict, config: Config, path: Path) -> CodeMap:
    """The code map of codes.pt. Raises UserError (exit 4) unless it fits the configuration."""
    with runtime.reading(path):
        common = values["common"]
        indices = common.dtype == torch.int64 and common.shape == modules.MAP
        if not indices or common.min() < -1 or common.max() >= config.codes:
            raise ValueError("what its maps have in common are not codes")
        code_map = CodeMap(values["used"], values["points"], config.codes, Box(common))
        U, levels = len(code_map.used), values["levels"]
        whole = U == (code_map.rank >= 0).sum() > 0
        counts = dict(values["counts"])["train"]
        if not whole or counts.shape != (config.codes,):
            raise ValueError("its codes are not those of the codebook")
        if not code_map.even and code_map.points.shape != (U, config.map_channels):
            raise ValueError("a code has no place for each channel")
        if levels.ndim != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError("its slice levels are not from 0 to 1")
        return code_map


class RealMaps:
    """What stage 2 left: index maps, their code map, their levels.

    Raises UserError (exit 4) unless all of it belongs together.
    """

    def __init__(self, run: Run):
        config, self.run = run.config, run
        require_file(run.path("codes.pt"), "codes")
        values = runtime.load_checkpoint(
            run.path("codes.pt"), stage="codes", **run.fingerprint()
        )
        self.code_map = code_map_of(values, config, run.path("codes.pt")).to(run.device)
        with runtime.reading(run.path("codes.pt")):
            if values["vqvae"] != runtime.checksum(run.path("vqvae_best.pt")):
                raise ValueError("of another vqvae_best.pt; run --stage codes again")
            if values["maps"] != runtime.checksum(run.path("codes.npy")):
                raise ValueError("of another codes.npy; run --stage codes again")
        maps = np.load(run.path("codes.npy"), mmap_mode="r").view(np.int16)  # torch knows it
        self.maps = Feed(maps, run.device)
        self.levels = torch.from_numpy(run.data.train.levels)
        self.level_table = values["levels"]
        self.counts = dict(values["counts"])["train"]  # (K,), of each code
        self.link = {"codes": runtime.checksum(run.path("codes.pt"))}  # for checkpoints

    def real_maps(self, rows: np.ndarray) -> Tensor:
        """Index maps (n, h, w) int64 of these slices, on the run's device."""
        return self.maps[rows].long() & 0xFFFF


# --- stage 3: decoder ---------------------------------------------------------------------


class Decoding:
    """A larger decoder and its average, a discriminator of patches, their optimisers."""

    def __init__(self, run: Run, model: VQVAE):
        """model: of stage 1, which the decoder starts as."""
        config = run.config
        self.model = seeded(run.seed, 5, lambda: modules.widen_decoder(model, config))
        self.model.requires_grad_(False)
        self.model.decoder.requires_grad_(True)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.D = seeded(run.seed, 4, modules.PatchDiscriminator).to(run.device)
        betas = 0.0, 0.99
        self.optimizer = make_optimizer(self.model.decoder, config.optimizer, DECODER_LR, betas)
        self.D_adam = torch.optim.Adam(
            self.D.parameters(), lr=PATCH_LR, betas=betas, fused=True
        )

    def parts(self) -> dict:
        return {
            "decoder": self.model.decoder, "average": self.average.decoder, "D": self.D,
            "optimizer": self.optimizer, "D_adam": self.D_adam,
        }  # fmt: skip


def train_decoder(run: Run):
    """Train a larger decoder until `decoder_kimg`; `decoder_best.pt` is the whole VQ-VAE.

    Maps stay as they are. The best guess of a detail by error is a blurred one; a discriminator
    of patches teaches what slices look like (as in VQGAN: Esser et al. 2021, arXiv:2012.09841,
    section 3.1, there for all of the VQ-VAE). Kept are the latest weights of good SSIM.
    """
    config = run.config
    if config.decoder_kimg == 0:
        return
    real, decoding = RealMaps(run), Decoding(run, trained_vqvae(run))
    slices, average = Feed(run.data.train.images, run.device), decoding.average
    variance = data_variance(run.data.train, config)
    stage = Stage(
        run, "decoder", config.decoder_kimg, config.batch_size, decoding.parts(), **real.link
    )
    if stage.step == 0:  # how good stage 1 left it sets the bar
        measure_decoder(average, real, stage)
    step = runtime.Recorded(functools.partial(decoder_step, decoding, config, variance))
    while not stage.done:
        lr = stage.lr(DECODER_LR)
        set_lr(lr, decoding.optimizer)
        set_lr(stage.lr(PATCH_LR), decoding.D_adam)
        batch = decoder_batch(real, slices, stage)
        values = step(*batch, penalise=stage.step % config.penalty_every == 0)
        half_life = min(DECODER_HALF_LIFE, 0.1 * stage.nimg)
        decoder = decoding.model.decoder
        update_average(average.decoder, decoder, half_life, config.batch_size)
        stage.after_step(values, lambda: measure_decoder(average, real, stage), lr)
    stage.shown.close()


def decoder_batch(real: RealMaps, slices: Feed, stage: Stage) -> tuple[Tensor, ...]:
    """Windows of slices (B, 1, WINDOW, WINDOW), what they are decoded from, and noise.

    Only cells that a window depends on are decoded: index maps (B, h, w), whose window begins
    at the pixel `corner` (2,). noise: (2, B, 1, WINDOW, WINDOW), for slices and for drawn ones.
    """
    run, n = stage.run, stage.batch_size
    draw = generator_of(run.seed, SHARPEN, stage.step)
    mine, rows = processes.share(n), run.data.train.rows[batch_rows(stage)]
    maps, pixels = real.real_maps(rows), slices[rows]  # (B, h, w), (B, H, W) uint8
    window, cells, corner = window_of(pixels, maps, real.code_map.box, run.config, draw)
    noise = PATCH_NOISE * torch.randn((2, n, 1, WINDOW, WINDOW), generator=draw)[:, mine]
    images, corner = unit_range(pixels[window]), sent(torch.tensor(corner), run.device)
    return images, maps[cells], corner, sent(noise, run.device)


def decoder_step(
    decoding: Decoding, config, variance: float, images, maps, corner, noise, penalise: bool
) -> dict[str, Tensor]:
    """One step of the discriminator of patches, then one of the decoder, on a `decoder_batch`.

    Each patch is judged beside the same patch of its slice. Both get a little noise: that of a
    scanner, which no code can hold, would give the decoder's away.
    """
    with runtime.autocast(images.device, config.precision):
        output = window_at(decoding.model.decode_raw(maps), corner)
    both = images + noise[0], output + noise[1]
    values = judge_patches(decoding, *both, config, penalise)
    whole = torch.zeros_like(corner)  # output is a window
    loss = reconstruction_loss(output, images, config, variance, whole)
    values["reconstruction"], values["loss"] = loss, loss + ADVERSARIAL * values["g_loss"]
    decoding.optimizer.zero_grad(set_to_none=True)
    values["loss"].backward()
    values = {name: value.detach() for name, value in values.items()}
    processes.average_gradients(decoding.model.decoder, *values.values())
    decoding.optimizer.step()
    return values


def window_of(
    images, maps, box: Box, config: Config, draw: torch.Generator
) -> tuple[tuple, tuple, list[int]]:
    """A random window of whole cells: indices of images (.., H, W) and of maps; its corner.

    It lies in the box. The cells are those of the window and a margin on each side, and near a
    map's edge, where the decoder pads as it does for whole maps, as many in all: a record needs
    one shape, and blocks of memory of other sizes at every step would leave holes in it. The
    corner is that of the window in what these cells are decoded to, in pixels.
    """
    scale, margin = images.shape[-1] // maps.shape[-1], margin_of(config)  # pixels to a cell
    side = WINDOW // scale
    window, cells, corner = [...], [...], []
    for within, length in zip((box.rows, box.columns), maps.shape[1:], strict=True):
        count = min(length, side + 2 * margin)
        start = torch.randint(within.start, within.stop - side + 1, (), generator=draw).item()
        first = min(max(0, start - margin), length - count)
        cells.append(slice(first, first + count))
        window.append(slice(scale * start, scale * start + WINDOW))
        corner.append(scale * (start - first))
    return tuple(window), tuple(cells), corner


def margin_of(config: Config) -> int:
    """Cells about a window that its pixels depend on, at most: bilinear upsampling sees far."""
    return 4 + 2 * config.residual_blocks


def judge_patches(
    decoding: Decoding, real: Tensor, fake: Tensor, config, penalise: bool
) -> dict[str, Tensor]:
    """The discriminator's step on images (B, 1, H, W); its losses, and the decoder's g_loss."""
    D = decoding.D
    both = torch.cat([real, fake.detach()])
    with runtime.autocast(real.device, config.precision):
        real_score, fake_score = D(both).float().chunk(2)  # (B, H/4, W/4) each
    d_loss, values = modules.relativistic_loss(real_score, fake_score), {}
    if penalise:
        with runtime.autocast(real.device, config.precision):
            r1, r2 = modules.gradient_penalty(D, both).chunk(2)
        patches = real_score[0].numel()
        values = {"r1": r1.mean() / patches, "r2": r2.mean() / patches}  # of one logit
        weight = PATCH_GAMMA / 2 * config.penalty_every
        d_loss = d_loss + weight * (values["r1"] + values["r2"])
    decoding.D_adam.zero_grad(set_to_none=True)
    d_loss.backward()
    processes.average_gradients(D)
    decoding.D_adam.step()
    D.requires_grad_(False)
    with runtime.autocast(real.device, config.precision):
        fake_score = D(fake).float()
    D.requires_grad_(True)
    g_loss = modules.relativistic_loss(fake_score, real_score.detach())
    return {"g_loss": g_loss, "d_loss": d_loss, **values}


@torch.no_grad()
def measure_decoder(average: VQVAE, real: RealMaps, stage: Stage) -> dict:
    """Validation scores for the log, ten times in a training; keeps the average's weights."""
    if not (stage.done or stage.step % (stage.every * max(1, ROWS // 10)) == 0):
        return {}
    validation = stage.run.data.validation
    rows = evenly(len(validation), 128)
    rows = rows[processes.share(len(rows))]
    maps = real.real_maps(validation.rows[rows])
    outputs = average.decode(maps).cpu()
    scores = likeness(validation.batch(rows), outputs)
    stage.offer(1 - scores["ssim_validation"], alike=SSIM_ALIKE, model=average)
    return scores


# --- stage 4: DCGAN -----------------------------------------------------------------------


class Gan(RealMaps):
    """Both networks, the generator's average, their optimisers, and the maps they learn."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.networks()

    def networks(self):
        """Both networks at their start, the average, the optimisers."""
        run, config, size = self.run, self.run.config, self.code_map.box.size
        self.G = seeded(run.seed, 1, lambda: modules.make_generator(config, size))
        self.G.to(run.device)
        self.D = seeded(run.seed, 2, lambda: modules.make_discriminator(config, size))
        self.D.to(run.device)
        processes.share_batch_norm(self.G)
        processes.share_batch_norm(self.D)
        self.average = copy.deepcopy(self.G).eval().requires_grad_(False)
        betas = (config.gan_beta1, 0.999 if config.gan_loss == "bce" else 0.99)
        self.G_optimizer, self.D_optimizer = (
            make_optimizer(network, config.optimizer, lr, betas, GAN_MOMENTUM)
            for network, lr in zip((self.G, self.D), config.gan_lr, strict=True)
        )

    def parts(self) -> dict:
        return {
            "G": self.G, "D": self.D, "average": self.average,
            "G_optimizer": self.G_optimizer, "D_optimizer": self.D_optimizer,
        }  # fmt: skip

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Real maps (B, C, h, w), of their box, their levels (B,), and noise (B, Z).

        Of the batch, this process's share. Binned values are jittered within their bins, or D
        could tell real maps by their values' lying on U exact numbers.
        """
        run, config, n = self.run, self.run.config, stage.batch_size
        mine, chosen = processes.share(n), batch_rows(stage)
        maps = self.code_map.box.inside(self.real_maps(run.data.train.rows[chosen]))
        u = self.code_map.places(maps)  # (B, C, h, w)
        if self.code_map.even:
            u = u.expand(-1, config.map_channels, -1, -1)
        if self.code_map.even and config.gan_loss == "relativistic":
            draw = generator_of(run.seed, JITTER, stage.step)
            jitter = torch.rand((n, 1, *u.shape[2:]), generator=draw)[mine]
            u = u + (sent(jitter, run.device) * 2 - 1) / len(self.code_map.used)
        draw = generator_of(run.seed, NOISE, stage.step)
        noise = torch.randn((n, config.noise_dim), generator=draw)[mine]
        return u, sent(self.levels[chosen], run.device), sent(noise, run.device)


def train_dcgan(run: Run):
    """Train until `gan_kimg`; `dcgan_best.pt` is the latest generator of good validation FD."""
    config, gan = run.config, Gan(run)
    stage = Stage(run, "dcgan", config.gan_kimg, config.gan_batch_size, gan.parts(), **gan.link)
    monitor = None if stage.done else Monitor(gan)
    step = runtime.Recorded(functools.partial(dcgan_step, gan))
    while not stage.done:
        lr, d_lr = map(stage.lr, config.gan_lr)
        set_lr(lr, gan.G_optimizer)
        set_lr(d_lr, gan.D_optimizer)
        batch = gan.batch(stage)
        penalise = config.gan_loss != "bce" and stage.step % config.penalty_every == 0
        values = step(*batch, penalise=penalise)
        half_life = min(config.ema_kimg * 1000, 0.05 * stage.nimg)
        update_average(gan.average, gan.G, half_life, config.gan_batch_size)
        stage.after_step(values, lambda: monitor.measure(stage), lr)
        if config.stop_collapsed:
            monitor.check_diversity(stage)
    stage.shown.close()


def dcgan_step(
    gan: Gan, real: Tensor, level: Tensor, noise: Tensor, penalise: bool
) -> dict[str, Tensor]:
    """One step of the discriminator, then one of the generator, on a `Gan.batch`."""
    config, device = gan.run.config, gan.run.device
    with runtime.autocast(device, config.precision):
        fake = gan.G(noise, level)  # (B, C, h, w)
    d_loss, real_score, penalties = discriminator_loss(
        gan, real, fake.detach().float(), level, penalise
    )
    gan.D_optimizer.zero_grad(set_to_none=True)
    d_loss.backward()
    processes.average_gradients(gan.D, d_loss, *penalties.values())
    gan.D_optimizer.step()

    gan.D.requires_grad_(False)
    with runtime.autocast(device, config.precision):
        fake_score = gan.D(fake, level).float()
        if config.gan_loss == "bce":
            g_loss = modules.bce_loss(fake_score, 1.0)
        else:
            # Real maps were judged a moment ago, one step of D before: as good, and for free.
            g_loss = modules.relativistic_loss(fake_score, real_score.detach())
    gan.G_optimizer.zero_grad(set_to_none=True)
    g_loss.backward()
    processes.average_gradients(gan.G, g_loss)
    gan.G_optimizer.step()
    gan.D.requires_grad_(True)
    values = {"g_loss": g_loss, "d_loss": d_loss, **penalties}
    return {name: value.detach() for name, value in values.items()}


def discriminator_loss(
    gan, real, fake, level, penalise: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """D's loss, its logits (B,) of the real maps, and the penalties if they are due.

    R1 and R2 come every `penalty_every` steps at that multiple of their weight: lazily, as in
    Karras et al. 2020 (arXiv:1912.04958, appendix B). BCE with BatchNorm sees real and
    generated maps in separate batches, as the original did.
    """
    config = gan.run.config
    if config.gan_loss == "bce":
        with runtime.autocast(gan.run.device, config.precision):
            scores = gan.D(real, level).float(), gan.D(fake, level).float()
        loss = modules.bce_loss(scores[0], 1.0) + modules.bce_loss(scores[1], 0.0)
        return loss, scores[0], {}
    both, levels = torch.cat([real, fake]), torch.cat([level, level])
    with runtime.autocast(gan.run.device, config.precision):
        real_score, fake_score = gan.D(both, levels).float().chunk(2)
    loss = modules.relativistic_loss(real_score, fake_score)
    if not penalise:
        return loss, real_score, {}
    with runtime.autocast(gan.run.device, config.precision):
        r1, r2 = modules.gradient_penalty(gan.D, both, levels).chunk(2)
    r1, r2 = r1.mean(), r2.mean()
    loss = loss + config.gamma / 2 * config.penalty_every * (r1 + r2)
    return loss, real_score, {"r1": r1, "r2": r2}


@torch.no_grad()
def update_average(average, network, half_life: float, batch_size: int):
    """Exponential average of a network's weights; half_life in items seen, 0: no average.

    BatchNorm's statistics, too, but not how many batches it has counted.
    """
    decay = 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0
    means, now = (
        [x for x in (*m.parameters(), *m.buffers()) if x.is_floating_point()]
        for m in (average, network)
    )
    get_ema_multi_avg_fn(decay)(means, now, None)  # one launch on a GPU


class Monitor:
    """Watches samples while the DCGAN trains: collapse, and distance to validation slices."""

    N = 256
    diversity = math.nan  # as last measured

    @torch.no_grad()
    def __init__(self, gan: Gan):
        run, self.gan = gan.run, gan
        self.vqvae = last_vqvae(gan)
        alone = run.config.gan_loss == "relativistic" and not run.config.denoiser_kimg
        self.contrast = Contrast(gan, self.vqvae) if alone else None
        self.network = metrics.RandomFeatures()
        train, validation = run.data.train, run.data.validation
        self.n = min(self.N, len(validation), len(train) // 2)
        self.floor, self.n = metrics.relative_floor(self.features(train, 4 * self.n), self.n)
        self.real = self.features(validation, self.n)
        maps = gan.real_maps(train.rows[evenly(len(train), 64)])
        self.real_spread = mean_distance(gan.code_map.encode(maps))
        count = max(64, self.n)
        self.noise = modules.noise_of(
            range(count), run.config.noise_dim, run.seed, gan.level_table, MONITOR
        )

    def features(self, split: BrainSlices, count: int) -> Tensor:
        """(count, F) of slices evenly spaced in a split; few are in memory at a time."""
        rows = evenly(len(split), count)
        parts = np.array_split(rows, math.ceil(len(rows) / 64))
        return torch.cat([self.network.features(split.batch(part)) for part in parts])

    @torch.no_grad()
    def measure(self, stage: Stage) -> dict:
        """diversity, every row: 1 is that of real maps; fd_validation, eight times.

        Both of the generator alone: how well it learns is not for a denoiser to hide.
        """
        gan, config = self.gan, self.gan.run.config
        full = stage.done or stage.step % (stage.every * max(1, ROWS // 8)) == 0
        n = self.n if full else 64
        if full and self.contrast:
            self.contrast.fit(gan.average)
            gan.G.contrast.copy_(gan.average.contrast)  # or averaging would change it
        mine = processes.share(n)
        maps, images = modules.draw(
            gan.average, gan.code_map, self.vqvae, *(part[:n][mine] for part in self.noise),
            stretch=config.gan_loss == "bce", decode=full,
        )  # fmt: skip
        maps = processes.gathered(maps)[:64]
        self.diversity = mean_distance(gan.code_map.encode(maps)) / self.real_spread
        values = {"diversity": self.diversity}
        if full:
            features = processes.gathered(self.network.features(images))
            distance = metrics.frechet_distance(features, self.real)
            values["fd_validation"] = distance / self.floor
            stage.offer(values["fd_validation"], alike=FD_ALIKE, generator=gan.average)
        return values

    def check_diversity(self, stage: Stage):
        """Raise UserError (exit 6) if the samples have become nearly alike."""
        if self.diversity < COLLAPSED and stage.step > stage.steps / 4:
            raise UserError(
                Exit.DIVERGED,
                f"dcgan collapsed: diversity {self.diversity:.3f} (1: that of real maps) at "
                f"{stage.nimg} images seen of seed {stage.run.seed}. Try another --seed or a "
                "larger --gamma; in another --out without --stop-collapsed it would go on",
            )


class Contrast:
    """Gives samples the strength of detail that reconstructions of the same levels have.

    Snapping cells to codes flattens: a cell between two codes, or beyond all, goes inwards. And
    a denoiser cannot know what the generator has lost.
    """

    MOST = 0.2  # gain

    @torch.no_grad()
    def __init__(self, real: RealMaps, vqvae: VQVAE):
        run, self.code_map, self.vqvae = real.run, real.code_map, vqvae
        rows = evenly(len(run.data.train), 128)
        maps, levels = real.real_maps(run.data.train.rows[rows]), real.levels[rows]
        self.wanted = metrics.detail_strength(vqvae.decode(maps)).mean().item()
        numbers, mine = range(len(rows)), processes.share(len(rows))
        size, table = run.config.noise_dim, real.level_table
        noise, _ = modules.noise_of(numbers, size, run.seed, table, MONITOR)
        self.given = noise[mine], levels[mine]
        self.autocast = functools.partial(runtime.autocast, run.device, run.config.precision)

    @torch.no_grad()
    def fit(self, generator: modules.Generator, denoiser: Denoiser | None = None):
        """Set the generator's contrast.

        Detail is nearly linear in the gain: two trials, and the line between them, no further.
        What has too much detail has grain, which less contrast would smear and not mend.
        """
        found = []
        for gain in (0.0, self.MOST):
            generator.contrast.fill_(gain)
            _, images = modules.draw(
                generator, self.code_map, self.vqvae, *self.given, denoiser=denoiser,
                autocast=self.autocast(),
            )  # fmt: skip
            detail = processes.gathered(metrics.detail_strength(images))
            found.append(detail.mean().item())
        share = (self.wanted - found[0]) / max(found[1] - found[0], 1e-6)
        generator.contrast.fill_(self.MOST * min(max(share, 0.0), 1.0))


def mean_distance(u: Tensor) -> float:
    """Mean Euclidean distance of all pairs among maps (B, C, h, w); 0 after a collapse."""
    return torch.pdist(u.flatten(1).cpu()).mean().item()


# --- stage 5: denoiser --------------------------------------------------------------------


def train_denoiser(run: Run):
    """Train until `denoiser_kimg`; `denoiser_best.pt` holds the best by validation loss.

    It sees real maps alone, in crops: what neighbours look like is the same everywhere. With
    it goes the contrast that samples need before it.
    """
    config = run.config
    if config.denoiser_kimg == 0:
        return
    real = RealMaps(run)
    require(run, "dcgan", config.gan_kimg)
    denoiser = seeded(run.seed, 3, lambda: modules.make_denoiser(config)).to(run.device)
    code_map = real.code_map
    if code_map.even:  # of bins; the denoiser sees coordinates
        codebook = trained_vqvae(run).quantizer.codebook.cpu()
        code_map = CodeMap.fit(codebook, real.counts, "coordinates", denoiser.channels)
    denoiser.fit(code_map.to(run.device), real.counts.to(run.device))
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    muon = Muon(denoiser, DENOISER_LR, betas=(0.9, 0.99))
    parts = {"denoiser": denoiser, "average": average, "muon": muon}
    stage = Stage(
        run, "denoiser", config.denoiser_kimg, config.gan_batch_size, parts, **real.link
    )
    step = runtime.Recorded(functools.partial(denoiser_step, denoiser, muon, config))
    while not stage.done:
        lr = stage.lr(DENOISER_LR)
        set_lr(lr, muon)
        batch, start = denoiser_batch(denoiser, real, stage)
        loss = step(*batch, start=start)
        half_life = min(DENOISER_HALF_LIFE, 0.1 * stage.nimg)
        update_average(average, denoiser, half_life, config.gan_batch_size)
        stage.after_step({"loss": loss}, lambda: measure_denoiser(average, real, stage), lr)
    stage.shown.close()
    add_contrast(real)


def add_contrast(real: RealMaps):
    """Complete `denoiser_best.pt` by the contrast of this generator's samples, once."""
    run, made_with = real.run, real.run.fingerprint() | real.link
    paths = run.path("denoiser_best.pt"), run.path("dcgan_best.pt")
    link = runtime.checksum(paths[1])

    def read() -> dict:
        return runtime.load_checkpoint(paths[0], stage="denoiser", **made_with)

    if processes.first(lambda: read().get("dcgan") == link):
        return
    values = read()
    generator = modules.make_generator(run.config, real.code_map.box.size)
    denoiser = modules.make_denoiser(run.config)
    theirs = runtime.load_checkpoint(paths[1], stage="dcgan", **made_with)
    for network, state, path in (
        (denoiser, values.get("denoiser"), paths[0]),
        (generator, theirs.get("generator"), paths[1]),
    ):
        runtime.load_weights(network, state, path).to(run.device).eval()
    if run.config.gan_loss == "relativistic":
        Contrast(real, last_vqvae(real)).fit(generator, denoiser)
    values |= {"dcgan": link, "contrast": generator.contrast.cpu()}
    processes.first(lambda: runtime.save_checkpoint(paths[0], values))


def denoiser_batch(denoiser: Denoiser, real: RealMaps, stage: Stage) -> tuple[tuple, tuple]:
    """Crops of real maps (B, 32, 32), noise (B, C, 32, 32) and its sigma (B,); and a start.

    The latter is the first cell, down and across, of those that `denoising_loss` counts.
    """
    run, n = stage.run, stage.batch_size
    mine, draw = processes.share(n), generator_of(run.seed, DENOISE, stage.step)
    box = real.code_map.box
    maps = box.inside(real.real_maps(run.data.train.rows[batch_rows(stage)]))  # (B, h, w)
    ways = torch.tensor(box.size) - CROP_CELLS + 1  # to put a crop, along each side
    corners = (torch.rand((n, 2), generator=draw) * ways).long()[..., None]  # (n, 2, 1)
    cells = sent(corners[mine] + torch.arange(CROP_CELLS), run.device)  # (B, 2, 32)
    each = torch.arange(len(maps), device=run.device)[:, None, None]
    maps = maps[each, cells[:, 0, :, None], cells[:, 1, None, :]]  # (B, 32, 32)
    noise = torch.randn((n, denoiser.channels, *maps.shape[1:]), generator=draw)[mine]
    sigma = sigmas(torch.rand(n, generator=draw)[mine] ** TO_MOST)
    start = torch.randint(2, (2,), generator=draw).tolist()
    return (maps, sent(noise, run.device), sent(sigma, run.device)), tuple(start)


def denoiser_step(
    denoiser: Denoiser, optimizer, config, maps, noise, sigma, start: tuple[int, int]
) -> Tensor:
    """One step on a `denoiser_batch` -> the loss, ()."""
    with runtime.autocast(maps.device, config.precision):
        loss = modules.denoising_loss(denoiser, maps, noise, sigma, start).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = loss.detach()
    processes.average_gradients(denoiser, loss)
    optimizer.step()
    return loss


def sigmas(share: Tensor) -> Tensor:
    """Strengths of noise (n,) from shares (n,) in [0, 1) of their range, on a log scale."""
    return Denoiser.LEAST * (Denoiser.MOST / Denoiser.LEAST) ** share


@torch.no_grad()
def measure_denoiser(average: Denoiser, real: RealMaps, stage: Stage) -> dict:
    """Loss on the box of validation maps, ten times in a training; keeps the best weights."""
    if not (stage.done or stage.step % (stage.every * max(1, ROWS // 10)) == 0):
        return {}
    validation = stage.run.data.validation
    rows = evenly(len(validation), 64)
    mine, losses = processes.share(len(rows)), []
    code_map = real.code_map
    maps = code_map.box.inside(real.real_maps(validation.rows[rows[mine]]))
    # A code that training never used has no place: it gets a wrong one, the same in each look.
    maps = torch.where(code_map.rank[maps] < 0, code_map.used[0], maps)
    draw = generator_of(stage.run.seed, DENOISE)
    noise = torch.randn((len(rows), average.channels, *maps.shape[1:]), generator=draw)[mine]
    sigma = sigmas(torch.linspace(0, 1, len(rows)))[mine]
    parts = (part.split(32) for part in (maps, noise.to(maps.device), sigma.to(maps.device)))
    for part in zip(*parts, strict=True):
        losses.append(modules.denoising_loss(average, *part))
    loss = processes.gathered(torch.cat(losses)).mean().item()
    stage.offer(loss, denoiser=average)
    return {"loss_validation": loss}


STAGES = {
    "vqvae": train_vqvae, "codes": extract_codes, "decoder": train_decoder,
    "dcgan": train_dcgan, "denoiser": train_denoiser,
}  # fmt: skip


def run_stages(run: Run, names):
    """Run these stages; a signal saves and ends them. Out of memory is exit 8."""
    with run.signals:
        for name in names:
            try:
                STAGES[name](run)
                runtime.release_memory()
            except Exception as problem:
                flags = {"vqvae": "batch_size", "decoder": "batch_size", "codes": None}
                flag = flags.get(name, "gan_batch_size")
                if flag is None or not runtime.is_out_of_memory(problem):
                    raise
                half = max(1, getattr(run.config, flag) // 2)
                raise UserError(
                    Exit.MEMORY,
                    f"out of memory in stage {name}; try --{flag.replace('_', '-')} {half}",
                ) from None


def check_shares(config: Config):
    """Raise UserError (exit 2) unless each process gets an even share of each batch."""
    for flag in ("batch_size", "gan_batch_size"):
        if getattr(config, flag) % processes.count():
            raise UserError(
                Exit.USAGE,
                f"--{flag.replace('_', '-')} {getattr(config, flag)} does not divide evenly "
                f"among {processes.count()} processes",
            )


MIN_SLICES = 6  # of validation and test: precision and recall look at 5 neighbours


def check_enough(data: Data):
    """Raise UserError (exit 3) before training if the scores could not be computed after it."""
    sizes = len(data.train) // 2, len(data.validation), len(data.test)
    least = max(MIN_SLICES, processes.count())  # each process scores a share
    if min(sizes) < least:
        raise UserError(
            Exit.DATA,
            f"too few slices: training {len(data.train)}, validation {sizes[1]}, "
            f"test {sizes[2]}; needed are {2 * least}, {least} and {least}",
        )


def open_seed(folder: Path, config: Config, seed: int, data: Data) -> Run:
    """The run of one seed in the results folder `folder`, its config.json written."""
    device = runtime.choose_device(config.device)
    run = Run(folder / f"seed-{seed}", config, seed, data, device)
    here = {"seed": seed, "cache": str(Path(config.cache).resolve())}
    here |= {"data": str(Path(config.data).resolve())} if config.data else {}
    settings = {"config": config.to_dict() | here, "data": data.fingerprint}
    if processes.is_first():
        runtime.write_json(run.path("config.json"), settings | {"stamp": data.stamp})
        runtime.write_json(folder / "data_report.json", data.report)
    return run


@processes.joined()
def main(arguments):
    config = config_from(arguments)
    runtime.choose_device(config.device)
    check_shares(config)
    runtime.check_out(config)
    data = processes.first_then_all(lambda: open_data(config))
    check_enough(data)
    folder, seed = processes.first(
        lambda: runtime.results_folder(config, data.fingerprint, "seed" in vars(arguments))
    )
    with runtime.writing_alone(folder):
        run = open_seed(folder, config, seed, data)
        with runtime.logging_to(run.path("run.log")):
            run_stages(run, STAGES if arguments.stage == "all" else [arguments.stage])
            runtime.say(f"{arguments.stage} done: {run.folder}")


if __name__ == "__main__":
    runtime.run_script(lambda: main(ARGUMENTS))
