"""How fast is it, beside a plain implementation and beside other libraries?

    pip install -r benchmarks/requirements.txt        # the other libraries
    python benchmarks/speed.py                        # on an idle machine

Each side has a process of its own, because malloc's settings hold for a whole process: this
project's scripts change them (`device.tame_malloc`), other programs do not. The other sides are
measured with both settings. Sides of one group take turns (A B C A B C), each turn begins with
a warm-up, and medians are compared. Inputs are slices of the embedded set.
"""

import argparse
import collections
import contextlib
import functools
import io
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


class Row(NamedTuple):
    """A row of the table: a function of this project's side, and one of another side."""

    work: str
    here: str
    other: str = ""
    unit: str = "slices/s"  # items per second; "s": seconds per item
    aim: str = "-"

    @property
    def group(self) -> str:
        return self.here.partition("_")[0]


STEP = "VQ-VAE training step, original networks, batch 128"
OPEN = "opening 9,664 PNG slices"
ROWS = (
    Row(f"{STEP}, float32", "vqvae_here", "vqvae_plain", aim="10x"),
    Row(f"{STEP}, float32", "vqvae_here", "vqvae_monai", aim="6x"),
    Row(f"{STEP}, bfloat16", "vqvae_here_bfloat16", "vqvae_plain", aim="18x"),
    Row("DCGAN training step, batch 32", "dcgan_here", "dcgan_plain", "maps/s", "2x"),
    Row("generation, noise to slice", "generate_here", aim="300 slices/s"),
    Row(f"{OPEN}, first time", "open_here", "open_loader", "s", "10 s"),
    Row(f"{OPEN}, again", "open_here_again", "open_loader", "s", "0.1 s"),
)
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))
LABELS = {  # of other sides, by the last part of their names
    "monai": "MONAI VQVAE", "plain": "plain", "loader": "cv2 in a DataLoader, one epoch",
    "": "-",
}  # fmt: skip
ABSENT = "not installed: `pip install -r benchmarks/requirements.txt`"
TURNS = 3
WARM_CALLS, WARM_S = 3, 5.0  # a warm-up: until the heap has its full size, or this long
TURN_S = 2.0  # a turn repeats its work for about this long
TAMED = ", tamed"  # ends the key of another side that is measured with this project's malloc
PNGS, CASE = 9664, 16  # slices of the original's data set; slices per subject
CPU_COUNT = os.cpu_count() or 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", default="runs/cache", help="embedded set [runs/cache]")
    return parser.parse_args()


if __name__ == "__main__":  # --help must not wait for the import of torch
    ARGUMENTS = parse()

import cv2
import numpy as np
import plain
import torch

import modules
import train
from config import Config
from dataset import evenly, open_data
from modules import generator_of
from stages.decoder import widen_decoder
from stages.denoiser import make_denoiser
from stages.losses import random_corner, structural_loss
from stages.stage import CROP, seeded
from support import device, endings, messages

CPU = torch.device("cpu")


class Inputs:
    """What the sides read: slices of the embedded set, and a folder for temporary files."""

    def __init__(self, cache: str, work: str):
        self.config, self.work = Config(cache=cache, optimizer="adam"), Path(work)

    @functools.cached_property
    def data(self):
        return quietly(open_data, self.config)

    def slices(self, n: int) -> torch.Tensor:
        """n training slices (n, 1, 256, 256), evenly spaced."""
        return self.data.train.batch(evenly(len(self.data.train), n))

    def pngs(self) -> Path:
        """A folder of 9,664 PNG slices with the names of the original's data set."""
        root = self.work / "keras_png_slices_data"
        folder = root / "keras_png_slices_train"
        if not folder.exists():
            folder.mkdir(parents=True)
            for i in range(PNGS):
                pixels = self.data.images[i % len(self.data.images)]
                name = f"case_{i // CASE:03d}_slice_{i % CASE}.nii.png"
                (folder / name).write_bytes(cv2.imencode(".png", pixels)[1])
        return root


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


# --- sides: Inputs -> a function, and the number of items that one call of it processes. If
# that function returns a float, it has measured its seconds itself. A library is imported only
# by its own side, since it may not be installed.


def a_run(here: Inputs, config: Config) -> SimpleNamespace:
    """The parts of `stages.stage.Run` that a training step reads."""
    return SimpleNamespace(config=config, seed=0, device=CPU, data=here.data)


def some_vqvae(here: Inputs, config: Config) -> modules.VQVAE:
    """A VQ-VAE at the start of its training, with codes from real slices."""
    model = seeded(0, 0, lambda: modules.make_vqvae(config))
    train.start_codebook(model, here.data.train, a_run(here, config))
    return model


def a_corner(images: torch.Tensor) -> torch.Tensor:
    """The corner (2,) of the loss's window."""
    return random_corner(*images.shape[2:], Config.window_px, generator_of(0, CROP, 0))


def plain_twin(model: modules.VQVAE) -> plain.VQVAE:
    """The same weights in the plain implementation."""
    twin = plain.VQVAE(*model.quantizer.codebook.shape)
    twin.load_state_dict(model.state_dict())
    return twin.to(memory_format=torch.contiguous_format)


def vqvae_here(here: Inputs, precision: str = "float32"):
    config = replace(here.config, precision=precision)
    model, images = some_vqvae(here, config), here.slices(128)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    step = functools.partial(train.vqvae_step, model, adam, config, structural_loss(config))
    return functools.partial(step, images, a_corner(images), quantize=True), len(images)


vqvae_here_bfloat16 = functools.partial(vqvae_here, precision="bfloat16")


def vqvae_plain(here: Inputs):
    model, images = plain_twin(some_vqvae(here, here.config)), here.slices(128)
    adam = torch.optim.Adam(model.parameters(), lr=here.config.lr)
    given = model, adam, images, here.config, a_corner(images)
    return functools.partial(plain.vqvae_step, *given), len(images)


def vqvae_monai(here: Inputs):
    """MONAI's VQ-VAE: equal widths, K and D, no residual layers; with this project's loss."""
    from monai.networks.nets import VQVAE

    config, images = here.config, here.slices(128)
    widths = config.widths[:2]
    model = VQVAE(
        2, 1, 1, channels=widths, num_res_layers=0, num_res_channels=widths,
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=config.codes, embedding_dim=config.code_dim,
    )  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), lr=config.lr)
    loss_of, corner = structural_loss(config), a_corner(images)

    def step():
        output, commitment = model(images)
        loss = loss_of(output, images, corner) + commitment
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step, len(images)


class Gan(train.Gan):
    """A DCGAN at the start of its training, whose maps come from a VQ-VAE without training."""

    def __init__(self, here: Inputs, config: Config):
        self.run, self.vqvae = a_run(here, config), some_vqvae(here, config)
        self.levels = torch.from_numpy(here.data.train.levels[evenly(len(here.data.train), 32)])
        with torch.no_grad():
            maps = self.vqvae.encode(here.slices(32))
        counts = torch.bincount(maps.flatten(), minlength=config.codes)
        self.code_map = modules.CodeMap.fit(
            self.vqvae.quantizer.codebook, counts, config.order, config.map_channels,
            crop=train.crop_of(here.data.train, config),
        )  # fmt: skip
        self.make_networks()
        noise = torch.randn(32, config.noise_dim, generator=generator_of(0))
        real = self.code_map.encode(self.code_map.crop.cut(maps))
        self.ready = real, self.levels, noise  # a batch


def plain_gan(here: Inputs, config: Config) -> Gan:
    """The same with NCHW weights, a plain first layer and optimisers that are not fused."""
    gan = Gan(here, config)
    first = gan.G.layers[0]
    gan.G.layers[0] = torch.nn.ConvTranspose2d(1, 1, first.kernel_size, bias=False)
    gan.G.layers[0].weight = first.weight
    for name, network in (("G_optimizer", gan.G), ("D_optimizer", gan.D)):
        network.to(memory_format=torch.contiguous_format)
        group = getattr(gan, name).param_groups[0]
        adam = torch.optim.Adam(network.parameters(), group["lr"], group["betas"])
        setattr(gan, name, adam)
    return gan


def steps_of(step, gan: Gan):
    """The steps from one penalty to the next, and the number of maps in them."""
    config = gan.run.config

    def steps():
        for number in range(config.penalty_every):
            step(gan, *gan.ready, penalise=number == 0)

    return steps, config.penalty_every * config.gan_batch_size


def dcgan_here(here: Inputs):
    return steps_of(train.dcgan_step, Gan(here, here.config))


def dcgan_plain(here: Inputs):
    return steps_of(plain.dcgan_step, plain_gan(here, here.config))


def generate_here(here: Inputs):
    """Noise to slices, as predict.py, with the denoiser and the sharper decoder."""
    config, gan = here.config, Gan(here, here.config)
    denoiser = make_denoiser(config).eval()
    denoiser.fit(gan.code_map, torch.ones(config.codes))
    autocast = functools.partial(device.autocast, CPU, config.precision)
    restore = denoiser.restorer(gan.code_map, autocast)
    vqvae = widen_decoder(gan.vqvae, config)
    gan.G.eval()
    noise, level = gan.ready[2].repeat(2, 1), gan.levels.repeat(2)

    def generate():
        maps = modules.draw_maps(gan.G, gan.code_map, noise, level, restore)
        modules.in_full_batches(vqvae.decode, maps)

    return generate, len(noise)


def open_here(here: Inputs):
    def work() -> float:
        with tempfile.TemporaryDirectory(dir=here.work) as cache:
            return opened(Config(data=str(here.pngs()), cache=cache))

    return work, 1


def open_here_again(here: Inputs):
    config = Config(data=str(here.pngs()), cache=str(here.work / "cache"))
    opened(config)
    return lambda: opened(config), 1


def opened(config: Config) -> float:
    """Open the data; return the seconds that it took."""
    return timeit.timeit(lambda: quietly(open_data, config), number=1)


class PngFiles(torch.utils.data.Dataset):
    def __init__(self, root: Path):
        self.paths = sorted(map(str, root.rglob("*.png")))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        blob = np.fromfile(self.paths[i], np.uint8)
        return torch.from_numpy(cv2.imdecode(blob, cv2.IMREAD_GRAYSCALE))[None] / 255


def open_loader(here: Inputs):
    pngs = PngFiles(here.pngs())
    loader = torch.utils.data.DataLoader(pngs, 32, shuffle=True, num_workers=CPU_COUNT)
    return lambda: collections.deque(loader, maxlen=0), 1


# --- measuring ----------------------------------------------------------------------------


def start(tamed: bool, cache: str, work: str):
    """Prepare a side's own process."""
    global inputs
    inputs = Inputs(cache, work)
    torch.set_flush_denormal(True)  # as `endings.run_script`
    if tamed:
        device.tame_malloc()


@functools.cache
def made(side: str):
    torch.manual_seed(0)
    return globals()[side](inputs)


def turn(side: str) -> float:
    """Return seconds per item, after a warm-up that also tells how often to repeat."""
    work, items = made(side)
    start = time.perf_counter()
    for _ in range(WARM_CALLS):
        begin = time.perf_counter()
        own = work()
        if isinstance(own, float):
            return own / items
        end = time.perf_counter()
        if end - start > WARM_S:
            break
    calls = max(1, int(TURN_S / (end - begin)))
    seconds = timeit.timeit(work, number=calls) / calls
    device.release_memory()  # the next side may need it
    return seconds / items


def sides_of(group: str) -> dict[str, bool]:
    """Each side of a group, and whether its process has this project's malloc settings."""
    rows = [row for row in ROWS if row.group == group]
    others = [row.other for row in rows if row.other]
    tamed = [row.here for row in rows] + [other + TAMED for other in others]
    return dict.fromkeys(tamed, True) | dict.fromkeys(others, False)


def measure(group: str, cache: str, work: str) -> dict[str, list[float] | None]:
    """Seconds per item in every turn of every side; None if a library is not installed."""
    spawn, pools = multiprocessing.get_context("spawn"), {}
    for side, tamed in sides_of(group).items():
        pools[side] = ProcessPoolExecutor(1, spawn, start, (tamed, cache, work))
    seconds = {side: [] for side in pools}
    for side in list(pools) * TURNS:
        try:
            if seconds[side] is not None:
                future = pools[side].submit(turn, side.removesuffix(TAMED))
                seconds[side].append(future.result())
        except ImportError:
            seconds[side] = None
    for pool in pools.values():
        pool.shutdown()
    return seconds


def machine() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{name[1] if name else '?'}, {CPU_COUNT} cores, torch {torch.__version__}"


def table(seconds: dict[str, list[float] | None]) -> str:
    """The table between the `<!-- speed -->` marks of benchmarks/README.md, in Markdown."""
    medians = {side: statistics.median(turns) for side, turns in seconds.items() if turns}
    head = "| work | here | beside | there | times | times, with this malloc there | aim |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for work, here, other, unit, aim in ROWS:
        mine, theirs, tamed = (medians.get(side) for side in (here, other, other + TAMED))
        there = ABSENT if seconds.get(other, []) is None else shown(theirs, unit)
        cells = [work, shown(mine, unit), LABELS[other.rpartition("_")[2]], there]
        cells += [f"{number(s / mine)}x" if s and mine else "-" for s in (theirs, tamed)]
        lines.append("| " + " | ".join([*cells, aim]) + " |")
    return "\n".join([*lines, "", f"Measured on {machine()}."])


def shown(seconds: float | None, unit: str) -> str:
    return f"{number(seconds if unit == 's' else 1 / seconds)} {unit}" if seconds else "-"


def number(value: float) -> str:
    """The value with at least three digits, thousands with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def main(arguments: argparse.Namespace):
    open_data(Config(cache=arguments.cache))  # makes the embedded set if it is missing
    seconds = {}
    with tempfile.TemporaryDirectory() as work:
        for group in GROUPS:
            messages.say(f"measuring {group}")
            seconds |= measure(group, arguments.cache, work)
    print(table(seconds))


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
