"""Which way to put codebook indices before a GAN works? One VQ-VAE, one row per way.

    python benchmarks/ablate.py RUN                  # every row that the CSV does not have
    python benchmarks/ablate.py RUN --rows pc1 raw   # these
    python benchmarks/ablate.py --table              # the README's table, from the CSV

RUN is the folder of a finished seed: its VQ-VAE and index maps are shared by all rows. A row is
a whole DCGAN, trained for `--kimg` thousand maps and scored as `predict.py evaluate` does. Rows
go to `ablation.csv` beside this file, their networks to `--out`, where a stopped row continues.
"""

import argparse
import csv
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from scipy.spatial.distance import cdist

import evaluation
import figures
import modules
import predict
import runtime
import train
from dataset import open_data

BCE = {"gan_loss": "bce", "gan_beta1": 0.5, "gan_lr": 2e-4, "ema_kimg": 0.0}
ONE = {"map_channels": 1}

# What the GAN draws and how it learns -> what differs from the default
ROWS = {
    "coordinates": ("4 principal coordinates, nearest code (the default)", {}),
    "pc1": ("one channel, PC-1 order, even bins", {"order": "pc1", **ONE}),
    "quantile": ("one channel, PC-1 order, quantile bins", {"order": "pc1", **ONE}),
    "salesman": ("one channel, travelling-salesman order, even bins", {"order": "pc1", **ONE}),
    "raw": ("one channel, raw index order, even bins", {"order": "raw", **ONE}),
    "coordinates-bce": ("4 principal coordinates, BCE and BatchNorm", BCE),
    "original": (
        "the original: three copies, raw order, even bins, BCE and BatchNorm",
        {"order": "raw", "map_channels": 3, **BCE},
    ),
    "no-average": ("the default without averaging the generator", {"ema_kimg": 0.0}),
}
SCORES = {
    "fd_train": "relative FD",
    "learned_fd_train": "relative FD, encoder",
    "fine_fd_reconstruction": "fine FD to reconstructions",
    "recall": "recall",
    "coverage": "coverage",
    "ms_ssim_of_pairs": "MS-SSIM of pairs",
    "code_tv": "codes, TV",
    "code_pairs_tv_horizontal": "pairs, TV",
}
COLUMNS = ("row", "seed", "kimg", "seconds", *SCORES)
CSV = HERE / "ablation.csv"


# --- orders that are not in modules.py, since they did not win -----------------------------


def quantile_bins(fitted: modules.CodeMap, codebook, counts) -> tuple[torch.Tensor, ...]:
    """PC-1 order; a bin is as wide as its code is frequent. Two equal channels."""
    share = counts[fitted.used].double() / counts.sum()
    middles = (share.cumsum(0) - share / 2) * 2 - 1
    return fitted.used, middles.float()[:, None].expand(-1, 2).contiguous()


def salesman_order(fitted: modules.CodeMap, codebook, counts) -> tuple[torch.Tensor, ...]:
    """A short path through all used codes: nearest neighbour, then 2-opt; even bins."""
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
            # Turning path[i..j] round exchanges two steps for two others.
            j = np.arange(i + 1, len(path) - 1)
            before = far[path[i - 1], path[i]] + far[path[j], path[j + 1]]
            after = far[path[i - 1], path[j]] + far[path[i], path[j + 1]]
            best = int((before - after).argmax())
            if before[best] - after[best] > 1e-9:
                path[i : j[best] + 1] = path[i : j[best] + 1][::-1].copy()
                better = True
    return fitted.used[torch.from_numpy(path)], fitted.points


OWN_MAPS = {"quantile": quantile_bins, "salesman": salesman_order}


# --- one row ------------------------------------------------------------------------------


def prepare(name: str, base: predict.TrainedRun, folder: Path, kimg: float, data, seed: int):
    """A run whose VQ-VAE and index maps are those of `base`, and whose DCGAN is not trained."""
    changes = dict(ROWS[name][1])
    if name == "quantile":
        changes["map_channels"] = 2
    config = replace(base.config, gan_kimg=kimg, **changes)
    run = train.open_seed(folder, config, seed, data)
    mine = run.fingerprint()
    for file in ("vqvae_best.pt", "vqvae_last.pt"):
        values = runtime.load_checkpoint(base.folder / file) | mine
        runtime.save_checkpoint(run.path(file), values)
    if not run.path("codes.npy").exists():
        os.link(base.folder / "codes.npy", run.path("codes.npy"))
    codebook = base.vqvae.quantizer.codebook.cpu()
    fitted = modules.CodeMap.fit(codebook, base.counts, config.order, config.map_channels)
    used, points = fitted.used, fitted.points
    if name in OWN_MAPS:
        used, points = OWN_MAPS[name](fitted, codebook, base.counts)
    values = runtime.load_checkpoint(base.folder / "codes.pt") | mine
    values |= {"used": used, "points": points}
    values["vqvae"] = runtime.checksum(run.path("vqvae_best.pt"))
    runtime.save_checkpoint(run.path("codes.pt"), values)
    return run


def measure(name: str, run: train.Run, scorer: evaluation.Scorer, kimg: float) -> dict:
    start = time.monotonic()
    with run.signals:
        train.train_dcgan(run)
    seconds = time.monotonic() - start
    trained = predict.load_run(run.folder)
    scorer.draw(trained)
    scores = evaluation.score_generation(scorer)
    images = trained.sample(8)[1][:, 0].numpy()
    runtime.save_figure(
        run.folder.parent / f"{name}.png", lambda: figures.strip(images, (), trained.stamp)
    )
    row = {"row": name, "seed": run.seed, "kimg": kimg, "seconds": round(seconds)}
    return row | {key: round(scores[key]["generated"], 4) for key in SCORES}


def read_rows() -> list[dict]:
    if not CSV.exists():
        return []
    with open(CSV, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(row: dict):
    new = not CSV.exists()
    with open(CSV, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table() -> str:
    """The README's table; a row that was not measured says so."""
    found = read_rows()
    lines = ["| what the GAN draws, and its loss | " + " | ".join(SCORES.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(SCORES))
    for name, (label, _) in ROWS.items():
        mine = [row for row in found if row["row"] == name]
        if not mine:
            cells = ["not measured", *[""] * (len(SCORES) - 1)]
        elif len(mine) == 1:
            cells = [_shown(float(mine[0][key])) for key in SCORES]
        else:
            values = {key: np.array([float(row[key]) for row in mine]) for key in SCORES}
            cells = [f"{_shown(v.mean())} ({_shown(v.std(ddof=1))})" for v in values.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a finished seed")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="[all]")
    parser.add_argument("--kimg", type=float, default=40.0, help="maps seen, thousands [40]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the DCGANs [0]")
    parser.add_argument("--out", default="runs/ablation", help="[runs/ablation]")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    arguments = parser.parse_args()
    if arguments.table or not arguments.run:
        print(table())
        return
    base = predict.load_run(arguments.run)
    data = open_data(base.config)
    done = {(row["row"], int(row["seed"]), float(row["kimg"])) for row in read_rows()}
    scorer = None
    for name in arguments.rows:
        if (name, arguments.seed, arguments.kimg) in done:
            continue
        folder = Path(arguments.out) / name
        run = prepare(name, base, folder, arguments.kimg, data, arguments.seed)
        scorer = scorer or evaluation.Scorer(base, data)
        row = measure(name, run, scorer, arguments.kimg)
        append_row(row)
        runtime.say(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    runtime.run_script(main)
