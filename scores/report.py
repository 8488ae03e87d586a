"""What a finished run shows: the figures in its folder, and report.html of a results folder.

In: a loaded run (`predict.TrainedRun`, or None if every run failed) and the data. Out: PNGs;
the page as text, one file that opens from disk without a network. `report.html.jinja` says what
stands where; this file gives the values. File names come from users: the template escapes them.
"""

import base64
import shlex
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sklearn.decomposition import PCA
from torch import Tensor

from config import PRESETS, Config
from dataset import Data, evenly
from scores import evaluation, figures, metrics
from scores.evaluation import Scorer
from support import files
from support.cli import flags

SAMPLES = 24  # in the grid; each brings its nearest training slice with it
FRAMES = {"sweep": 32, "walk": 24}
ORIGINALS = 6
UNSEEN = 256  # test slices whose distances to training slices stand beside the samples'
CODES = 64
PATCH_PX = 12  # a code's cell of 4 pixels in the middle, and a cell on each side
PATCH_SLICES = 32  # test slices over which patches are averaged
SKIPPED = 100  # files listed; data_report.json has all
LABELS = evaluation.IMAGE_LABELS | evaluation.LABELS


def page(folder: Path, run, data: Data) -> str:
    """The page of a results folder as text. run: the best one, or None."""
    results = files.read_json(folder / "results.json")
    shown = {
        "name": folder.resolve().name,
        "stamp": data.stamp,
        "results": results,
        "runs": ranked(results["runs"]),
        "labels": LABELS,
        "data": data.report,
        "skipped_shown": SKIPPED,
        "patch_px": PATCH_PX,
        "run": None if run is None else {**scores_of(run), **pictures_of(run, data)},
    }
    if settings := settings_of(folder, results["runs"]):
        shown |= {"settings": settings_table(settings), "commands": commands(folder, settings)}
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    return template.render(shown)


# --- numbers and words --------------------------------------------------------------------


def ranked(rows: list[dict]) -> list[dict]:
    """Rows of results.json, the best first, those without a rank last."""
    return sorted(rows, key=lambda row: (row.get("rank") is None, row.get("rank")))


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


def settings_of(folder: Path, rows: list[dict]) -> Config | None:
    """The settings of the first seed that began in this folder."""
    for row in rows:
        path = folder / row["folder"] / "config.json"
        if path.exists():
            config = Config.from_dict(files.read_json(path)["config"])
            here = Path(Config.cache).resolve() == Path(config.cache)
            where = {"out": str(folder), "cache": Config.cache if here else config.cache}
            return replace(config, **where, **seeds_of(rows))
    return None


def seeds_of(rows: list[dict]) -> dict[str, int]:
    """--seed and --runs of a command that continues these rows of results.json."""
    seeds = sorted(row["seed"] for row in rows)
    if seeds[-1] - seeds[0] == len(seeds) - 1:
        return {"seed": seeds[0], "runs": len(seeds)}
    waiting = [row["seed"] for row in rows if row["status"] == "unfinished"]
    return {"seed": min(waiting, default=seeds[-1]), "runs": 1}


def settings_table(config: Config) -> list[dict]:
    """Every option: name, value, meaning, and whether it differs from the preset."""
    preset = replace(Config(preset=config.preset), **PRESETS[config.preset])
    rows = []
    for f in fields(Config):
        value, words = getattr(config, f.name), f.metadata["help"].replace("%%", "%")
        changed = f.metadata["identity"] and value != getattr(preset, f.name)
        rows.append({"name": f.name, "value": value, "help": words, "changed": changed})
    return rows


def commands(folder: Path, config: Config) -> list[tuple[str, str]]:
    """Commands to run next, in the folder of driver.py."""

    def line(*words) -> str:
        return shlex.join(["python", *map(str, words)])

    def driver(**changed) -> str:
        return line("driver.py", *flags(replace(config, **changed)))

    return [
        ("Resume", driver()),
        ("One more seed beside these", driver(runs=config.runs + 1)),
        ("More samples of the best run", line("predict.py", "generate", folder, "--n", 64)),
        ("Score it again", line("predict.py", "evaluate", folder)),
        ("Train again, in another folder", driver(out=f"{folder}-again")),
    ]


# --- figures of a run ---------------------------------------------------------------------


def save_figures(run, data: Data, scorer: Scorer, result: dict, rows: list[dict]):
    """Draw every figure of a finished run into its folder `figures`. rows: of log.csv."""
    folder, stamp = run.folder / "figures", run.stamp
    folder.mkdir(exist_ok=True)
    used = len(run.code_map.used)
    chosen = np.linspace(0, len(data.test) - 1, 18).astype(int)
    test = data.test.batch(chosen)
    maps, outputs = run.reconstruct(test)
    new_maps, new = run.sample(16)
    of_levels = run.draw(run.noise(9)[0], torch.from_numpy(data.test.levels[chosen[::2]]))[1]
    real, back, drawn, beside = (x[:, 0].numpy() for x in (test, outputs, new, of_levels))
    bank = evaluation.parts_of(metrics.thumbnails, data.train)
    distances, nearest = metrics.nearest(new, bank, k=1)
    neighbours = data.train.batch(nearest[:, 0])[:, 0].numpy()
    similarity = metrics.ssim(test[:8], outputs[:8]).tolist()
    counts = run.counts[run.code_map.used.cpu()].numpy()
    drawings = {
        f"curves_{stage}": partial(figures.curves, rows, stage, stamp) for stage in run.trained
    }
    drawings |= {
        "reconstructions": lambda: figures.reconstructions(
            real[:8], run.ranks(maps[:8]), back[:8], similarity, used, stamp
        ),
        "code_histogram": lambda: figures.code_histogram(
            counts, metrics.perplexity(run.counts), run.config.codes, stamp
        ),
        "generated": lambda: figures.generated(run.ranks(new_maps), drawn, used, stamp=stamp),
        "nearest_training": lambda: figures.nearest(
            drawn, neighbours, distances[:, 0].tolist(), stamp=stamp
        ),
        "real_beside_generated": lambda: figures.real_beside_generated(
            real[::2], back[::2], beside, stamp
        ),
        "overlap": lambda: overlap(scorer, result, stamp),
        "memorisation": lambda: memorisation(scorer, stamp),
    }
    for name, make in drawings.items():
        files.save_figure(folder / f"{name}.png", make)


def overlap(scorer: Scorer, result: dict, stamp: str):
    """Real, reconstructed and generated slices on two principal components of real ones."""
    plane = PCA(2, svd_solver="full").fit(scorer.sets["train"].spaces["texture"])
    names = {"real": "real", "reconstruction": "reconstructed", "generated": "generated"}
    points = {
        name: plane.transform(scorer.sets[kind].spaces["texture"])
        for kind, name in names.items()
    }
    notes = []
    for kind, name in names.items():
        measures = ("precision", "recall", "coverage")
        scores = (f"{m} {result['generation'][m][kind]:.2f}" for m in measures)
        notes.append(f"{name}: {', '.join(scores)}")
    return figures.overlap(points, notes, stamp)


def memorisation(scorer: Scorer, stamp: str):
    """Histograms of the distance to the nearest training slice."""
    unseen, drawn = (scorer.sets[name].near for name in ("test", "generated"))
    shown = {"unseen people": unseen, "generated": drawn}
    return figures.memorisation(shown, metrics.copy_distance(unseen), stamp)


# --- pictures -----------------------------------------------------------------------------


def pictures_of(run, data: Data) -> dict:
    """All pictures of the best run, as data: URIs in lists and dicts."""
    rows = files.Log(run.folder / "log.csv").rows()
    return {
        "curves": {
            stage: uri(figures.svg(figures.curves(rows, stage)), "svg+xml")
            for stage in run.trained
        },
        "reconstructions": reconstructions(run, data),
        **samples(run, data),
        "sweep": film("level", *run.sweep(FRAMES["sweep"])) if run.conditional else [],
        "walk": film("step", *run.walk(FRAMES["walk"], level=0.5 if run.conditional else None)),
        **codes(run, data),
    }


def uri(blob: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(blob).decode('ascii')}"


def picture(image: np.ndarray) -> str:
    """(H, W) float [0,1], or colours (H, W, 3) uint8 -> a data: URI."""
    return uri(figures.png(image))


def film(word: str, positions: Tensor, images: Tensor) -> list[dict]:
    """Frames of a slider: label and picture."""
    pairs = zip(positions.tolist(), images[:, 0].numpy(), strict=True)
    return [{"label": f"{word} {p:.2f}", "image": picture(image)} for p, image in pairs]


def reconstructions(run, data: Data) -> list[dict]:
    """Test slices, evenly spaced: original, index map, result, difference, SSIM."""
    images = data.test.batch(evenly(len(data.test), 3 * ORIGINALS)[1::3])
    maps, outputs = run.reconstruct(images)
    used, scores = len(run.code_map.used), metrics.ssim(images, outputs).tolist()
    columns = images[:, 0].numpy(), run.ranks(maps), outputs[:, 0].numpy(), scores
    return [
        {
            "original": picture(original),
            "map": picture(figures.coloured_map(ranks, used)),
            "result": picture(result),
            "difference": picture(figures.coloured_difference(original, result)),
            "ssim": score,
        }
        for original, ranks, result, score in zip(*columns, strict=True)
    ]


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


def codes(run, data: Data) -> dict:
    """The code histogram; the most used codes, with share and mean decoded patch."""
    used = run.code_map.used.cpu()
    histogram = figures.code_histogram(
        run.counts[used].numpy(), metrics.perplexity(run.counts), run.config.codes
    )
    images = data.test.batch(evenly(len(data.test), PATCH_SLICES))
    patches, seen = patches_of(*run.reconstruct(images), run.config.codes)
    most = run.counts.argsort(descending=True, stable=True)
    most = [code for code in most.tolist() if seen[code]][:CODES]
    shares = (run.counts / run.counts.sum()).tolist()
    return {
        "histogram": uri(figures.svg(histogram), "svg+xml"),
        "codes": [
            {"number": code, "share": shares[code], "image": picture(patches[code].numpy())}
            for code in most
        ],
    }


def patches_of(maps: Tensor, images: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Mean patch around each code's cells (K, 12, 12), and how many cells it has (K,).

    maps: (n, h, w), the index maps that were decoded to `images` (n, 1, 4h, 4w).
    """
    edge = (PATCH_PX - 4) // 2
    sums = torch.zeros(codes, PATCH_PX**2)
    for cells, image in zip(maps, images, strict=True):
        around = F.unfold(image, PATCH_PX, padding=edge, stride=4)  # (144, h*w)
        sums.index_add_(0, cells.flatten(), around.T)
    counts = torch.bincount(maps.flatten(), minlength=codes)
    return (sums / counts[:, None].clamp(min=1)).view(codes, PATCH_PX, PATCH_PX), counts
