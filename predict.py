"""From a finished run to images and scores: generate, reconstruct, evaluate.

In: a results folder (its best run) or the folder of one seed. Out: 8-bit grey PNGs of 256x256,
`metrics.json`, figures. In a notebook:
`run = load_run("runs/NAME"); maps, brains = run.sample(8)`.
"""

import argparse

from config import Config, Exit, Parser, UserError, add_options


def natural(text: str) -> int:
    """A whole number of 0 or more, for argparse."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 0 to {2**31 - 1}")
    return int(text)


def parse():
    parser = Parser("Draw new brains, reconstruct given ones, or score a finished run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate", help="draw new slices", description="Draw new slices."
    )
    generate.add_argument("--n", type=natural, default=16, help="how many slices [16]")
    generate.add_argument(
        "--seed", type=natural, default=0, help="sample s of seed S is always the same [0]"
    )
    generate.add_argument(
        "--out", default="", help="folder for PNGs [generated/, in the run's]"
    )
    reconstruct = commands.add_parser(
        "reconstruct", help="encode and decode given slices",
        description="Encode and decode slices of a file or folder.",
    )  # fmt: skip
    reconstruct.add_argument(
        "--data", required=True, help="file or folder of slices or volumes"
    )
    reconstruct.add_argument(
        "--out", default="", help="folder for PNGs [reconstructed/, in the run's]"
    )
    add_options(reconstruct, ("slices", "axis"))
    evaluate = commands.add_parser(
        "evaluate", help="score a run on its test split",
        description="Score a run; writes metrics.json and figures into its folder.",
    )  # fmt: skip
    add_options(evaluate, ("data", "cache", "samples"), data="as trained", cache="as trained")
    for command in (generate, reconstruct, evaluate):
        command.add_argument(
            "run", metavar="RUN", help="results folder, or the folder of one seed"
        )
        add_options(command, ("device",))
    return parser.parse_args()


if __name__ == "__main__":  # a mistyped flag must not wait for torch
    ARGUMENTS = parse()

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

import figures
import metrics
import modules
import runtime
from dataset import BrainSlices, Data, open_data, read_slices

# --- a finished run -----------------------------------------------------------------------


@dataclass
class TrainedRun:
    """A run's networks, ready to draw."""

    folder: Path
    config: Config
    seed: int
    fingerprint: str  # of its data
    stamp: str
    device: torch.device
    vqvae: modules.VQVAE
    generator: modules.Generator
    code_map: modules.CodeMap
    levels: Tensor  # (1024,) slice levels distributed as in the training split, or (0,)
    counts: Tensor  # (K,) how often the training split uses each code

    def sample(self, n: int, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
        """n new index maps (n, 64, 64) int64 and slices (n, 1, 256, 256) float32 [0,1].

        They are number first .. first + n - 1 of `seed`; each depends on (seed, number) alone.
        """
        numbers = range(first, first + n)
        noise, level = modules.noise_of(numbers, self.config.noise_dim, seed, self.levels)
        stretch = self.config.gan_loss == "bce"
        return modules.draw(self.generator, self.code_map, self.vqvae, noise, level, stretch)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (n, 1, 256, 256) [0,1] -> index maps (n, 64, 64), slices of equal shape."""
        maps = [self.vqvae.encode(part.to(self.device)) for part in images.split(32)]
        return torch.cat(maps).cpu(), torch.cat(
            [self.vqvae.decode(part).cpu() for part in maps]
        )

    def ranks(self, maps: Tensor) -> np.ndarray:
        """Index maps as ranks 0..U-1, for pictures: similar numbers are similar codes."""
        return self.code_map.rank.cpu()[maps].clamp(min=0).numpy()


def load_run(path: str | Path, device: str = "auto") -> TrainedRun:
    """Load a results folder's best run, or a seed's folder.

    Raises UserError (exit 4) if a file that it needs is missing, damaged or of another run.
    """
    folder, where = seed_folder(Path(path)), runtime.choose_device(device)
    saved = runtime.read_json(folder / "config.json")
    try:
        config, seed = Config.from_dict(saved["config"]), saved["config"]["seed"]
        mine = {"config": config.identity(), "seed": seed, "data": saved["data"]}
        stamp = saved["stamp"]
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(Exit.CHECKPOINT, f"{folder / 'config.json'}: {problem}") from None
    paths = {name: folder / f"{name}.pt" for name in ("vqvae_best", "codes", "dcgan_best")}
    values = {
        name: runtime.load_checkpoint(path, stage=name.removesuffix("_best"), **mine)
        for name, path in paths.items()
    }
    for name, link, target in (
        ("codes", "vqvae", "vqvae_best"),
        ("dcgan_best", "codes", "codes"),
    ):
        if values[name].get(link) != runtime.checksum(paths[target]):
            raise UserError(
                Exit.CHECKPOINT, f"{paths[name]} was made with another {paths[target].name}"
            )
    parts = {
        "vqvae": (modules.make_vqvae(config), values["vqvae_best"].get("model")),
        "generator": (modules.make_generator(config), values["dcgan_best"].get("generator")),
    }
    for name, path in (("vqvae", "vqvae_best"), ("generator", "dcgan_best")):
        module = runtime.load_weights(*parts[name], paths[path])
        parts[name] = module.to(where).eval().requires_grad_(False)
    codes = values["codes"]
    code_map = modules.CodeMap(codes["used"], codes["points"], config.codes).to(where)
    return TrainedRun(
        folder, config, seed, saved["data"], stamp, where, **parts, code_map=code_map,
        levels=codes["levels"], counts=codes["counts"]["train"],
    )  # fmt: skip


def seed_folder(path: Path) -> Path:
    """The folder of one seed: `path` itself, its best run, or its only one."""
    if list(path.glob("*_best.pt")):
        return path
    if (path / "results.json").exists():
        best = runtime.read_json(path / "results.json").get("best")
        if isinstance(best, str) and best == Path(best).name:
            return path / best
    seeds = sorted(path.glob("seed-*"))
    if len(seeds) == 1:
        return seeds[0]
    reason = "no finished run in it" if not seeds else "name one of its seed-* folders"
    raise UserError(Exit.CHECKPOINT, f"{path}: {reason}")


# --- scores -------------------------------------------------------------------------------


def evaluate(run: TrainedRun, data: Data) -> dict:
    """Every score of a run, as plain values; see README, "How quality is measured"."""
    if data.fingerprint != run.fingerprint:
        raise UserError(
            Exit.CHECKPOINT, f"{run.folder} was trained on other data; give its --data"
        )
    test = data.test.batch(np.arange(len(data.test)))
    maps, outputs = run.reconstruct(test)
    result = {
        "seed": run.seed,
        "stamp": run.stamp,
        "reconstruction": score_reconstruction(test, outputs),
        "codebook": score_codebook(run, maps),
    }
    result["generation"] = score_generation(run, data, test)
    result["peak_memory_mb"] = round(runtime.peak_memory_mb())
    return result


def score_reconstruction(originals: Tensor, outputs: Tensor) -> dict:
    """SSIM, MS-SSIM and PSNR of every test slice: mean and sd, full frame and in the brain."""
    measures = {
        "ssim": metrics.ssim, "ssim_in_brain": metrics.ssim_in_brain,
        "ms_ssim": metrics.ms_ssim,
        "psnr_db": metrics.psnr, "psnr_in_brain_db": metrics.psnr_in_brain,
    }  # fmt: skip
    values = {name: measure(originals, outputs) for name, measure in measures.items()}
    result = {
        name: {"mean": value.mean().item(), "sd": value.std(correction=0).item()}
        for name, value in values.items()
    }
    above = (values["ssim"] > 0.6).float().mean().item()
    return {"n": len(originals), **result, "share_above_0.6": above}


def score_codebook(run: TrainedRun, test_maps: Tensor) -> dict:
    """Use of the codebook over the whole training split, and the size of an index map."""
    total = modules.perplexity(run.counts)
    fixed, entropy = metrics.bits_per_pixel(run.counts.numpy(), run.config.codes)
    return {
        "codes": run.config.codes,
        "used": int((run.counts > 0).sum()),
        "perplexity": total,
        "perplexity_share": total / run.config.codes,
        "used_on_test": len(test_maps.unique()),
        "bits_per_pixel": fixed,
        "bits_per_pixel_entropy": entropy,
    }


@dataclass
class Sets:
    """What is compared: n slices of each kind, and their random-convolution features."""

    images: dict[str, Tensor]
    features: dict[str, np.ndarray]
    fine: dict[str, np.ndarray]
    floor: float
    fine_floor: float
    n: int
    subjects: np.ndarray  # of "train"
    subjects_again: np.ndarray  # of "train_again" and its reconstructions


def in_parts(measure, split: BrainSlices, indices: np.ndarray) -> Tensor:
    """`measure` of many slices of a split, which need not fit into memory together."""
    parts = np.array_split(indices, max(1, len(indices) // 256))
    return torch.cat([measure(split.batch(part)) for part in parts])


def make_sets(run: TrainedRun, data: Data, test: Tensor) -> Sets:
    """Training slices twice (disjoint draws), reconstructions of the second, unseen people, and
    generated slices."""
    n = min(run.config.samples, len(data.test), len(data.validation), len(data.train) // 2)
    order = np.random.default_rng(0).permutation(len(data.train))
    other = np.random.default_rng(1)
    images = {
        "train": data.train.batch(order[:n]),
        "train_again": data.train.batch(order[n : 2 * n]),
        "validation": data.validation.batch(other.permutation(len(data.validation))[:n]),
        "test": test[other.permutation(len(test))[:n]],
        "generated": run.sample(n)[1],
    }
    subjects = data.train.subjects[order[: 2 * n]]
    images["reconstruction"] = run.reconstruct(images["train_again"])[1]
    network = metrics.RandomFeatures()
    pool = order[: 4 * n]
    floor, _ = metrics.relative_floor(in_parts(network.features, data.train, pool), n)
    fine_floor, _ = metrics.relative_floor(in_parts(network.fine_features, data.train, pool), n)
    features = {name: network.features(x) for name, x in images.items()}
    features["all train"] = in_parts(network.features, data.train, np.arange(len(data.train)))
    fine = {name: network.fine_features(x) for name, x in images.items()}
    return Sets(images, features, fine, floor, fine_floor, n, subjects[:n], subjects[n:])


def score_generation(run: TrainedRun, data: Data, test: Tensor) -> dict:
    """Each measure for generated slices, for reconstructions, and for real slices."""
    sets = make_sets(run, data, test)
    kinds = {
        "generated": "generated",
        "reconstruction": "reconstruction",
        "real": "train_again",
    }

    def row(measure, **more) -> dict[str, float]:
        return {kind: measure(name) for kind, name in kinds.items()} | more

    def fd(a, b):
        return metrics.frechet_distance(sets.features[a], sets.features[b]) / sets.floor

    def fine(a, b):
        return metrics.frechet_distance(sets.fine[a], sets.fine[b]) / sets.fine_floor

    overlap = {
        kind: metrics.prdc(sets.features["train"], sets.features[name])
        for kind, name in kinds.items()
    }
    images = sets.images
    result = {
        "n": sets.n,
        "fd_train": row(lambda name: fd(name, "train"), unseen_people=fd("test", "train")),
        "fd_validation": row(lambda name: fd(name, "validation")),
        "fd_test": row(lambda name: fd(name, "test")),
        "fine_fd_train": row(
            lambda name: fine(name, "train"), unseen_people=fine("test", "train")
        ),
        "fine_fd_reconstruction": {"generated": fine("generated", "reconstruction")},
    }
    for measure in ("precision", "recall", "density", "coverage"):
        result[measure] = {kind: values[measure] for kind, values in overlap.items()}
    result["kid_train"] = row(
        lambda name: metrics.kid(sets.features[name], sets.features["train"])
    )
    result["c2st_auc"] = score_c2st(sets)
    result["spectrum_db"] = score_spectrum(images)
    result["memorised_share"] = score_memorisation(sets)
    result["ms_ssim_of_pairs"] = row(lambda name: metrics.ms_ssim_of_pairs(images[name]))
    result["ssim_to_nearest_test_slice"] = {
        "generated": metrics.ssim_to_nearest(images["generated"], test),
        "real": metrics.ssim_to_nearest(images["validation"], test),
    }
    result["as_the_seed_counts_it"] = metrics.seed_score(images["generated"][:1], test)
    return result


def score_c2st(sets: Sets) -> dict[str, float]:
    """Held-out AUC of telling training slices from others, folds by subject."""
    f, again = sets.features, sets.subjects_again
    return {
        "generated": metrics.c2st_auc(f["train"], f["generated"], sets.subjects),
        "reconstruction": metrics.c2st_auc(
            f["train"], f["reconstruction"], sets.subjects, again
        ),
        "real": metrics.c2st_auc(f["train"], f["train_again"], sets.subjects, again),
    }


def score_spectrum(images: dict[str, Tensor]) -> dict[str, float]:
    """Mean difference of radial power spectra to training slices in dB, up to their noise."""
    spectra = {name: metrics.radial_spectrum(x) for name, x in images.items()}
    end = max(9, metrics.noise_floor(spectra["train"]))
    kinds = {
        "generated": "generated",
        "reconstruction": "reconstruction",
        "real": "train_again",
    }
    return {
        kind: metrics.spectrum_difference(spectra["train"], spectra[name], end)
        for kind, name in kinds.items()
    }


def score_memorisation(sets: Sets) -> dict[str, float]:
    """Share of slices nearer to a training slice than 95 % of unseen people's slices are.

    "planted_copies" are training slices: a control, which must be near 1.
    """
    kinds = {"generated": "generated", "planted_copies": "train_again"}
    f = sets.features
    return {
        kind: metrics.memorisation(f[name], f["test"], f["all train"])[
            "share_below_5th_percentile"
        ]
        for kind, name in kinds.items()
    }


LABELS = {
    "fd_train": "relative FD to training slices",
    "fd_validation": "relative FD to validation slices",
    "fd_test": "relative FD to test slices",
    "fine_fd_train": "fine-scale relative FD to training slices",
    "fine_fd_reconstruction": "fine-scale relative FD to reconstructions",
    "precision": "precision, k = 5",
    "recall": "recall, k = 5",
    "density": "density, k = 5",
    "coverage": "coverage, k = 5",
    "kid_train": "KID to training slices",
    "c2st_auc": "classifier's AUC, real against this",
    "spectrum_db": "power spectrum, mean difference in dB",
    "memorised_share": "memorised share (0.05 is chance)",
    "ms_ssim_of_pairs": "MS-SSIM of 1,000 random pairs",
    "ssim_to_nearest_test_slice": "SSIM to nearest test slice",
}


def table(result: dict) -> str:
    """The scores as text, each beside its references."""
    r, c, g = result["reconstruction"], result["codebook"], result["generation"]
    lines = [f"reconstruction, {r['n']} test slices, mean (sd):"]
    for name in ("ssim", "ssim_in_brain", "ms_ssim", "psnr_db", "psnr_in_brain_db"):
        lines.append(f"  {name:<26} {r[name]['mean']:8.4f} ({r[name]['sd']:.4f})")
    lines += [
        f"codebook: {c['used']} of {c['codes']} used, perplexity {c['perplexity']:.1f}, "
        f"{c['bits_per_pixel']:.3f} bits per pixel",
        f"generation, {g['n']} slices of each kind:",
        f"  {'':<42}{'generated':>12}{'reconstr.':>12}{'real':>10}{'unseen people':>15}",
    ]
    for name, label in LABELS.items():
        kinds = ("generated", "reconstruction", "real", "unseen_people")
        cells = [f"{g[name][k]:.3f}" if k in g[name] else "" for k in kinds]
        lines.append(f"  {label:<42}{cells[0]:>12}{cells[1]:>12}{cells[2]:>10}{cells[3]:>15}")
    s = g["as_the_seed_counts_it"]
    lines.append(
        f"  one sample against every test slice, as the original project counts it: mean SSIM "
        f"{s['mean']:.3f}, {100 * s['share_above']:.0f} % above 0.6"
    )
    return "\n".join(lines)


# --- figures ------------------------------------------------------------------------------


def save_figures(run: TrainedRun, data: Data, rows: list[dict]):
    """Every figure of a finished run into its folder `figures`."""
    folder, stamp = run.folder / "figures", run.stamp
    folder.mkdir(exist_ok=True)
    used = len(run.code_map.used)
    test = data.test.batch(np.linspace(0, len(data.test) - 1, 18).astype(int))
    maps, outputs = run.reconstruct(test)
    new_maps, new = run.sample(18)
    real, back, drawn = (x[:, 0].numpy() for x in (test, outputs, new))
    bank = in_parts(metrics.thumbnails, data.train, np.arange(len(data.train)))
    distances, nearest = metrics.nearest(new[:16], bank, k=1)
    neighbours = data.train.batch(nearest[:, 0])[:, 0].numpy()
    similarity = metrics.ssim(test[:8], outputs[:8]).tolist()
    counts = run.counts[run.code_map.used.cpu()].numpy()
    perplexity = modules.perplexity(run.counts)
    drawings = {
        "curves_vqvae": lambda: figures.curves(rows, "vqvae", stamp),
        "curves_dcgan": lambda: figures.curves(rows, "dcgan", stamp),
        "reconstructions": lambda: figures.reconstructions(
            real[:8], run.ranks(maps[:8]), back[:8], similarity, used, stamp
        ),
        "code_histogram": lambda: figures.code_histogram(
            counts, perplexity, run.config.codes, stamp
        ),
        "generated": lambda: figures.generated(
            run.ranks(new_maps[:16]), drawn[:16], used, stamp=stamp
        ),
        "nearest_training": lambda: figures.nearest(
            drawn[:16], neighbours, distances[:, 0].tolist(), stamp=stamp
        ),
        "real_beside_generated": lambda: figures.real_beside_generated(
            real[::2], back[::2], drawn[:9], stamp
        ),
    }
    for name, make in drawings.items():
        runtime.save_figure(folder / f"{name}.png", make)


# --- commands -----------------------------------------------------------------------------


def write_png(path: Path, image: np.ndarray):
    """image (H, W) float [0,1] or uint8 -> 8-bit grey PNG."""
    pixels = image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def write_slices(folder: Path, parts: Iterator[Tensor]):
    """Slices (n, 1, 256, 256), part by part -> 00000.png ... and grid.png of the first 64."""
    folder.mkdir(parents=True, exist_ok=True)
    count, shown = 0, []
    for images in parts:
        shown += list(images[: max(0, 64 - count), 0].numpy())
        for image in images[:, 0].numpy():
            write_png(folder / f"{count:05d}.png", image)
            count += 1
    write_png(folder / "grid.png", figures.grid(np.stack(shown), min(8, count)))
    runtime.say(f"{count} slices and grid.png in {folder}")


def generate_command(run: TrainedRun, arguments):
    if arguments.n == 0:
        raise UserError(Exit.USAGE, "--n 0: at least 1 slice")
    starts = range(0, arguments.n, 256)
    sizes = (min(256, arguments.n - start) for start in starts)
    parts = (run.sample(n, arguments.seed, i)[1] for i, n in zip(starts, sizes, strict=True))
    write_slices(Path(arguments.out or run.folder / "generated"), parts)


def reconstruct_command(run: TrainedRun, arguments):
    given = {k: getattr(arguments, k) for k in ("slices", "axis") if k in arguments}
    slices = read_slices(arguments.data, replace(run.config, **given))
    images = torch.from_numpy(slices)[:, None].float() / 255
    maps, outputs = run.reconstruct(images)
    folder = Path(arguments.out or run.folder / "reconstructed")
    write_slices(folder, iter([outputs]))
    similarity = metrics.ssim(images, outputs)
    runtime.say(f"SSIM {similarity.mean():.4f} (sd {similarity.std(correction=0):.4f})")
    some = slice(0, 8)
    originals, back = images[some, 0].numpy(), outputs[some, 0].numpy()
    ranks, values = run.ranks(maps[some]), similarity[some].tolist()
    used = len(run.code_map.used)
    runtime.save_figure(
        folder / "comparison.png",
        lambda: figures.reconstructions(originals, ranks, back, values, used, run.stamp),
    )


def evaluate_command(run: TrainedRun, arguments):
    given = {k: getattr(arguments, k) for k in ("data", "cache", "samples") if k in arguments}
    run.config = replace(run.config, **given)
    last = runtime.load_checkpoint(run.folder / "dcgan_last.pt", stage="dcgan")
    if last["nimg"] < run.config.gan_kimg * 1000:
        raise UserError(
            Exit.CHECKPOINT, f"{run.folder} is not trained to its end; run driver.py again"
        )
    with runtime.writing_alone(run.folder.parent):
        evaluate_and_save(run, open_data(run.config))


def evaluate_and_save(run: TrainedRun, data: Data) -> dict:
    """Scores and figures of a finished run into its folder; prints the table.

    metrics.json comes last, since it marks the run as finished. It holds the run's own number
    of samples: FD at another N is another unit, and goes to metrics-N.json.
    """
    own = runtime.read_json(run.folder / "config.json")["config"]["samples"]
    name = "metrics.json" if run.config.samples == own else f"metrics-{run.config.samples}.json"
    result = evaluate(run, data)
    runtime.say(table(result))
    save_figures(run, data, runtime.Log(run.folder / "log.csv").rows())
    runtime.write_json(run.folder / name, result)
    return result


COMMANDS = {
    "generate": generate_command,
    "reconstruct": reconstruct_command,
    "evaluate": evaluate_command,
}


def main(arguments):
    run = load_run(arguments.run, getattr(arguments, "device", "auto"))
    COMMANDS[arguments.command](run, arguments)


if __name__ == "__main__":
    runtime.run_script(lambda: main(ARGUMENTS))
