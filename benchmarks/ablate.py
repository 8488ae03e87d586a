"""Which way to put codebook indices before a GAN works? One VQ-VAE, one row per way.

    python benchmarks/ablate.py RUN                  # every row that the CSV does not have
    python benchmarks/ablate.py RUN --rows pc1 raw   # these
    python benchmarks/ablate.py --table              # the README's table, from the CSV

RUN is the folder of a finished seed of preset `quick`: its VQ-VAE and index maps are shared by
all rows. A row is a whole DCGAN, trained on 40,000 maps and scored as `predict.py evaluate`
does. Rows go to `ablation.csv` beside this file, their networks to `--out`, where a stopped row
continues. Not among the rows: quantile bins, a Kohonen chain, logits with soft embeddings, an
autoregressive prior.
"""

import argparse
import csv
import shutil
import statistics
import sys
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
from config import Config, Exit, UserError
from dataset import open_data

KIMG = 40.0  # maps seen per row, thousands: about 3 minutes on two cores
# BCE, BatchNorm in both networks, no slice level, no averaging, the original's learning rate
BCE = {"gan_loss": "bce", "gan_beta1": 0.5, "gan_lr": 2e-4, "ema_kimg": 0.0}
ONE = {"map_channels": 1}

# What the GAN draws and how it learns -> what differs from the default
ROWS = {
    "coordinates": ("4 principal coordinates, nearest code (the default)", {}),
    "pc1": ("one channel, PC-1 order, even bins", {"order": "pc1", **ONE}),
    "salesman": ("one channel, travelling-salesman order, even bins", {"order": "pc1", **ONE}),
    "raw": ("one channel, raw index order, even bins", {"order": "raw", **ONE}),
    "coordinates-bce": ("4 principal coordinates, the original's loss and networks", BCE),
    "original": (
        "three copies, raw order, even bins, the original's loss and networks",
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
REFERENCES = {"real": "(real slices)", "reconstruction": "(their reconstructions)"}
COLUMNS = ("row", "seed", "base", "seconds", *SCORES)
CSV = HERE / "ablation.csv"


# --- an order that is not in modules.py, since it did not win --------------------------------


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


OWN_MAPS = {"salesman": salesman_order}


# --- one row ------------------------------------------------------------------------------


def prepare(name: str, base: predict.TrainedRun, folder: Path, data, seed: int) -> train.Run:
    """A run whose VQ-VAE and index maps are those of `base`, and whose DCGAN is not trained."""
    config = replace(base.config, gan_kimg=KIMG, **ROWS[name][1])
    run = train.open_seed(folder, config, seed, data)
    mine = run.fingerprint()
    for file in ("vqvae_best.pt", "vqvae_last.pt"):
        values = runtime.load_checkpoint(base.folder / file) | mine
        runtime.save_checkpoint(run.path(file), values)
    shutil.copyfile(base.folder / "codes.npy", run.path("codes.npy"))
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


def measure(name: str, run: train.Run, scorer: evaluation.Scorer) -> list[dict]:
    """Train and score one row; with the first come the references."""
    with run.signals:
        train.train_dcgan(run)
    seconds = runtime.load_checkpoint(run.path("dcgan_last.pt"))["seconds"]
    trained = predict.load_run(run.folder)
    scorer.draw(trained)
    scores = evaluation.score_generation(scorer)
    rows = [{"row": name, "seed": run.seed, "seconds": round(seconds)}]
    rows[0] |= {key: round(scores[key]["generated"], 4) for key in SCORES}
    if not read_rows():
        for kind in REFERENCES:
            found = {k: round(scores[k][kind], 4) for k in SCORES if kind in scores[k]}
            rows.append({"row": kind} | found)
    return rows


def read_rows() -> list[dict]:
    if not CSV.exists():
        return []
    with open(CSV, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(rows: list[dict]):
    new = not CSV.exists()
    with open(CSV, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table() -> str:
    """The README's table: means over seeds; a row that was not measured says so."""
    found = read_rows()
    lines = ["| what the GAN draws, and how it learns | " + " | ".join(SCORES.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(SCORES))
    labels = {name: label for name, (label, _) in ROWS.items()} | REFERENCES
    for name, label in labels.items():
        mine = [row for row in found if row["row"] == name]
        columns = {k: [float(row[k]) for row in mine if row[k]] for k in SCORES}
        cells = [_shown(values) for values in columns.values()]
        lines.append(f"| {label} | " + " | ".join(cells if mine else ["not measured"]) + " |")
    return "\n".join(lines)


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    text = f"{mean:.0f}" if abs(mean) >= 100 else f"{mean:.3g}"
    return text if len(values) == 1 else f"{text} ({statistics.stdev(values):.2g})"


def draw(folder: Path, seed: int):
    """images/mappings.png: the same noise through the network of every row."""
    runs = {name: folder / name / f"seed-{seed}" for name in ROWS}
    rows = {
        name: predict.load_run(path).sample(4)[1][:, 0].numpy()
        for name, path in runs.items()
        if (path / "dcgan_best.pt").exists()
    }
    picture = HERE.parent / "images/mappings.png"
    runtime.save_figure(picture, lambda: figures.side_by_side(rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a finished seed")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="[all]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the DCGANs [0]")
    parser.add_argument("--out", default="runs/ablation", help="[runs/ablation]")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    arguments = parser.parse_args()
    if arguments.table or not arguments.run:
        print(table())
        return
    base = predict.load_run(arguments.run)
    data = open_data(base.config)
    if data.fingerprint != base.fingerprint:
        raise UserError(Exit.CHECKPOINT, f"{base.folder} was trained on other data")
    if replace(base.config, gan_kimg=KIMG).identity() != Config(gan_kimg=KIMG).identity():
        raise UserError(Exit.CHECKPOINT, f"{base.folder} is not of preset quick")
    mark = f"{runtime.checksum(base.folder / 'codes.pt'):08x}"
    if {row["base"] for row in read_rows()} - {mark}:
        raise UserError(Exit.BUSY, f"{CSV} holds rows of another VQ-VAE: move it away")
    done = {(row["row"], row["seed"]) for row in read_rows()}
    scorer = None
    folder = Path(arguments.out) / mark
    for name in arguments.rows:
        if (name, str(arguments.seed)) in done:
            continue
        run = prepare(name, base, folder / name, data, arguments.seed)
        scorer = scorer or evaluation.Scorer(base, data)
        rows = [row | {"base": mark} for row in measure(name, run, scorer)]
        append(rows)
        runtime.say(", ".join(f"{key} {value}" for key, value in rows[0].items()))
    draw(folder, arguments.seed)


if __name__ == "__main__":
    runtime.run_script(main)
