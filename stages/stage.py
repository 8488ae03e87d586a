"""What all training stages share: a run's folder, batch order, learning rate, log, checkpoints.

In: a `Config`, the data, a folder. Out: `<stage>_last.pt` to resume from, `<stage>_best.pt`
with the best weights, rows of log.csv.
"""

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import TRAINED, VERSION, Config, Exit, UserError
from dataset import Data
from modules import generator_of
from scores import metrics
from support import checkpoints, device, distributed, endings, files, messages

COLUMNS = (
    "stage", "nimg", "seconds", "images_per_s", "lr",
    "loss", "reconstruction", "commitment", "perplexity", "used_codes", "revived",
    "ssim_validation", "psnr_validation",
    "g_loss", "d_loss", "r1", "r2", "diversity", "fd_validation", "loss_validation",
)  # fmt: skip
CHECKPOINT_EVERY_S = 60

# Purposes of random numbers: a generator depends on seed, purpose and position.
WEIGHTS, ORDER, CROP, REVIVE, NOISE, JITTER, START, MONITOR, DENOISE, SHARPEN = range(1, 11)


@dataclass
class Run:
    """One seed's folder and everything that its stages need."""

    folder: Path
    config: Config
    seed: int
    data: Data
    device: torch.device
    signals: endings.Signals = field(default_factory=endings.Signals)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = files.Log(self.folder / "log.csv", COLUMNS)

    def fingerprint(self) -> dict:
        """The values that a checkpoint must hold to be resumed here."""
        config, data = self.config.identity(), self.data.fingerprint
        return {"config": config, "seed": self.seed, "data": data}

    def path(self, name: str) -> Path:
        return self.folder / name


def open_seed(folder: Path, config: Config, seed: int, data: Data) -> Run:
    """The run of one seed in the results folder `folder`; its config.json is written.

    The number of threads is chosen once a seed, since another number gives other bits.
    """
    run = Run(folder / f"seed-{seed}", config, seed, data, device.choose_device(config.device))
    path, threads = run.path("config.json"), config.threads
    if threads == 0 and path.exists():
        with checkpoints.reading(path):
            threads = files.read_json(path)["config"]["threads"]
    threads = device.set_threads(threads)
    if threads < (os.cpu_count() or 1) and run.device.type == "cpu":
        messages.say(f"threads: {threads}")
    here = {"seed": seed, "threads": threads, "cache": str(Path(config.cache).resolve())}
    if config.data:
        here["data"] = str(Path(config.data).resolve())
    settings = {"config": config.to_dict() | here, "data": data.fingerprint, "version": VERSION}
    if distributed.is_first():
        files.write_json(path, settings | {"stamp": data.stamp})
        files.write_json(folder / "data_report.json", data.report)
    return run


# --- a stage ------------------------------------------------------------------------------


@dataclass
class Schedule:
    """The length of a stage in steps, and its learning rate at each of them."""

    steps: int
    config: Config

    def lr(self, base: float, step: int) -> float:
        """Cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) after a linear warm-up."""
        if self.config.schedule == "constant":
            return base
        warm = min(1.0, (step + 1) / (self.config.warm_up * self.steps + 1))
        return base * warm * max(0.01, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


class Pace:
    """Warns once in a stage if steps on the CPU take twice their usual time."""

    def __init__(self):
        self.steps, self.seconds, self.means = 0, 0.0, []  # mean step of each row of the log
        self.since, self.slow_rows = time.monotonic(), 0

    def begin(self):
        self.since = time.monotonic()

    def end(self):
        self.seconds, self.steps = self.seconds + time.monotonic() - self.since, self.steps + 1

    def check(self):
        """Compare the mean step since the last row with the median of the rows before."""
        if self.seconds < 0.5:  # too short to tell
            return
        mean = self.seconds / self.steps
        usual = float(np.median(self.means)) if len(self.means) >= 5 else math.inf
        self.slow_rows += mean > 2 * usual
        if mean > 2 * usual and self.slow_rows == 2:
            fewer = torch.get_num_threads() - 1
            other_way = f", or stop this run and continue it with --threads {fewer}"
            messages.warn(
                f"steps take {mean / usual:.1f} times their usual time: does another program "
                f"use the processor? Stop it{other_way if fewer else ''}"
            )
        self.means.append(mean)
        self.steps, self.seconds = 0, 0.0


class Stage:
    """The position of a training stage, and what happens after each step."""

    def __init__(self, run: Run, name: str, parts: dict, **given):
        """parts: what a checkpoint saves. given: further values that it must match."""
        self.run, self.name, self.parts, self.seen = run, name, parts, TRAINED[name].seen
        kimg = getattr(run.config, TRAINED[name].kimg)
        self.batch_size = getattr(run.config, TRAINED[name].batch_size)
        self.steps = max(1, math.ceil(kimg * 1000 / self.batch_size))
        self.every = max(1, self.steps // run.config.log_rows)  # steps per row of the log
        self.schedule, self.pace = Schedule(self.steps, run.config), Pace()
        self.expected = {"stage": name, **run.fingerprint(), **given}
        self.nimg, self.best = 0, None
        self.sums: dict[str, Tensor] = {}  # sum since the last row, number of steps
        self.start, self.row_seconds = time.monotonic(), 0.0
        self.last = run.path(f"{name}_last.pt")
        self.restore()
        self.saved = time.monotonic()
        total, label = self.steps * self.batch_size, f"seed {run.seed} {name}"
        self.progress = messages.Progress(total, label, self.seen, self.nimg)

    @property
    def step(self) -> int:
        return self.nimg // self.batch_size

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    @property
    def seconds(self) -> float:
        """Seconds of training so far, also those before a resume."""
        return time.monotonic() - self.start

    def lr(self, base: float) -> float:
        return self.schedule.lr(base, self.step)

    def due(self, times: int) -> bool:
        """Whether a measurement is due that is made `times` times in a stage and at its end."""
        rows = self.run.config.log_rows
        return self.done or self.step % (self.every * max(1, rows // times)) == 0

    def after_step(self, values: dict[str, Tensor], measure: Callable[[], dict], lr: float):
        """Count the step. Then write a row, save, or end by a signal, if that is due."""
        self.pace.end()
        for name, value in values.items():
            once = torch.stack([value.detach(), torch.ones_like(value)])
            self.sums[name] = self.sums.get(name, 0) + once
        self.nimg += self.batch_size
        self.progress.add(self.batch_size)
        row_due = self.step % self.every == 0 or self.done
        if row_due or self.run.device.type == "cpu":  # on a GPU the check synchronises
            check_finite(self, values)
        if row_due:
            self.pace.check()
            self.write_row(measure(), lr)
        late = time.monotonic() - self.saved > CHECKPOINT_EVERY_S
        if distributed.agreed(self.done or late):
            self.save()
        self.run.signals.check(self.save)
        self.pace.begin()

    def write_row(self, measured: dict, lr: float):
        seconds, steps = self.seconds, (self.step - 1) % self.every + 1
        rate = steps * self.batch_size / max(seconds - self.row_seconds, 1e-9)
        means = {name: (total / n).item() for name, (total, n) in self.sums.items()}
        self.row_seconds, self.sums = seconds, {}
        if distributed.is_first():
            self.run.log.add(
                stage=self.name, nimg=self.nimg, seconds=round(seconds, 1),
                images_per_s=round(rate, 1), lr=lr, **means, **measured,
            )  # fmt: skip
        if measured:
            device.release_memory()  # free the measurement's memory, to avoid fragmentation

    # --- checkpoints

    def restore(self):
        """Resume from `<stage>_last.pt` if there is one; drop later rows of the log."""
        load = functools.partial(checkpoints.load_last, self.last, **self.expected)
        values = distributed.first_then_all(load)
        if values is not None:
            with checkpoints.reading(self.last):
                for name, part in self.parts.items():
                    part.load_state_dict(values["parts"][name])
                self.nimg, self.best = values["nimg"], values["best"]
                self.start -= values["seconds"]
                self.row_seconds = values["row_seconds"]
                self.sums = {k: v.to(self.run.device) for k, v in values["sums"].items()}
        if distributed.is_first():
            self.run.log.keep(self.name, self.nimg)
        if values is not None and not self.done:
            messages.say(f"{self.name}: resuming at {self.nimg} {self.seen} seen")

    def save(self):
        """Write `<stage>_last.pt`; the first process writes for all."""
        values = self.expected | {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "nimg": self.nimg, "best": self.best, "sums": self.sums,
            "seconds": self.seconds, "row_seconds": self.row_seconds,
        }  # fmt: skip
        distributed.first(
            lambda: checkpoints.save_checkpoint(self.last, values, keep_previous=True)
        )
        self.saved = time.monotonic()

    def offer(self, score: float, tolerance: float = 1.0, **weights: torch.nn.Module):
        """Save these weights as the best if `score` is finite and lower than any before.

        tolerance: a score up to this factor above the lowest is as good; later weights win.
        """
        lowest = math.inf if self.best is None else self.best
        if not math.isfinite(score) or score >= lowest * tolerance:
            return
        self.best = min(score, lowest)
        path = self.run.path(f"{self.name}_best.pt")
        state = {name: module.state_dict() for name, module in weights.items()}
        values = self.expected | {"nimg": self.nimg, "score": score} | state
        distributed.first(lambda: checkpoints.save_checkpoint(path, values))


def check_finite(stage: Stage, values: dict[str, Tensor]):
    """Raise UserError (exit 6) if a value of this step is not finite."""
    bad = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(
            Exit.DIVERGED,
            f"{stage.name} diverged: {bad[0]} is not finite at step {stage.step} ({stage.nimg} "
            f"{stage.seen} seen) of seed {stage.run.seed}; {stage.last.name} was saved "
            "before. Try another --seed, a lower learning rate or --precision float32 "
            "(docs/faults.md)",
        )


def require(run: Run, name: str):
    """Raise UserError (exit 4) unless stage `name` of this run is finished."""
    path = run.path(f"{name}_last.pt")
    require_file(path, name)
    values = checkpoints.load_checkpoint(path, stage=name, **run.fingerprint())
    if values["nimg"] < run.config.trained[name] * 1000:
        raise UserError(
            Exit.CHECKPOINT, f"{path}: stage {name} is not finished; run --stage {name} again"
        )


def require_file(path: Path, stage: str):
    if not path.exists():
        raise UserError(
            Exit.CHECKPOINT, f"{path}: no such file; run --stage {stage} first, with this --out"
        )


# --- batches ------------------------------------------------------------------------------


def batch_rows(stage: Stage) -> np.ndarray:
    """This process's share of the batch, as positions in the training split: (B,)."""
    run, n = stage.run, stage.batch_size
    order = order_of(run.seed, ORDER, len(run.data.train), stage.nimg, n)
    return order[distributed.share(n)]


def order_of(seed: int, purpose: int, n: int, start: int, count: int) -> np.ndarray:
    """Items start .. start + count - 1 of endlessly many shuffled epochs of range(n)."""
    places = np.arange(start, start + count)
    epochs = range(start // n, (start + count - 1) // n + 1)
    parts = [permutation(seed, purpose, n, e)[places[places // n == e] % n] for e in epochs]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def permutation(seed: int, purpose: int, n: int, epoch: int) -> np.ndarray:
    return torch.randperm(n, generator=generator_of(seed, purpose, epoch)).numpy()


class Feed:
    """Rows of a memory map as tensors on a device.

    array: (n, ...). On a GPU the whole array is copied there once, if it takes at most `SHARE`
    of the free memory. Otherwise rows are read when needed.
    """

    SHARE = 0.5

    def __init__(self, array: np.ndarray, place: torch.device):
        self.array, self.place, self.kept = array, place, None
        if array.nbytes <= self.SHARE * device.free_memory(place):
            kept = torch.empty(array.shape, dtype=self[np.arange(1)].dtype, device=place)
            for rows in np.array_split(np.arange(len(array)), max(1, len(array) // 1024)):
                kept[rows[0] : rows[-1] + 1] = self[rows]
            self.kept = kept

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        if self.kept is None:
            return device.sent(torch.from_numpy(self.array[rows]), self.place)
        return self.kept[device.sent(torch.from_numpy(rows), self.place)]


def seeded(seed: int, network: int, make: Callable):
    """Call `make` with torch's global random state set; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(seed, WEIGHTS, network).initial_seed())
        return make()


@torch.no_grad()
def update_average(
    average: torch.nn.Module, network: torch.nn.Module, half_life: float, batch_size: int
):
    """One step of the exponential average of a network's weights.

    half_life in items seen; 0: a copy. BatchNorm's statistics are averaged too, but not the
    number of its batches.
    """
    decay = 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0
    means, now = (
        [x for x in (*m.parameters(), *m.buffers()) if x.is_floating_point()]
        for m in (average, network)
    )
    get_ema_multi_avg_fn(decay)(means, now, None)  # one launch on a GPU


def likeness(images: Tensor, outputs: Tensor) -> dict[str, float]:
    """Mean scores of reconstructions, for the log.

    One process computes them for all: other machines may round, and then choose, differently.
    """

    def scores() -> dict[str, float]:
        ssim, psnr = metrics.ssim(images, outputs), metrics.psnr(images, outputs)
        return {"ssim_validation": ssim.mean().item(), "psnr_validation": psnr.mean().item()}

    return distributed.first(scores)
