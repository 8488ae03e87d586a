"""How fast is it: beside a plain implementation, beside other libraries, beside the machine?

    pip install -r benchmarks/requirements.txt       # the other libraries
    python benchmarks/speed.py                       # about 12 minutes; leave the machine alone
    python benchmarks/speed.py --groups search ssim  # these; the others stay as they were
    python benchmarks/speed.py --table               # the tables, from the JSON

Each side of a comparison lives in a process of its own, since how malloc behaves is set for a
whole process: this project's scripts set it (`runtime.tame_malloc`), other programs do not. The
others are measured both ways. Within a group the sides take turns, A B C A B C, each turn with
a warm-up, and medians are compared. Inputs are slices of the embedded set.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
JSON = HERE.parent / "runs/speed.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help="[all]")
    parser.add_argument("--cache", default="runs/cache", help="embedded set [runs/cache]")
    parser.add_argument("--out", type=Path, default=JSON, help="[runs/speed.json]")
    parser.add_argument("--table", action="store_true", help="print the tables and end")
    return parser.parse_args()


if __name__ == "__main__":  # a question for help must not wait for torch
    ARGUMENTS = parse()

import sides
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import runtime
from config import Config, Exit, UserError
from dataset import open_data

TURNS = 3
TURN_S = 0.5  # a turn repeats its work for about so long

PLAIN, BFLOAT16 = "plain", "here, bfloat16"
MONAI_VQVAE, MONAI_SEARCH = "MONAI VQVAE", "MONAI EMAQuantizer"
TRANSFORMER = "MONAI DecoderOnlyTransformer, extrapolated"
VQP, MSSSIM = "vector-quantize-pytorch", "pytorch-msssim"
LOADER = "cv2 in a DataLoader, one epoch"
# Comparison -> side -> maker. A side whose name begins with "here" is this project's.
GROUPS = {
    "machine": {
        "here, copy": sides.machine_copy,
        "here, float32": functools.partial(sides.machine_product, torch.float32),
        "here, bfloat16": functools.partial(sides.machine_product, torch.bfloat16),
    },
    "vqvae": {
        "here": functools.partial(sides.vqvae_here, "float32"),
        BFLOAT16: functools.partial(sides.vqvae_here, "bfloat16"),
        PLAIN: sides.vqvae_plain,
        MONAI_VQVAE: sides.vqvae_monai,
    },
    "search": {
        "here": functools.partial(sides.search_here, False),
        MONAI_SEARCH: functools.partial(sides.search_monai, False),
        VQP: functools.partial(sides.search_vqp, False),
    },
    "search-dense": {
        "here": functools.partial(sides.search_here, True),
        MONAI_SEARCH: functools.partial(sides.search_monai, True),
        VQP: functools.partial(sides.search_vqp, True),
    },
    "extract": {"here": sides.extract_here, PLAIN: sides.extract_plain},
    "dcgan": {"here": sides.dcgan_here, PLAIN: sides.dcgan_plain},
    "generate": {
        "here": functools.partial(sides.generate_here, True),
        "here, unrefined": functools.partial(sides.generate_here, False),
        TRANSFORMER: sides.transformer_monai,
    },
    "open": {
        "here": sides.open_first,
        "here, again": sides.open_again,
        "here, read": sides.read_here,
        LOADER: sides.read_loader,
    },
    "ssim": {
        "here": functools.partial(sides.ssim_here, False),
        MSSSIM: functools.partial(sides.ssim_msssim, False),
    },
    "ssim-loss": {
        "here": functools.partial(sides.ssim_here, True),
        MSSSIM: functools.partial(sides.ssim_msssim, True),
    },
}  # fmt: skip
# Training steps held against the machine: group, side -> what the table calls it
COUNTED = {
    ("vqvae", "here"): "VQ-VAE, float32",
    ("vqvae", BFLOAT16): "VQ-VAE, bfloat16",
    ("dcgan", "here"): "DCGAN, 8 steps",
}


class Line(NamedTuple):
    """A row of the table: one side of a group beside another, or beside nothing."""

    work: str
    group: str
    here: str
    other: str
    unit: str  # items per second; "s": seconds of one item
    aim: str


STEP = "VQ-VAE training step, seed architecture, batch 128"
SEARCH, OPEN = "code search, 32,768 vectors, K 512, D 64", f"{sides.PNGS:,} PNG slices"
LINES = (
    Line(f"{STEP}, float32", "vqvae", "here", PLAIN, "slices/s", "10x"),
    Line(f"{STEP}, float32", "vqvae", "here", MONAI_VQVAE, "slices/s", "6x"),
    Line(f"{STEP}, bfloat16", "vqvae", BFLOAT16, PLAIN, "slices/s", "18x"),
    Line(f"{STEP}, bfloat16", "vqvae", BFLOAT16, MONAI_VQVAE, "slices/s", ""),
    Line(f"{SEARCH}, of 8 slices", "search", "here", VQP, "vectors/s", "5x"),
    Line(f"{SEARCH}, of 8 slices", "search", "here", MONAI_SEARCH, "vectors/s", "5x"),
    Line(f"{SEARCH}, no background", "search-dense", "here", VQP, "vectors/s", ""),
    Line(f"{SEARCH}, no background", "search-dense", "here", MONAI_SEARCH, "vectors/s", ""),
    Line("index maps from the memory map, float32", "extract", "here", PLAIN, "slices/s", "4x"),
    Line("DCGAN training step, batch 32", "dcgan", "here", PLAIN, "maps/s", "2x"),
    Line(
        "generation, noise to 256x256 slice", "generate", "here", TRANSFORMER, "slices/s",
        "300 slices/s, 10,000x",
    ),
    Line(
        "the same by DCGAN and VQ-VAE alone, no denoiser, no sharper decoder", "generate",
        "here, unrefined", TRANSFORMER, "slices/s", "",
    ),
    Line(f"opening {OPEN}, first time", "open", "here", LOADER, "s", "10 s"),
    Line(f"opening {OPEN}, again", "open", "here, again", LOADER, "s", "0.1 s"),
    Line(f"reading {OPEN} in batches", "open", "here, read", LOADER, "s", ""),
    Line("SSIM as a metric, 64 slices", "ssim", "here", MSSSIM, "slices/s", "3x"),
    Line("SSIM as a loss, 32 windows of 128x128", "ssim-loss", "here", MSSSIM, "slices/s", ""),
)  # fmt: skip
ABSENT = "not installed: `pip install -r benchmarks/requirements.txt`"
TAMED = ", this malloc"  # ends the name of a side measured with `runtime.tame_malloc` too


# --- in a side's own process ------------------------------------------------------------------


def start(tamed: bool, cache: str, work: str):
    """The beginning of a side's process."""
    global inputs
    inputs = sides.Inputs(cache, work)
    torch.set_flush_denormal(True)  # as `runtime.run_script` does
    if tamed:
        runtime.tame_malloc()


@functools.cache
def made(group: str, side: str):
    torch.manual_seed(0)
    return GROUPS[group][side](inputs)


def turn(group: str, side: str) -> float:
    """Seconds per item, after a warm-up that also says how often to repeat."""
    work, items = made(group, side)
    begin = time.perf_counter()
    own = work()
    first = time.perf_counter() - begin
    if isinstance(own, float):
        return own / items
    calls = max(1, int(TURN_S / first))
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    seconds = (time.perf_counter() - begin) / calls
    runtime.release_memory()  # the next side may need it
    return seconds / items


class Count(TorchDispatchMode):
    """Bytes, operations and seconds of every operator, as it runs: forward, backward, Adam.

    Bytes are those of all tensors that an operator is given and gives back, once each, as if no
    cache kept any. Operations are those of products and convolutions (torch's flop_counter).
    """

    def __init__(self):
        super().__init__()
        self.operators: dict[str, dict[str, float]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - begin
        packet = func.overloadpacket
        counts = {"calls": 1, "seconds": seconds, "bytes": 0, "operations": 0}
        if not func.is_view and not packet.__name__.startswith("empty"):
            counts["bytes"] = touched([args, kwargs, out])
        if packet in flop_registry:
            counts["operations"] = flop_registry[packet](*args, **kwargs, out_val=out)
        mine = self.operators.setdefault(packet.__name__, dict.fromkeys(counts, 0))
        for name, value in counts.items():
            mine[name] += value
        return out


def touched(values) -> int:
    """Bytes of the different tensors among nested values; an expanded one counts once."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
    sizes = {
        (t.data_ptr(), t.dtype): min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        for t in tensors
    }
    return sum(sizes.values())


def count(group: str, side: str) -> dict:
    """One call of a side's work, operator by operator, and how many items it works on."""
    work, items = made(group, side)
    work()
    with Count() as counted:
        work()
    return {"items": items, "operators": counted.operators}


# --- in the process that asks -----------------------------------------------------------------


class Pools(dict):
    """Side -> its process, made when first asked; all end together."""

    def __init__(self, cache: str, work: str):
        super().__init__()
        self.places = cache, work

    def __missing__(self, side: str) -> ProcessPoolExecutor:
        tamed = side.startswith("here") or side.endswith(TAMED)
        spawn = multiprocessing.get_context("spawn")
        self[side] = ProcessPoolExecutor(1, spawn, start, (tamed, *self.places))
        return self[side]

    def ask(self, function, group: str, side: str):
        return self[side].submit(function, group, side.removesuffix(TAMED)).result()

    def close(self):
        for pool in self.values():
            pool.shutdown()


def contenders(group: str) -> Iterator[str]:
    for side in GROUPS[group]:
        yield side
        if not side.startswith("here"):
            yield side + TAMED


def measure(group: str, cache: str, work: str) -> dict:
    """Seconds per item of every turn of every side (None: not installed); and counts."""
    pools, seconds = Pools(cache, work), {side: [] for side in contenders(group)}
    try:
        for _ in range(TURNS):
            for side, found in seconds.items():
                if found is None:
                    continue
                try:
                    found.append(pools.ask(turn, group, side))
                except ImportError:
                    seconds[side] = None
        counts = {s: pools.ask(count, group, s) for s in seconds if (group, s) in COUNTED}
    finally:
        pools.close()
    return {"seconds": seconds, "counts": counts}


def machine() -> dict:
    """What was measured on, and how busy it was before."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {
        "processor": names[0] if names else "", "cores": os.cpu_count(),
        "torch": torch.__version__, "load_before": round(load, 2),
    }  # fmt: skip


# --- the tables -------------------------------------------------------------------------------


def table(found: dict) -> str:
    """Both tables in Markdown, beside others and beside the machine; and what that is."""
    where = "{processor}, {cores} cores, torch {torch}".format(**found["machine"])
    return "\n".join([*comparisons(found), "", *shares(found), "", f"Measured on {where}."])


def turns_of(found: dict, group: str, side: str) -> list | None:
    """Seconds per item; empty where it was not measured, None where it is not installed."""
    return found["groups"].get(group, {"seconds": {}})["seconds"].get(side, [])


def median(found: dict, group: str, side: str) -> float | None:
    turns = turns_of(found, group, side)
    return statistics.median(turns) if turns else None


def comparisons(found: dict) -> Iterator[str]:
    yield "| work | here | beside | there | times | times, with this malloc there | aim |"
    yield "| --- |" + " --- |" * 6
    for line in LINES:
        here = median(found, line.group, line.here)
        there, tamed = (median(found, line.group, line.other + end) for end in ("", TAMED))
        absent = turns_of(found, line.group, line.other) is None
        cells = [line.work, shown(here, line.unit), line.other]
        cells += [ABSENT if absent else shown(there, line.unit)]
        cells += [times(here, there), times(here, tamed), line.aim or "-"]
        yield "| " + " | ".join(cells) + " |"


def shown(seconds: float | None, unit: str) -> str:
    if seconds is None:
        return "-"
    return f"{number(seconds if unit == 's' else 1 / seconds)} {unit}"


def times(here: float | None, there: float | None) -> str:
    return f"{number(there / here)}x" if here and there else "-"


def number(value: float) -> str:
    """Two or three digits that matter, thousands with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def shares(found: dict) -> Iterator[str]:
    """Each training step's bytes and operations per second beside a copy's and a product's."""
    yield "| step | GB | GB/s (of a copy's) | GFLOP | GFLOP/s (of a product's) | longest |"
    yield "| --- |" + " --- |" * 5
    for (group, side), label in COUNTED.items():
        counts = found["groups"].get(group, {"counts": {}})["counts"].get(side)
        if counts:
            yield f"| {label} | " + " | ".join(share(found, group, side, counts)) + " |"


def share(found: dict, group: str, side: str, counts: dict) -> list[str]:
    """One step's cells: its time is the median of the turns, its counts are of one call."""
    seconds = median(found, group, side) * counts["items"]
    low = found["bfloat16"] and (side, group) != ("here", "vqvae")
    rates = {
        "bytes": median(found, "machine", "here, copy"),
        "operations": median(found, "machine", f"here, {'bfloat16' if low else 'float32'}"),
    }
    operators, cells = counts["operators"], []
    for what, at_best in rates.items():
        total = sum(row[what] for row in operators.values())
        of_best = f" ({100 * total * at_best / seconds:.0f} %)" if at_best else ""
        cells += [number(total / 1e9), number(total / seconds / 1e9) + of_best]
    longest = sorted(operators.items(), key=lambda item: -item[1]["seconds"])[:4]
    whole = sum(row["seconds"] for row in operators.values())
    parts = (f"`{name}` {100 * row['seconds'] / whole:.0f} %" for name, row in longest)
    return [*cells, ", ".join(parts)]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"groups": {}}


def main(arguments: argparse.Namespace):
    groups = arguments.groups or list(GROUPS)
    if unknown := set(groups) - set(GROUPS):
        raise UserError(
            Exit.USAGE, f"--groups {min(unknown)}: choose among {', '.join(GROUPS)}"
        )
    found = read(arguments.out)
    if not arguments.table:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        found |= {"machine": machine(), "bfloat16": runtime.has_bfloat16(sides.CPU)}
        open_data(Config(cache=arguments.cache))  # made now, if it never was
        with tempfile.TemporaryDirectory() as work:
            for group in groups:
                begin = time.monotonic()
                found["groups"][group] = measure(group, arguments.cache, work)
                runtime.write_json(arguments.out, found)
                runtime.say(f"{group}: {time.monotonic() - begin:.0f} s")
    print(table(found))


if __name__ == "__main__":
    runtime.run_script(lambda: main(ARGUMENTS))
