"""How to show codebook indices to a GAN, and is a GAN the right prior? One row per answer.

    python benchmarks/ablate.py RUN                  # every row that the CSV does not have
    python benchmarks/ablate.py RUN --rows pc1 raw   # these
    python benchmarks/ablate.py --table              # the table, from the CSV

RUN is the folder of a finished seed. All rows use its VQ-VAE, index maps and decoder. A row
trains one DCGAN on 40,000 maps, about 3 minutes on two cores, without a denoiser, which would
hide what a GAN draws. Scores are those of `predict.py evaluate`. They are added to ablation.csv
beside this file; networks go to --out, where a stopped row continues.
"""

import argparse
import csv
import functools
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a finished seed")
    parser.add_argument("--rows", metavar="ROW", nargs="+", help="[all]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the DCGANs [0]")
    parser.add_argument("--out", default="runs/ablation", help="[runs/ablation]")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    return parser.parse_args()


if __name__ == "__main__":  # --help must not wait for the import of torch
    ARGUMENTS = parse()

import numpy as np
import torch
import torch.nn.functional as F
from pixelcnn import PixelCNN
from scipy.spatial.distance import cdist
from torch import Tensor

import modules
import predict
import train
from config import Config, Exit, UserError
from dataset import Data, open_data
from scores import evaluation, figures
from stages.denoiser import train_denoiser
from stages.index_maps import RealMaps
from stages.stage import ORDER, Run, open_seed, order_of
from support import checkpoints, device, endings, files, messages

# By Adam, as in the rows measured first.
ALONE = {"gan_kimg": 40.0, "denoiser_kimg": 0.0, "optimizer": "adam"}
ALONE |= {"gan_lr": (8e-4, 8e-4), "gamma": 0.3}
SECONDS = 180  # of training of the autoregressive prior

SCORES = {
    "fd_train": "relative FD", "learned_fd_train": "relative FD, encoder",
    "fine_fd_reconstruction": "fine FD to reconstructions", "recall": "recall",
    "coverage": "coverage", "ms_ssim_of_pairs": "MS-SSIM of pairs",
}  # fmt: skip
EFFORT = {"seconds": "training, s", "kimg": "1,000 maps", "ms_per_sample": "ms a sample"}
REFERENCES = {"real": "(real slices)", "reconstruction": "(their reconstructions)"}
# base: checksum of the index maps. commit: of the code that measured the row (or earlier).
COLUMNS = ("row", "seed", "base", "commit", *EFFORT, *SCORES)
CSV = HERE / "ablation.csv"


# --- other orders of the codes, in even bins of one channel ---------------------------------
# Each takes the fitted PC-1 code map, the codebook (K, D) and the training split's counts (K,).
# It returns the used codes (U,) in a new order, and their places (U, 1) in (-1, 1).


def salesman_order(fitted: modules.CodeMap, codebook: Tensor, counts: Tensor):
    """A short path through all used codes: nearest neighbour, then 2-opt."""
    vectors = codebook[fitted.used].double().numpy()
    far = cdist(vectors, vectors)
    path = [0]  # an end of the PC-1 order
    left = set(range(1, len(vectors)))
    while left:
        path.append(min(left, key=far[path[-1]].__getitem__))
        left.remove(path[-1])
    path, better = np.array(path), True
    while better:
        better = False
        for i in range(1, len(path) - 2):
            # Reversing path[i..j] replaces two steps by two others.
            j = np.arange(i + 1, len(path) - 1)
            before = far[path[i - 1], path[i]] + far[path[j], path[j + 1]]
            after = far[path[i - 1], path[j]] + far[path[i], path[j + 1]]
            best = int((before - after).argmax())
            if before[best] - after[best] > 1e-9:
                path[i : j[best] + 1] = path[i : j[best] + 1][::-1].copy()
                better = True
    return fitted.used[torch.from_numpy(path)], fitted.points


def kohonen_order(fitted: modules.CodeMap, codebook: Tensor, counts: Tensor):
    """Codes in the order of their nodes on a chain, fitted by Kohonen's batch rule (1990).

    The chain has U nodes and starts as the PC-1 order. Its neighbourhood shrinks from U/4 nodes
    to half a node. A code belongs to its nearest node.
    """
    vectors = codebook[fitted.used].double()  # (U, D)
    U = len(vectors)
    nodes, place = vectors.clone(), torch.arange(U, dtype=torch.float64)
    for sigma in np.geomspace(U / 4, 0.5, 100):
        nearest = torch.cdist(vectors, nodes).argmin(1)  # (U,)
        pull = torch.exp(-((place[:, None] - place[nearest]) ** 2) / (2 * sigma**2))
        total = pull.sum(1, keepdim=True)  # (nodes, 1)
        nodes = torch.where(total > 1e-9, pull @ vectors / total.clamp_min(1e-9), nodes)
    order = torch.cdist(vectors, nodes).argmin(1).argsort(stable=True)
    return fitted.used[order], fitted.points


def quantile_places(fitted: modules.CodeMap, codebook: Tensor, counts: Tensor):
    """PC-1 order. A code's bin is as wide as its share of all cells: rare codes lie close."""
    share = counts[fitted.used].double() / counts.sum()
    return fitted.used, ((share.cumsum(0) - share / 2) * 2 - 1).float()[:, None]


# --- controls: a DCGAN of pixels, an autoregressive prior -----------------------------------


def write_pixels(run: Run) -> dict:
    """Replace codes.npy by slices at 64x64, whose grey levels 0..255 are the indices."""
    maps = np.empty((len(run.data.images), 64, 64), np.uint16)  # 0 is black
    for start in range(0, len(maps), 256):
        part = run.data.images[start : start + 256].astype(np.float32)
        maps[start : start + 256] = part.reshape(-1, 64, 4, 64, 4).mean((2, 4)).round()
    np.save(run.path("codes.npy"), maps)
    counts = train.histogram(maps, run.data.train.rows, run.config.codes)
    return {
        "used": torch.arange(256), "points": modules.even_middles(256),
        "background": torch.tensor(0), "counts": {"train": counts},
        "maps": checkpoints.checksum(run.path("codes.npy")),
    }  # fmt: skip


def enlarge(vqvae: modules.VQVAE, indices: Tensor) -> Tensor:
    """In place of `VQVAE.decode`: grey levels (B, 64, 64) -> (B, 1, 256, 256), bicubic."""
    small = indices[:, None].float() / 255
    return F.interpolate(small, scale_factor=4, mode="bicubic").clamp(0, 1)


@dataclass
class Autoregressive(predict.TrainedRun):
    """A finished run whose maps come from a PixelCNN."""

    prior: PixelCNN

    def draw(self, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ranks = [self.prior.draw(part) for part in level.to(self.device).split(128)]
        maps = self.code_map.used[torch.cat(ranks)].cpu()
        return maps, modules.in_full_batches(self.vqvae.decode, maps)


def train_autoregressive(run: Run, base: predict.TrainedRun):
    """Train a PixelCNN for SECONDS -> its run, the seconds, thousands of maps seen."""
    torch.manual_seed(run.seed)
    prior, real = PixelCNN(len(base.code_map.used)).to(run.device), RealMaps(run)
    adam = torch.optim.Adam(prior.parameters(), lr=2e-3)
    begun, nimg, B = time.monotonic(), 0, 16
    while (passed := time.monotonic() - begun) < SECONDS:
        for group in adam.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * passed / SECONDS))
        rows = order_of(run.seed, ORDER, len(real.levels), nimg, B)
        ranks = real.code_map.rank[real.real_maps(run.data.train.rows[rows])]
        with device.autocast(run.device, run.config.precision):
            scores = prior(ranks, real.levels[rows].to(run.device))
        loss = F.cross_entropy(scores.float().flatten(0, 2), ranks.flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        nimg += B
    messages.say(f"autoregressive: {loss.item() / math.log(2):.2f} bits a cell at the end")
    return Autoregressive(**vars(base), prior=prior.eval()), passed, nimg / 1000


# --- the rows -------------------------------------------------------------------------------


def train_gan(run: Run, base: predict.TrainedRun):
    """Train the DCGAN, and the row's denoiser -> the run, seconds, thousands of maps seen."""
    with run.signals:
        train.train_dcgan(run)
        train_denoiser(run)
    trained = predict.load_run(run.folder)
    stages = [stage for stage in ("dcgan", "denoiser") if stage in trained.trained]
    return trained, sum(seconds_of(run.folder, s) for s in stages), run.config.gan_kimg


def without_contrast(run: Run, base: predict.TrainedRun):
    """The network of row `coordinates`, which must be in --out, with contrast 0."""
    folder = run.folder.parents[1] / "coordinates" / run.folder.name
    trained = predict.load_run(folder)
    trained.generator.contrast.zero_()
    return trained, seconds_of(folder, "dcgan"), trained.config.gan_kimg


def seconds_of(folder: Path, stage: str) -> float:
    return checkpoints.load_checkpoint(folder / f"{stage}_last.pt")["seconds"]


@dataclass(frozen=True)
class Row:
    """What the GAN draws and how it learns, as differences from the defaults."""

    label: str
    config: dict = field(default_factory=dict)
    order: Callable | None = None  # (fitted, codebook, counts) -> used, points
    maps: Callable | None = None  # run -> new values of codes.pt; writes codes.npy
    decode: Callable = modules.VQVAE.decode
    train: Callable = train_gan


ONE = {"map_channels": 1}
PC1 = {"order": "pc1", **ONE}
ROWS = {
    "coordinates": Row("4 principal coordinates, nearest code"),
    "coordinates-denoised": Row(
        "the same, then the denoiser", {"denoiser_kimg": Config.denoiser_kimg}
    ),
    "pc1": Row("one channel, PC-1 order, even bins", PC1),
    "quantiles": Row("one channel, PC-1 order, quantile bins", PC1, quantile_places),
    "kohonen": Row("one channel, Kohonen chain, even bins", PC1, kohonen_order),
    "salesman": Row("one channel, travelling-salesman order, even bins", PC1, salesman_order),
    "raw": Row("one channel, raw index order, even bins", {"order": "raw", **ONE}),
    "no-contrast": Row("coordinates, contrast not adjusted", train=without_contrast),
    "no-average": Row("coordinates, generator not averaged", {"ema_kimg": 0.0}),
    "pixels": Row(
        "control: pixels at 64x64, enlarged", {"order": "raw", **ONE}, maps=write_pixels,
        decode=enlarge,
    ),
    "autoregressive": Row(
        "control: autoregressive prior (PixelCNN)", train=train_autoregressive
    ),
}  # fmt: skip
# Rows of the CSV whose code is not here any more; commit 14bcfed has it.
EARLIER = {
    "logits": "logits over the codes, soft coordinates",
    "coordinates-bce": "coordinates, the original's loss and networks",
    "original": "three copies, raw order, even bins, the original's loss and networks",
    "augmented": "coordinates, translation and cutout before D",
    "no-jitter": "PC-1 order, real maps not jittered in their bins",
}


def prepare(name: str, base: predict.TrainedRun, folder: Path, data: Data, seed: int):
    """A run with the VQ-VAE, index maps and decoder of `base`; its prior is not trained."""
    row = ROWS[name]
    config = replace(base.config, **ALONE | row.config)
    run = open_seed(folder, config, seed, data)
    mine = run.fingerprint()

    def adopt(stage: str, **link):
        for file in (f"{stage}_best.pt", f"{stage}_last.pt"):
            values = checkpoints.load_checkpoint(base.folder / file) | mine | link
            checkpoints.save_checkpoint(run.path(file), values)

    adopt("vqvae")
    shutil.copyfile(base.folder / "codes.npy", run.path("codes.npy"))
    codebook = base.vqvae.quantizer.codebook.cpu()
    fitted = modules.CodeMap.fit(codebook, base.counts, config.order, config.map_channels)
    points = fitted.used, fitted.points
    if row.order:
        points = row.order(fitted, codebook, base.counts)
    values = checkpoints.load_checkpoint(base.folder / "codes.pt") | mine
    values |= {"used": points[0], "points": points[1]}
    values["vqvae"] = checkpoints.checksum(run.path("vqvae_best.pt"))
    values |= row.maps(run) if row.maps else {}
    checkpoints.save_checkpoint(run.path("codes.pt"), values)
    if config.decoder_kimg:
        adopt("decoder", codes=checkpoints.checksum(run.path("codes.pt")))
    return run


def measure(name: str, run: Run, base: predict.TrainedRun, scorer) -> list[dict]:
    """Train and score one row. With the first row of a base come the references."""
    row = ROWS[name]
    with mock.patch.object(modules.VQVAE, "decode", row.decode):
        trained, seconds, kimg = row.train(run, base)
        begun = time.monotonic()
        pictures = trained.sample(64)[1]
        took = (time.monotonic() - begun) / 64
        scorer.draw(trained)
    np.save(run.path("four.npy"), pictures[:4, 0].numpy())
    scores = evaluation.score_generation(scorer)
    found = {key: round(scores[key]["generated"], 4) for key in SCORES}
    if row.maps:
        del found["fine_fd_reconstruction"]  # its maps hold no codes
    effort = {"seconds": round(seconds), "kimg": round(kimg, 1)}
    effort["ms_per_sample"] = round(took * 1000, 1)
    made = {"base": base_of(base), "commit": commit()}
    rows = [{"row": name, "seed": run.seed} | made | effort | found]
    if made["base"] not in {row["base"] for row in read_rows()}:
        for kind in REFERENCES:
            found = {k: round(scores[k][kind], 4) for k in SCORES if kind in scores[k]}
            rows.append({"row": kind} | made | found)
    return rows


def base_of(base: predict.TrainedRun) -> str:
    return f"{checkpoints.checksum(base.folder / 'codes.npy'):08x}"


def commit() -> str:
    """The commit of the code, or "" outside git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()


# --- the table ------------------------------------------------------------------------------


def read_rows() -> list[dict]:
    if not CSV.exists():
        return []
    with open(CSV, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(rows: list[dict]):
    rows = read_rows() + rows
    with open(CSV, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def table() -> str:
    """The table of docs/experiments.md: mean (sd) over seeds, a line per row and base."""
    shown, found = SCORES | EFFORT, read_rows()
    head = " | ".join(["what the GAN draws, and how it learns", *shown.values(), "commit"])
    lines = [f"| {head} |", "| --- |" + " --- |" * (len(shown) + 1)]
    labels = {name: row.label for name, row in ROWS.items()} | EARLIER | REFERENCES
    for name, label in labels.items():
        mine = [row for row in found if row["row"] == name]
        for base in dict.fromkeys(row["base"] for row in mine):
            seeds = [row for row in mine if row["base"] == base]
            cells = [_shown([float(row[k]) for row in seeds if row[k]]) for k in shown]
            commits = dict.fromkeys(row["commit"] for row in seeds)
            lines.append("| " + " | ".join([label, *cells, ", ".join(commits)]) + " |")
    return "\n".join(lines)


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    text = f"{mean:.0f}" if abs(mean) >= 100 else f"{mean:.3g}"
    return text if len(set(values)) == 1 else f"{text} ({statistics.stdev(values):.2g})"


def draw(folder: Path, seed: int):
    """rows.png: the first samples of each row, of the same noise."""
    paths = {name: folder / name / f"seed-{seed}" / "four.npy" for name in ROWS}
    rows = {name: np.load(path) for name, path in paths.items() if path.exists()}
    files.save_figure(folder / "rows.png", lambda: figures.side_by_side(rows))


def main(arguments: argparse.Namespace):
    if unknown := sorted(set(arguments.rows or ()) - set(ROWS)):
        raise UserError(Exit.USAGE, f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if arguments.table or not arguments.run:
        print(table())
        return
    base = predict.load_run(arguments.run)
    data = open_data(base.config)
    if data.fingerprint != base.fingerprint:
        raise UserError(Exit.CHECKPOINT, f"{base.folder} was trained on other data")
    scorer = functools.cache(lambda: evaluation.Scorer(base, data))  # made when first needed
    folder, seed = Path(arguments.out) / base_of(base), arguments.seed
    done = {(row["row"], row["seed"], row["base"]) for row in read_rows()}
    for name in arguments.rows or ROWS:
        if (name, str(seed), base_of(base)) in done:
            continue
        run = prepare(name, base, folder / name, data, seed)
        rows = measure(name, run, base, scorer())
        append(rows)
        messages.say(", ".join(f"{key} {value}" for key, value in rows[0].items()))
    draw(folder, seed)


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
