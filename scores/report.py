"""What a finished run shows: the figures in its folder, and report.html of a results folder.

In: a loaded run (`predict.TrainedRun`, or None if every run failed) and the data. Out: PNGs;
the page as text, one file that opens from disk without a network. `report.html.jinja` says what
stands where; this file gives the values. File names come from users: the template escapes them.
"""

import base64
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from config import Config
from dataset import Data, evenly
from scores import evaluation, figures, metrics
from support import files
from support.cli import flags

SAMPLES = 24  # in the grid; each brings its nearest training slice with it
FRAMES = {"sweep": 32, "walk": 24}
UNSEEN = 256  # test slices whose distances to training slices stand beside the samples'
SKIPPED = 100  # files listed; data_report.json has all
LABELS = evaluation.IMAGE_LABELS | evaluation.LABELS


def page(folder: Path, run, data: Data) -> str:
    """The page of a results folder as text. run: the best one, or None."""
    results = files.read_json(folder / "results.json")
    # The best first, those without a rank last.
    runs = sorted(results["runs"], key=lambda row: (row.get("rank") is None, row.get("rank")))
    shown = {
        "name": folder.resolve().name,
        "stamp": data.stamp,
        "results": results,
        "runs": runs,
        "labels": LABELS,
        "data": data.report,
        "skipped_shown": SKIPPED,
        "run": None if run is None else {**scores_of(run), **pictures_of(run, data)},
        "command": run and command_of(run.config),
    }
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    return template.render(shown)


# --- numbers and words --------------------------------------------------------------------


def scores_of(run) -> dict:
    """The tables of one run's metrics.json, and its headline."""
    result = files.read_json(run.folder / "metrics.json")
    g, r, c = (result[part] for part in ("generation", "reconstruction", "codebook"))
    generation = [(LABELS[n], cells, reading(n)) for n, cells in evaluation.generation_rows(g)]
    reconstruction = [
        (label, f"{r[name]['mean']:.3f}", f"{r[name]['sd']:.3f}", reading(name))
        for name, label in evaluation.IMAGE_LABELS.items()
    ]
    return {
        "folder": run.folder.name, "headline": headline(g, r), "n": g["n"],
        "generation": generation, "test_slices": r["n"], "reconstruction": reconstruction,
        "codebook": c,
    }  # fmt: skip


def reading(name: str) -> str:
    """How to read a score: one sentence."""
    if name.startswith("layout_"):
        return "The same on means over 16x16 pixels: shape and place, no texture."
    return evaluation.READING[name]


def headline(g: dict, r: dict) -> list[tuple[str, str, str]]:
    """The five numbers to read first: label, number, reference."""
    five = [("SSIM of reconstructions", f"{r['ssim']['mean']:.3f}", "1 is the original")]
    references = {"judge_auc_test": "real", "fd_train": "unseen_people", "recall": "real"}
    for name, kind in (references | {"memorised_share": "unseen_people"}).items():
        label, reference = LABELS[name].partition(" (")[0], kind.replace("_", " ")
        number, beside = g[name]["generated"], g[name][kind]
        five.append((label, f"{number:.3g}", f"{reference}: {beside:.3g}"))
    return five


def command_of(config: Config) -> str:
    """The command that trains this seed."""
    usual = Path(config.cache) == Path(Config.cache).resolve()
    cache = Config.cache if usual else config.cache
    words = flags(replace(config, runs=1, threads=0, seed=0, cache=cache))
    return shlex.join(["python", "driver.py", *words, "--seed", str(config.seed)])


# --- figures of a run ---------------------------------------------------------------------


def save_figures(run, data: Data, rows: list[dict]):
    """Draw every figure of a finished run into its folder `figures`. rows: of log.csv."""
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)

    def save(name: str, draw, *values):
        files.save_figure(folder / f"{name}.png", lambda: draw(*values, stamp=run.stamp))

    chosen = np.linspace(0, len(data.test) - 1, 18).astype(int)
    test = data.test.batch(chosen)
    outputs = run.reconstruct(test)[1]
    new_maps, new = run.sample(16)
    of_levels = run.draw(run.noise(9)[0], torch.from_numpy(data.test.levels[chosen[::2]]))[1]
    real, back, drawn, beside = (x[:, 0].numpy() for x in (test, outputs, new, of_levels))
    bank = evaluation.parts_of(metrics.thumbnails, data.train)
    distances, nearest = metrics.nearest(new, bank, k=1)
    neighbours = data.train.batch(nearest[:, 0])[:, 0].numpy()
    used, perplexity = run.code_map.used.cpu(), metrics.perplexity(run.counts)
    counts = run.counts[used].numpy()
    for stage in run.config.trained:
        save(f"curves_{stage}", figures.curves, rows, stage)
    files.save_figure(folder / "reconstructions.png", lambda: reconstructions(run, test[:8]))
    save("code_histogram", figures.code_histogram, counts, perplexity, run.config.codes)
    save("generated", figures.generated, run.ranks(new_maps), drawn, len(used))
    save("nearest_training", figures.nearest, drawn, neighbours, distances[:, 0].tolist())
    save("real_beside_generated", figures.real_beside_generated, real[::2], back[::2], beside)


def reconstructions(run, images: Tensor):
    """Figure of slices (n, 1, 256, 256), their index maps and reconstructions."""
    maps, outputs = run.reconstruct(images)
    similarity, used = metrics.ssim(images, outputs).tolist(), len(run.code_map.used)
    originals, outputs = images[:, 0].numpy(), outputs[:, 0].numpy()
    ranks = run.ranks(maps)
    return figures.reconstructions(originals, ranks, outputs, similarity, used, run.stamp)


# --- pictures -----------------------------------------------------------------------------


def pictures_of(run, data: Data) -> dict:
    """All pictures of the best run, as data: URIs in lists and dicts."""
    return {
        "curves": {stage: saved(run, f"curves_{stage}") for stage in run.config.trained},
        "reconstructions": saved(run, "reconstructions"),
        "histogram": saved(run, "code_histogram"),
        **samples(run, data),
        "sweep": film("level", *run.sweep(FRAMES["sweep"])) if run.conditional else [],
        "walk": film("step", *run.walk(FRAMES["walk"], level=0.5 if run.conditional else None)),
    }


def saved(run, name: str) -> str:
    """A figure in the run's folder as a data: URI; "" if drawing it failed."""
    path = run.folder / "figures" / f"{name}.png"
    return uri(path.read_bytes()) if path.exists() else ""


def uri(blob: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(blob).decode('ascii')}"


def picture(image: np.ndarray) -> str:
    """(H, W) float [0,1], or colours (H, W, 3) uint8 -> a data: URI."""
    return uri(figures.png(image))


def film(word: str, positions: Tensor, images: Tensor) -> list[dict]:
    """Frames of a slider: label and picture."""
    pairs = zip(positions.tolist(), images[:, 0].numpy(), strict=True)
    return [{"label": f"{word} {p:.2f}", "image": picture(image)} for p, image in pairs]


def samples(run, data: Data) -> dict:
    """Generated slices with their nearest training slices, and the usual distances."""
    maps, images = run.sample(SAMPLES)
    unseen = data.test.batch(evenly(len(data.test), UNSEEN))
    bank = evaluation.parts_of(metrics.thumbnails, data.train)  # one pass for both
    wanted = torch.cat([metrics.thumbnails(x) for x in (images, unseen)])
    distances, rows = metrics.nearest(wanted, bank, k=1)
    near = data.train.batch(rows[:SAMPLES, 0])[:, 0].numpy()
    columns = images[:, 0].numpy(), run.ranks(maps), near, distances[:SAMPLES, 0].tolist()
    used = len(run.code_map.used)
    shown = [
        {
            "image": picture(image),
            "map": picture(figures.coloured_map(ranks, used)),
            "nearest": picture(nearest),
            "distance": distance,
        }
        for image, ranks, nearest, distance in zip(*columns, strict=True)
    ]
    usual = np.percentile(distances[SAMPLES:], (5, 50, 95)).tolist()
    return {"samples": shown, "usual_distances": usual}
