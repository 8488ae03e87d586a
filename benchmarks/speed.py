"""How fast is it, beside a plain implementation and beside other libraries?

    pip install -r benchmarks/requirements.txt        # the other libraries
    python benchmarks/speed.py                        # about 10 minutes, on an idle machine
    python benchmarks/speed.py --groups search ssim   # these; the others keep their numbers
    python benchmarks/speed.py --table                # the table, from the JSON

Each side has a process of its own, because malloc's settings hold for a whole process: this
project's scripts change them (`device.tame_malloc`), other programs do not. The other sides are
measured with both settings. Sides of one group take turns (A B C A B C), each turn begins with
a warm-up, and medians are compared. Inputs are slices of the embedded set.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A row of the table: this project's side beside another one. Sides: names in sides.py."""

    work: str
    here: str
    other: str
    unit: str  # items per second; "s": seconds per item
    aim: str = "-"

    @property
    def group(self) -> str:
        return self.here.partition("_")[0]


STEP = "VQ-VAE training step, seed architecture, batch 128"
SEARCH, OPEN = "code search, 32,768 vectors, K 512, D 64", "opening 9,664 PNG slices"
LOADER = "cv2 in a DataLoader, one epoch"
MAPS, DCGAN = "index maps from the memory map, float32", "DCGAN training step, batch 32"
DRAW = "generation, noise to 256x256 slice"
ALONE = "the same by DCGAN and VQ-VAE alone, no denoiser, no sharper decoder"
ROWS = (
    Row(f"{STEP}, float32", "vqvae_here", "vqvae_plain", "slices/s", "10x"),
    Row(f"{STEP}, float32", "vqvae_here", "vqvae_monai", "slices/s", "6x"),
    Row(f"{STEP}, bfloat16", "vqvae_here_bfloat16", "vqvae_plain", "slices/s", "18x"),
    Row(f"{SEARCH}, of 8 slices", "search_here", "search_vqp", "vectors/s", "5x"),
    Row(f"{SEARCH}, of 8 slices", "search_here", "search_monai", "vectors/s", "5x"),
    Row(f"{SEARCH}, no background", "dense_here", "dense_vqp", "vectors/s"),
    Row(f"{SEARCH}, no background", "dense_here", "dense_monai", "vectors/s"),
    Row(MAPS, "maps_here", "maps_plain", "slices/s", "4x"),
    Row(DCGAN, "dcgan_here", "dcgan_plain", "maps/s", "2x"),
    Row(DRAW, "generate_here", "generate_transformer", "slices/s", "300 slices/s, 10,000x"),
    Row(ALONE, "generate_here_alone", "generate_transformer", "slices/s"),
    Row(f"{OPEN}, first time", "open_here", "open_loader", "s", "10 s"),
    Row(f"{OPEN}, again", "open_here_again", "open_loader", "s", "0.1 s"),
    Row("SSIM as a metric, 64 slices", "ssim_here", "ssim_msssim", "slices/s", "3x"),
)
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))
LABELS = {  # of other sides, by the last part of their names
    "monai": "MONAI", "transformer": "MONAI's transformer, extrapolated", "plain": "plain",
    "vqp": "vector-quantize-pytorch", "msssim": "pytorch-msssim", "loader": LOADER,
}  # fmt: skip
ABSENT = "not installed: `pip install -r benchmarks/requirements.txt`"
TURNS = 3
TURN_S = 0.5  # a turn repeats its work for about this long
TAMED = ", tamed"  # ends the key of another side that is measured with this project's malloc


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="[all]")
    parser.add_argument("--cache", default="runs/cache", help="embedded set [runs/cache]")
    parser.add_argument("--out", default="runs/speed.json", help="[runs/speed.json]")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    return parser.parse_args()


if __name__ == "__main__":  # --help must not wait for the import of torch
    ARGUMENTS = parse()

import sides  # makes the project's own files importable
import torch

from config import Config
from dataset import open_data
from support import device, endings, files, messages


def start(tamed: bool, cache: str, work: str):
    """Prepare a side's own process."""
    global inputs
    inputs = sides.Inputs(cache, work)
    torch.set_flush_denormal(True)  # as `endings.run_script`
    if tamed:
        device.tame_malloc()


@functools.cache
def made(side: str):
    torch.manual_seed(0)
    return getattr(sides, side)(inputs)


def turn(side: str) -> float:
    """Return seconds per item, after a warm-up that also tells how often to repeat."""
    work, items = made(side)
    begin = time.perf_counter()
    own = work()
    if isinstance(own, float):
        return own / items
    calls = max(1, int(TURN_S / (time.perf_counter() - begin)))
    seconds = timeit.timeit(work, number=calls) / calls
    device.release_memory()  # the next side may need it
    return seconds / items


def sides_of(group: str) -> dict[str, bool]:
    """Each side of a group, and whether its process has this project's malloc settings."""
    rows = [row for row in ROWS if row.group == group]
    others = [row.other for row in rows]
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
    return f"{name[1] if name else '?'}, {os.cpu_count()} cores, torch {torch.__version__}"


def table(found: dict) -> str:
    """The table between the `<!-- speed -->` marks of benchmarks/README.md, in Markdown."""
    seconds = {k: v for group in found["groups"].values() for k, v in group.items()}
    medians = {side: statistics.median(turns) for side, turns in seconds.items() if turns}
    head = "| work | here | beside | there | times | times, with this malloc there | aim |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for work, here, other, unit, aim in ROWS:
        mine, theirs, tamed = (medians.get(side) for side in (here, other, other + TAMED))
        there = ABSENT if seconds.get(other, []) is None else shown(theirs, unit)
        cells = [work, shown(mine, unit), LABELS[other.rpartition("_")[2]], there]
        cells += [f"{number(s / mine)}x" if s and mine else "-" for s in (theirs, tamed)]
        lines.append("| " + " | ".join([*cells, aim]) + " |")
    return "\n".join([*lines, "", f"Measured on {found['machine']}."])


def shown(seconds: float | None, unit: str) -> str:
    return f"{number(seconds if unit == 's' else 1 / seconds)} {unit}" if seconds else "-"


def number(value: float) -> str:
    """The value with at least three digits, thousands with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def main(arguments: argparse.Namespace):
    out, found = Path(arguments.out), {"groups": {}, "machine": "?"}
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
    if not arguments.table:
        found["machine"] = machine()
        out.parent.mkdir(parents=True, exist_ok=True)
        open_data(Config(cache=arguments.cache))  # makes the embedded set if it is missing
        with tempfile.TemporaryDirectory() as work:
            for group in arguments.groups:
                begin = time.monotonic()
                found["groups"][group] = measure(group, arguments.cache, work)
                files.write_json(out, found)
                messages.say(f"{group}: {time.monotonic() - begin:.0f} s")
    print(table(found))


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
