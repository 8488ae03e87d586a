"""A finished run, loaded: draw new slices, reconstruct given ones, score, export.

In: a results folder (its best run), the folder of one seed, or an export. Out: 8-bit grey PNGs
of 256x256, a volume, `metrics.json` and figures, an export. In a notebook:
`run = load_run("runs/NAME"); maps, brains = run.sample(8)`. `score` needs no run: it compares
any two folders of slices.
"""

import argparse

from config import Config, Exit, UserError
from support.cli import Parser, add_options, config_from


def whole(text: str) -> int:
    """A whole number of 0 or more, for argparse."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 0 to {2**31 - 1}")
    return int(text)


def level(text: str) -> float | str:
    """A slice level, or "sweep", for argparse."""
    if text == "sweep":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 0 to 1, and sweep")
    return value


def parse():
    parser = Parser("Draw new brains, reconstruct given ones, score or export a finished run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str):
        added = commands.add_parser(name, help=help, description=f"{help.capitalize()}.")
        added.add_argument("run", metavar="RUN", help="results folder, seed-* folder or export")
        add_options(added, ("device",))
        return added

    generate = command("generate", "draw new slices")
    walk = command("interpolate", "draw the way from one new subject to another")
    reconstruct = command("reconstruct", "encode and decode given slices")
    evaluate = command("evaluate", "score a run; writes metrics.json, figures and report.html")
    export = command("export", "write a folder to share: safetensors and a model card")
    about = "score the slices in any folder beside real ones, without a run"
    score = commands.add_parser("score", help=about, description=f"{about.capitalize()}.")
    for drawing, folder in ((generate, "generated"), (walk, "interpolated")):
        drawing.add_argument("--n", type=whole, default=16, help="number of slices [16]")
        drawing.add_argument(
            "--seed", type=whole, default=0, help="sample s of seed S is always the same [0]"
        )
        place = f"[{folder}/ in the run's folder; for an export, in runs/]"
        drawing.add_argument("--out", default="", help=place)
    generate.add_argument(
        "--level", type=level, metavar="LEVEL",
        help="slice level, 0 lowest to 1 highest; sweep: --n levels of one subject "
        "[distributed as in the training split]",
    )  # fmt: skip
    generate.add_argument(
        "--volume", action="store_true", help="stack --level sweep into volume.nii.gz"
    )
    reconstruct.add_argument("--data", required=True, help="file or folder to encode")
    reconstruct.add_argument("--out", default="", help="[reconstructed/ in the run's folder]")
    add_options(reconstruct, ("slices", "axis"))
    add_options(evaluate, ("data", "cache"), data="as trained", cache="as trained")
    export.add_argument("--out", required=True, help="a new folder, or an earlier export's")
    score.add_argument("real", metavar="REAL_DIR", help="real slices or volumes")
    score.add_argument("fake", metavar="FAKE_DIR", help="generated slices")
    score.add_argument(
        "--against", metavar="UNSEEN_DIR", help="real slices of other people, whom the "
        "generator has not seen: for the trained judge and for memorised samples",
    )  # fmt: skip
    score.add_argument("--out", default="", help="JSON file [scores.json in FAKE_DIR]")
    shared = "cache", "slices", "axis", "subject_pattern", "allow_slice_split", "samples"
    add_options(score, shared)
    return parser.parse_args()


if __name__ == "__main__":  # a mistyped flag must not wait for the import of torch
    ARGUMENTS = parse()

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import modules
from dataset import Data, evenly, open_data, open_slices, read_slices, unit_range
from scores import export, figures, metrics, report, results
from scores.evaluation import evaluate, generation_table, score_folders, table
from stages.decoder import make_sharper_vqvae
from stages.denoiser import Denoiser, make_denoiser
from support import checkpoints, device, endings, files, messages, runs

# --- a finished run -----------------------------------------------------------------------


@dataclass(repr=False)  # a notebook would print every weight
class TrainedRun:
    """The networks of a finished run, ready to draw."""

    folder: Path
    config: Config
    seed: int
    fingerprint: str  # of its data
    stamp: str
    device: torch.device
    vqvae: modules.VQVAE
    generator: modules.Generator
    denoiser: Denoiser | None
    code_map: modules.CodeMap
    levels: Tensor  # (1024,) slice levels distributed as in the training split, or (0,)
    counts: Tensor  # (K,) uses of each code in the training split

    def sample(
        self, n: int, seed: int = 0, first: int = 0, level: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """n new index maps (n, 64, 64) int64 and slices (n, 1, 256, 256) float32 [0,1].

        They have the numbers first .. first + n - 1 of `seed`; each depends on (seed, number)
        only. level: 0 lowest to 1 highest slice; None: distributed as in the training split.
        Raises ValueError for a level if the run is not `conditional`.
        """
        noise, levels = self.noise(n, seed, first)
        if level is not None:
            self.require_levels()
            levels = torch.full((n,), level)
        return self.draw(noise, levels)

    def noise(self, n: int, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
        """Noise (n, Z) and levels (n,) of samples first .. first + n - 1 of `seed`."""
        numbers = range(first, first + n)
        return modules.noise_of(numbers, self.config.noise_dim, seed, self.levels)

    def draw(self, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (n, Z), levels (n,) in [0,1] or NaN -> index maps and slices, as `sample`."""
        restore = None
        if self.denoiser is not None:
            autocast = partial(device.autocast, self.device, self.config.precision)
            restore = self.denoiser.restorer(self.code_map, autocast)
        maps = modules.draw_maps(self.generator, self.code_map, noise, level, restore)
        return maps, modules.in_full_batches(self.vqvae.decode, maps)

    def sweep(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Sample 0 of `seed` from the lowest slice to the highest: levels (n,), slices."""
        self.require_levels()
        levels = torch.linspace(0, 1, n)
        noise = self.noise(1, seed)[0].expand(n, -1)
        return levels, self.draw(noise, levels)[1]

    def walk(self, n: int, seed: int = 0, level: float | None = None) -> tuple[Tensor, Tensor]:
        """From sample 0 of `seed` to sample 1: steps (n,) from 0 to 1, slices as `sample`.

        The noise moves along the great circle, which keeps its length as in training.
        level: of all slices; None is that of sample 0.
        """
        if level is not None:
            self.require_levels()
        (a, b), levels = self.noise(2, seed)
        height = levels[0] if level is None else torch.tensor(level)
        # Slerp (Shoemake 1985). The clamp keeps it finite if a and b are parallel.
        angle = torch.arccos(torch.cosine_similarity(a, b, dim=0).clamp(-0.999, 0.999))
        steps = torch.linspace(0, 1, n)
        t = steps[:, None]
        noise = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        return steps, self.draw(noise, height.expand(n))[1]

    @property
    def conditional(self) -> bool:
        """Whether samples can be drawn at a given slice level."""
        return self.generator.conditional and len(self.levels) > 0

    def require_levels(self):
        if not self.conditional:
            raise ValueError("this run is not conditioned on slice level")

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (n, 1, 256, 256) [0,1] -> index maps (n, 64, 64), slices of equal shape."""
        maps = self.vqvae.encode(images)
        return maps, self.vqvae.decode(maps)

    def ranks(self, maps: Tensor) -> np.ndarray:
        """Index maps as ranks 0..U-1, for pictures: similar ranks are similar codes."""
        return self.code_map.rank.cpu()[maps].clamp(min=0).numpy()


# --- loading ------------------------------------------------------------------------------

# A checkpoint holds the checksums of the files it was made with.
LINKS = (
    ("codes", "vqvae_best"), ("decoder_best", "codes"), ("dcgan_best", "codes"),
    ("denoiser_best", "codes"),
)  # fmt: skip


def best_of(config: Config) -> dict[str, str]:
    """Part of a run -> its checkpoint."""
    best = {
        "vqvae": "decoder_best" if config.decoder_kimg else "vqvae_best", "codes": "codes",
        "generator": "dcgan_best",
    }  # fmt: skip
    return best | ({"denoiser": "denoiser_best"} if config.denoiser_kimg else {})


def load_run(path: str | Path, on: str = "auto") -> TrainedRun:
    """Load a results folder's best run, a seed's folder, or an export, on the device `on`.

    Raises UserError (exit 4) if a file that it needs is missing, damaged or of another run.
    """
    folder, place = seed_folder(Path(path)), device.choose_device(on)
    saved = files.read_json(folder / "config.json")
    try:
        config = Config.from_dict(saved["config"])
        seed = saved["config"]["seed"]
        mine = {"config": config.identity(), "seed": seed, "data": saved["data"]}
        stamp = saved["stamp"]
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(Exit.CHECKPOINT, f"{folder / 'config.json'}: {problem}") from None
    if is_export(folder):
        parts = export.load(folder)
        names = dict.fromkeys(parts, export.WEIGHTS)
    else:
        parts = load_checkpoints(folder, config, mine)
        names = {name: f"{file}.pt" for name, file in best_of(config).items()}
    codes = parts["codes"]
    with checkpoints.reading(folder / names["codes"]):
        code_map = modules.CodeMap.from_saved(codes, config).to(place)
    networks = {
        "vqvae": make_sharper_vqvae(config),
        "generator": modules.make_generator(config, code_map.crop.size),
        "denoiser": make_denoiser(config) if config.denoiser_kimg else None,
    }
    for name, network in networks.items():
        if network is not None:
            checkpoints.load_weights(network, parts[name], folder / names[name])
            network.to(place).eval().requires_grad_(False)
    return TrainedRun(
        folder, config, seed, saved["data"], stamp, place, **networks, code_map=code_map,
        levels=codes["levels"], counts=codes["counts"]["train"],
    )  # fmt: skip


def load_checkpoints(folder: Path, config: Config, mine: dict) -> dict[str, dict]:
    """The best weights of a seed's folder, as `export.load`. Raises UserError (exit 4)."""
    best = best_of(config)
    paths = {name: folder / f"{name}.pt" for name in ("vqvae_best", *best.values())}
    values = {
        name: checkpoints.load_checkpoint(path, stage=name.removesuffix("_best"), **mine)
        for name, path in paths.items()
    }
    for name, target in LINKS:
        if name not in values:
            continue
        with checkpoints.reading(paths[name]):
            link = values[name][target.removesuffix("_best")]
            if link != checkpoints.checksum(paths[target]):
                raise ValueError(f"made with another {paths[target].name}")
    return {
        "vqvae": values[best["vqvae"]].get("model"),
        "generator": values["dcgan_best"].get("generator"),
        "denoiser": values.get("denoiser_best", {}).get("denoiser"), "codes": values["codes"],
    }  # fmt: skip


def seed_folder(path: Path) -> Path:
    """The folder of one seed: `path` itself, its best run, or its only one."""
    if list(path.glob("*_best.pt")) or is_export(path):
        return path
    if (path / "results.json").exists():
        best = files.read_json(path / "results.json").get("best")
        if isinstance(best, str) and best == Path(best).name:
            return path / best
    seeds = sorted(path.glob("seed-*"))
    if len(seeds) == 1:
        return seeds[0]
    raise UserError(Exit.CHECKPOINT, f"RUN {path}: {no_run_in(path, seeds)}")


def is_export(folder: Path) -> bool:
    return (folder / export.WEIGHTS).exists()


def no_run_in(path: Path, seeds: list[Path]) -> str:
    """Why `path` names no run, and what would."""
    if not path.exists():
        return "does not exist; give a results folder of driver.py, such as runs/quick"
    if not path.is_dir():
        return "is a file; give the results folder that holds it"
    if seeds:
        return "no run is chosen yet; run driver.py again, or name a seed-* folder"
    inside = sorted(child.parent.name for child in path.glob("*/results.json"))
    if inside:
        return f"holds several results folders; give one of them: {', '.join(inside[:5])}"
    return "holds no run; give a results folder of driver.py, such as runs/quick"


# --- commands -----------------------------------------------------------------------------

FEW = 100  # slices: with fewer, `score` says that its numbers are chance


def write_slices(folder: Path, parts: Iterable[Tensor]):
    """Slices (n, 1, 256, 256), part by part -> 00000.png ..., and grid.png of the first 64."""
    folder.mkdir(parents=True, exist_ok=True)
    count, shown = 0, []
    for images in parts:
        shown += list(images[: max(0, 64 - count), 0].numpy())
        for image in images[:, 0].numpy():
            (folder / f"{count:05d}.png").write_bytes(figures.png(image))
            count += 1
    grid = figures.grid(np.stack(shown), min(8, count))
    (folder / "grid.png").write_bytes(figures.png(grid))
    messages.say(f"{count} slices and grid.png in {folder}")
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    if older := sum(number >= count for number in numbers):
        messages.warn(f"{folder} also holds {older} slices of an earlier command; delete them")


def write_strip(folder: Path, images: Tensor, labels: list[str], stamp: str):
    """strip.png of at most 16 slices; walk.gif of all of them, forth and back."""
    some = evenly(len(images), 16)
    row, chosen = images[some, 0].numpy(), [labels[i] for i in some]
    files.save_figure(folder / "strip.png", lambda: figures.strip(row, chosen, stamp))
    frames = [Image.fromarray(figures.as_bytes(image)) for image in images[:, 0].numpy()]
    first, *others = frames + frames[-2:0:-1]
    first.save(folder / "walk.gif", save_all=True, append_images=others, duration=80, loop=0)
    messages.say(f"strip.png and walk.gif in {folder}")


def place_for(arguments, run: TrainedRun, name: str) -> Path:
    """--out, or a new folder: in the run's, or in runs/ for an export, which stays as it is."""
    if arguments.out:
        return Path(arguments.out)
    if is_export(run.folder):
        return runs.new_folder(Path("runs"), f"{run.folder.resolve().name}-{name}")
    return runs.new_folder(run.folder, name)


def generate_command(run: TrainedRun, arguments):
    check_n(arguments.n, 1)
    if arguments.level is not None and not run.conditional:
        raise UserError(
            Exit.USAGE, "--level: this run is not conditioned on slice level; leave --level out"
        )
    if arguments.volume:
        if arguments.level != "sweep":
            raise UserError(Exit.USAGE, "--volume stacks a --level sweep: give both")
        check_n(arguments.n, 2)
    folder, n = place_for(arguments, run, "generated"), arguments.n
    if arguments.level != "sweep":
        parts = (
            run.sample(min(256, n - start), arguments.seed, start, arguments.level)[1]
            for start in range(0, n, 256)
        )
        write_slices(folder, parts)
        return
    levels, images = run.sweep(n, arguments.seed)
    write_slices(folder, [images])
    write_strip(folder, images, [f"level {v:.2f}" for v in levels.tolist()], run.stamp)
    if arguments.volume:
        path = folder / "volume.nii.gz"
        export.write_volume(path, images, run.stamp or "generated; shows nobody")
        messages.say(f"volume: {path}")


def interpolate_command(run: TrainedRun, arguments):
    check_n(arguments.n, 2)
    folder = place_for(arguments, run, "interpolated")
    steps, images = run.walk(arguments.n, arguments.seed)
    write_slices(folder, [images])
    write_strip(folder, images, [f"{v:.2f}" for v in steps.tolist()], run.stamp)


def check_n(n: int, least: int):
    if n < least:
        raise UserError(Exit.USAGE, f"--n {n}: at least {least} slice{'s' * (least > 1)}")


def reconstruct_command(run: TrainedRun, arguments):
    given = {k: getattr(arguments, k) for k in ("slices", "axis") if k in arguments}
    slices = torch.from_numpy(read_slices(arguments.data, replace(run.config, **given)))
    scores = []

    def parts() -> Iterator[Tensor]:
        for images in map(unit_range, slices.split(128)):
            outputs = run.reconstruct(images)[1]
            scores.append(metrics.ssim(images, outputs))
            yield outputs

    folder = place_for(arguments, run, "reconstructed")
    write_slices(folder, parts())
    similarity = torch.cat(scores)
    messages.say(f"SSIM {similarity.mean():.4f} (sd {similarity.std(correction=0):.4f})")
    some = unit_range(slices[:8])
    files.save_figure(folder / "comparison.png", lambda: report.reconstructions(run, some))


def export_command(run: TrainedRun, arguments):
    check_own(run)
    export.export(run, Path(arguments.out))
    messages.say(f"export: {arguments.out}" + (f" ({run.stamp})" if run.stamp else ""))


def check_own(run: TrainedRun):
    if is_export(run.folder):
        raise UserError(
            Exit.USAGE, f"{run.folder} is an export, without scores and logs; give the folder "
            "of the run that it was made from",
        )  # fmt: skip


def evaluate_command(run: TrainedRun, arguments):
    check_own(run)
    given = {k: getattr(arguments, k) for k in ("data", "cache") if k in arguments}
    run.config = replace(run.config, **given)
    for stage, kimg in run.config.trained.items():
        if stage == "vqvae":
            continue  # index maps exist only if it is finished
        last = checkpoints.load_checkpoint(run.folder / f"{stage}_last.pt", stage=stage)
        if last["nimg"] < kimg * 1000:
            raise UserError(
                Exit.CHECKPOINT, f"{run.folder}: training is not finished; run driver.py again"
            )
    folder = run.folder.resolve().parent
    ours = (folder / "data_report.json").exists()  # a seed's folder may lie by itself
    with runs.writing_alone(folder if ours else run.folder):
        data = open_data(run.config)
        result = evaluate_and_save(run, data)
        if ours and (folder / "results.json").exists():  # stages by hand write none
            rows = results.rows_in(folder)
            rows[run.seed] = results.scored_row(result)
            results.write(folder, rows)
            save_report(folder, data, str(run.device))


def evaluate_and_save(run: TrainedRun, data: Data) -> dict:
    """Write scores and figures of a finished run into its folder; print the table.

    metrics.json is written last, since it marks the run as finished.
    """
    messages.say(f"seed {run.seed}: computing scores; on two cores this takes minutes")
    result = evaluate(run, data)
    messages.say(table(result))
    with files.warning_only("drawing figures"):
        report.save_figures(run, data, files.Log(run.folder / "log.csv").rows())
    files.write_json(run.folder / "metrics.json", result)
    return result


def save_report(folder: Path, data: Data, on: str):
    """Write report.html of a results folder: all its runs, and its best run in pictures."""
    with files.warning_only("writing report.html"):
        best = files.read_json(folder / "results.json")["best"]
        run = load_run(folder / best, on) if best else None
        files.write_text(folder / "report.html", report.page(folder, run, data))


def score_command(arguments):
    config = config_from(arguments)
    path = Path(arguments.out) if arguments.out else Path(arguments.fake) / "scores.json"
    check_apart(arguments.real, arguments.fake, arguments.against)
    files.check_writable(path.parent)
    real = open_slices(Path(arguments.real), config)
    fake = open_slices(Path(arguments.fake), config, subjects=False)
    unseen = open_slices(Path(arguments.against), config) if arguments.against else None
    if unseen and (shared := set(real.subjects.tolist()) & set(unseen.subjects.tolist())):
        messages.warn(
            f"{len(shared)} subjects, such as {min(shared)}, are in REAL_DIR and in --against: "
            "are they the same people? Then the judge and memorised shares are wrong"
        )
    scores = score_folders(real, fake, unseen, config)
    messages.say(generation_table(scores))
    messages.say("training slices are those of REAL_DIR, unseen people those of --against")
    if scores["n"] < FEW:
        messages.say(f"only {scores['n']} slices of each kind: much of these scores is chance")
    if not unseen:
        messages.say("left out: trained judge, memorised share; they need --against")
    files.write_json(path, scores)
    messages.say(f"scores: {path}")


def check_apart(*folders: str | None):
    """Raise UserError (exit 2) if a folder lies in another one: slices would count twice.

    Exit 3 if one is missing, before the others are decoded.
    """
    places = [Path(folder).resolve() for folder in folders if folder]
    for place in places:
        if not os.path.isdir(place):  # Path.is_dir raises below an unreadable folder
            raise UserError(Exit.DATA, f"{place} is not a folder")
    for one, other in itertools.permutations(places, 2):
        if one.is_relative_to(other):
            raise UserError(Exit.USAGE, f"{one} lies in {other}; give separate folders")


COMMANDS = {
    "generate": generate_command, "interpolate": interpolate_command,
    "reconstruct": reconstruct_command, "evaluate": evaluate_command,
    "export": export_command,
}  # fmt: skip


def main(arguments):
    if arguments.command == "score":
        return score_command(arguments)
    run = load_run(arguments.run, getattr(arguments, "device", "auto"))
    return COMMANDS[arguments.command](run, arguments)


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
