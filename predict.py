"""From a finished run to images, scores and files to share.

In: a results folder (its best run), the folder of one seed, or an exported one. Out: 8-bit grey
PNGs of 256x256, a volume, `metrics.json`, figures, an export. In a notebook:
`run = load_run("runs/NAME"); maps, brains = run.sample(8)`.
"""

import argparse

from config import Config, Exit, Parser, UserError, add_options


def natural(text: str) -> int:
    """A whole number of 0 or more, for argparse."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 0 to {2**31 - 1}")
    return int(text)


def level(text: str) -> float:
    """A slice level, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 0 to 1")
    return value


def level_or_sweep(text: str) -> float | str:
    if text == "sweep":
        return text
    try:
        return level(text)
    except argparse.ArgumentTypeError as problem:
        raise argparse.ArgumentTypeError(f"{problem}, and sweep") from None


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
    generate.add_argument(
        "--level", type=level_or_sweep, default=None, metavar="LEVEL",
        help="slice level, 0 lowest to 1 highest; or sweep: --n levels of one subject "
        "[as in the training split]",
    )  # fmt: skip
    generate.add_argument(
        "--volume", action="store_true", help="stack --level sweep into volume.nii.gz"
    )
    interpolate = commands.add_parser(
        "interpolate", help="walk from one new subject to another",
        description="Walk from one new subject to another; PNGs, a strip and a GIF.",
    )  # fmt: skip
    interpolate.add_argument("--n", type=natural, default=16, help="how many slices [16]")
    interpolate.add_argument(
        "--seed", type=natural, default=0, help="from sample 0 of seed S to sample 1 [0]"
    )
    interpolate.add_argument(
        "--level", type=level, default=None, help="slice level, 0 to 1 [that of sample 0]"
    )
    interpolate.add_argument(
        "--out", default="", help="folder for PNGs [interpolated/, in the run's]"
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
    export = commands.add_parser(
        "export", help="a folder to share: safetensors and a model card",
        description="Write weights (safetensors), settings, a model card and an example.",
    )  # fmt: skip
    export.add_argument("--out", required=True, help="a new folder, or an earlier export's")
    for command in (generate, interpolate, reconstruct, evaluate, export):
        command.add_argument(
            "run", metavar="RUN", help="results folder, or the folder of one seed"
        )
        add_options(command, ("device",))
    return parser.parse_args()


if __name__ == "__main__":  # a mistyped flag must not wait for torch
    ARGUMENTS = parse()

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

import figures
import metrics
import modules
import processes
import report
import results
import runtime
import sharing
from dataset import Data, evenly, open_data, read_slices, unit_range
from evaluation import Scorer, evaluate, parts_of, table
from train import code_map_of

# --- a finished run -----------------------------------------------------------------------


NO_LEVELS = "this run knows no slice levels (its data had none, or it is of --gan-loss bce)"


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
    denoiser: modules.Denoiser | None
    code_map: modules.CodeMap
    levels: Tensor  # (1024,) slice levels distributed as in the training split, or (0,)
    counts: Tensor  # (K,) how often the training split uses each code

    def sample(
        self, n: int, seed: int = 0, first: int = 0, level: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """n new index maps (n, 64, 64) int64 and slices (n, 1, 256, 256) float32 [0,1].

        They are number first .. first + n - 1 of `seed`; each depends on (seed, number) alone.
        level: 0 lowest to 1 highest slice; None: distributed as in the training split. Raises
        ValueError for a level where the run is not `conditional`.
        """
        noise, levels = self.noise(n, seed, first)
        if level is not None:
            self.require_levels()
            levels = torch.full((n,), level)
        return self.draw(noise, levels)

    def noise(self, n: int, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
        """What samples first .. first + n - 1 of `seed` are made of: (n, Z), levels (n,)."""
        numbers = range(first, first + n)
        return modules.noise_of(numbers, self.config.noise_dim, seed, self.levels)

    def draw(self, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (n, Z), levels (n,) in [0,1] or NaN -> index maps and slices, as `sample`."""
        stretch = self.config.gan_loss == "bce"
        autocast = runtime.autocast(self.device, self.config.precision)
        return modules.draw(
            self.generator, self.code_map, self.vqvae, noise, level, stretch,
            denoiser=self.denoiser, autocast=autocast,
        )  # fmt: skip

    def sweep(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Sample 0 of `seed` from the lowest slice to the highest: levels (n,), slices."""
        self.require_levels()
        levels = torch.linspace(0, 1, n)
        noise = self.noise(1, seed)[0].expand(n, -1)
        return levels, self.draw(noise, levels)[1]

    def walk(self, n: int, seed: int = 0, level: float | None = None) -> tuple[Tensor, Tensor]:
        """From sample 0 of `seed` to sample 1: steps (n,) from 0 to 1, slices as `sample`.

        Along the great circle, where the noise has the length that the generator knows.
        level: of all slices; None is that of sample 0.
        """
        if level is not None:
            self.require_levels()
        (a, b), levels = self.noise(2, seed)
        where = levels[0] if level is None else torch.tensor(level)
        # Slerp (Shoemake 1985); the limits keep it finite where a and b are parallel.
        angle = torch.arccos(torch.cosine_similarity(a, b, dim=0).clamp(-0.999, 0.999))
        steps = torch.linspace(0, 1, n)
        t = steps[:, None]
        noise = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        return steps, self.draw(noise, where.expand(n))[1]

    @property
    def trained(self) -> dict[str, float]:
        """Its stages of training -> how long, in thousands of what they see."""
        config = self.config
        stages = {
            "vqvae": config.vqvae_kimg, "decoder": config.decoder_kimg,
            "dcgan": config.gan_kimg, "denoiser": config.denoiser_kimg,
        }  # fmt: skip
        return {stage: kimg for stage, kimg in stages.items() if kimg}

    @property
    def conditional(self) -> bool:
        """Whether a slice level can be asked for."""
        return self.generator.conditional and len(self.levels) > 0

    def require_levels(self):
        if not self.conditional:
            raise ValueError(NO_LEVELS)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Slices (n, 1, 256, 256) [0,1] -> index maps (n, 64, 64)."""
        return self.vqvae.encode(images)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (n, 1, 256, 256) [0,1] -> index maps (n, 64, 64), slices of equal shape."""
        maps = self.encode(images)
        return maps, self.decode(maps)

    @torch.no_grad()
    def decode(self, maps: Tensor) -> Tensor:
        """Index maps (n, h, w), of any size -> slices (n, 1, 4h, 4w) [0,1]."""
        return self.vqvae.decode(maps)

    def ranks(self, maps: Tensor) -> np.ndarray:
        """Index maps as ranks 0..U-1, for pictures: similar numbers are similar codes."""
        return self.code_map.rank.cpu()[maps].clamp(min=0).numpy()


# A checkpoint holds the checksum of those that it was made with.
LINKS = (
    ("codes", "vqvae_best"), ("decoder_best", "codes"), ("dcgan_best", "codes"),
    ("denoiser_best", "codes"), ("denoiser_best", "dcgan_best"),
)  # fmt: skip


def best_of(config: Config) -> dict[str, str]:
    """Part of a run -> its checkpoint."""
    best = {
        "vqvae": "decoder_best" if config.decoder_kimg else "vqvae_best", "codes": "codes",
        "generator": "dcgan_best",
    }  # fmt: skip
    return best | ({"denoiser": "denoiser_best"} if config.denoiser_kimg else {})


def load_run(path: str | Path, device: str = "auto") -> TrainedRun:
    """Load a results folder's best run, a seed's folder, or an exported one.

    Raises UserError (exit 4) if a file that it needs is missing, damaged or of another run.
    """
    folder, where = seed_folder(Path(path)), runtime.choose_device(device)
    saved = runtime.read_json(folder / "config.json")
    try:
        # What was written before there was a denoiser has none.
        config = Config.from_dict({"denoiser_kimg": 0.0} | saved["config"])
        seed = saved["config"]["seed"]
        mine = {"config": config.identity(), "seed": seed, "data": saved["data"]}
        stamp = saved["stamp"]
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(Exit.CHECKPOINT, f"{folder / 'config.json'}: {problem}") from None
    exported = (folder / sharing.WEIGHTS).exists()
    parts = sharing.load(folder) if exported else load_checkpoints(folder, config, mine)
    codes, file = parts["codes"], sharing.WEIGHTS if exported else "codes.pt"
    code_map = code_map_of(codes, config, folder / file).to(where)
    networks = {
        "vqvae": modules.make_vqvae(config, sharper=config.decoder_kimg > 0),
        "generator": modules.make_generator(config, code_map.box.size),
        "denoiser": modules.make_denoiser(config) if config.denoiser_kimg else None,
    }
    for name, network in networks.items():
        if network is None:
            continue
        file = sharing.WEIGHTS if exported else f"{best_of(config)[name]}.pt"
        runtime.load_weights(network, parts[name], folder / file)
        network.to(where).eval().requires_grad_(False)
    return TrainedRun(
        folder, config, seed, saved["data"], stamp, where, **networks, code_map=code_map,
        levels=codes["levels"], counts=codes["counts"]["train"],
    )  # fmt: skip


def load_checkpoints(folder: Path, config: Config, mine: dict) -> dict[str, dict]:
    """The best weights of a seed's folder, as `sharing.load`. Raises UserError (exit 4)."""
    best = best_of(config)
    paths = {name: folder / f"{name}.pt" for name in ("vqvae_best", *best.values())}
    values = {
        name: runtime.load_checkpoint(path, stage=name.removesuffix("_best"), **mine)
        for name, path in paths.items()
    }
    for name, target in LINKS:
        if name not in values:
            continue
        with runtime.reading(paths[name]):
            if values[name][target.removesuffix("_best")] != runtime.checksum(paths[target]):
                raise ValueError(f"made with another {paths[target].name}")
    denoiser, generator = values.get("denoiser_best", {}), values["dcgan_best"].get("generator")
    if denoiser and isinstance(generator, dict):
        with runtime.reading(paths["denoiser_best"]):  # as samples need it before the denoiser
            generator["contrast"] = denoiser["contrast"].reshape(())
    return {
        "vqvae": values[best["vqvae"]].get("model"), "generator": generator,
        "denoiser": denoiser.get("denoiser"), "codes": values["codes"],
    }  # fmt: skip


def seed_folder(path: Path) -> Path:
    """The folder of one seed: `path` itself, its best run, or its only one."""
    if list(path.glob("*_best.pt")) or (path / sharing.WEIGHTS).exists():
        return path
    if (path / "results.json").exists():
        best = runtime.read_json(path / "results.json").get("best")
        if isinstance(best, str) and best == Path(best).name:
            return path / best
    seeds = sorted(path.glob("seed-*"))
    if len(seeds) == 1:
        return seeds[0]
    raise UserError(Exit.CHECKPOINT, f"RUN {path}: {no_run_in(path, seeds)}")


def no_run_in(path: Path, seeds: list[Path]) -> str:
    """Why `path` names no run, and what would."""
    if not path.exists():
        return "does not exist; give a results folder of driver.py, such as runs/NAME"
    if not path.is_dir():
        return "is a file; give the results folder that it lies in"
    if seeds:
        return "no run of it was chosen yet; run driver.py again, or name a seed-* folder"
    inside = sorted(child.parent.name for child in path.glob("*/results.json"))
    if inside:
        return f"holds several results folders; give one of them: {', '.join(inside[:5])}"
    return "no run in it; give a results folder of driver.py, such as runs/NAME"


# --- figures ------------------------------------------------------------------------------


def save_figures(run: TrainedRun, data: Data, scorer: Scorer, result: dict, rows: list[dict]):
    """Every figure of a finished run into its folder `figures`."""
    folder, stamp = run.folder / "figures", run.stamp
    folder.mkdir(exist_ok=True)
    used = len(run.code_map.used)
    chosen = np.linspace(0, len(data.test) - 1, 18).astype(int)
    test = data.test.batch(chosen)
    maps, outputs = run.reconstruct(test)
    new_maps, new = run.sample(16)
    of_levels = run.draw(run.noise(9)[0], torch.from_numpy(data.test.levels[chosen[::2]]))[1]
    real, back, drawn, beside = (x[:, 0].numpy() for x in (test, outputs, new, of_levels))
    bank = parts_of(metrics.thumbnails, data.train)
    distances, nearest = metrics.nearest(new, bank, k=1)
    neighbours = data.train.batch(nearest[:, 0])[:, 0].numpy()
    similarity = metrics.ssim(test[:8], outputs[:8]).tolist()
    counts = run.counts[run.code_map.used.cpu()].numpy()
    perplexity = modules.perplexity(run.counts)
    drawings = {
        f"curves_{stage}": partial(figures.curves, rows, stage, stamp) for stage in run.trained
    }
    drawings |= {
        "reconstructions": lambda: figures.reconstructions(
            real[:8], run.ranks(maps[:8]), back[:8], similarity, used, stamp
        ),
        "code_histogram": lambda: figures.code_histogram(
            counts, perplexity, run.config.codes, stamp
        ),
        "generated": lambda: figures.generated(run.ranks(new_maps), drawn, used, stamp=stamp),
        "nearest_training": lambda: figures.nearest(
            drawn, neighbours, distances[:, 0].tolist(), stamp=stamp
        ),
        "real_beside_generated": lambda: figures.real_beside_generated(
            real[::2], back[::2], beside, stamp
        ),
        "overlap": lambda: draw_overlap(scorer, result, stamp),
        "memorisation": lambda: draw_memorisation(scorer, stamp),
    }
    for name, make in drawings.items():
        runtime.save_figure(folder / f"{name}.png", make)


def draw_overlap(scorer: Scorer, result: dict, stamp: str):
    """Real, reconstructed and generated slices on two principal components of real ones."""
    plane = PCA(2, svd_solver="full").fit(scorer.sets["train"].features)
    names = {"real": "real", "reconstruction": "reconstructed", "generated": "generated"}
    points = {name: plane.transform(scorer.sets[kind].features) for kind, name in names.items()}
    notes = []
    for kind, name in names.items():
        scores = (
            f"{m} {result['generation'][m][kind]:.2f}"
            for m in ("precision", "recall", "coverage")
        )
        notes.append(f"{name}: {', '.join(scores)}")
    return figures.overlap(points, notes, stamp)


def draw_memorisation(scorer: Scorer, stamp: str):
    near = scorer.near_training["features"]
    shown = {"unseen people": near["test"], "generated": near["generated"]}
    return figures.memorisation(shown, metrics.copy_distance(near["test"]), stamp)


# --- commands -----------------------------------------------------------------------------


def write_slices(folder: Path, parts: Iterator[Tensor]):
    """Slices (n, 1, 256, 256), part by part -> 00000.png ... and grid.png of the first 64."""
    folder.mkdir(parents=True, exist_ok=True)
    count, shown = 0, []
    for images in parts:
        shown += list(images[: max(0, 64 - count), 0].numpy())
        for image in images[:, 0].numpy():
            (folder / f"{count:05d}.png").write_bytes(figures.png(image))
            count += 1
    grid = figures.grid(np.stack(shown), min(8, count))
    (folder / "grid.png").write_bytes(figures.png(grid))
    runtime.say(f"{count} slices and grid.png in {folder}")


def place_for(arguments, parent: Path, name: str) -> Path:
    """--out, or a new folder: pictures of two commands do not mix."""
    return Path(arguments.out) if arguments.out else runtime.new_folder(parent, name)


def generate_command(run: TrainedRun, arguments):
    check_n(arguments.n, 1)
    check_level(run, arguments.level)
    if arguments.volume:
        if arguments.level != "sweep":
            raise UserError(Exit.USAGE, "--volume stacks a --level sweep: give both")
        check_n(arguments.n, 2)
    folder, n = place_for(arguments, run.folder, "generated"), arguments.n
    if arguments.level == "sweep":
        levels, images = run.sweep(n, arguments.seed)
        write_slices(folder, iter([images]))
        write_strip(folder, images, [f"level {v:.2f}" for v in levels.tolist()], run.stamp)
        if arguments.volume:
            path = folder / "volume.nii.gz"
            sharing.write_volume(path, images, run.stamp or "generated; shows nobody")
            runtime.say(f"volume: {path}")
        return
    starts = range(0, n, 256)
    parts = (
        run.sample(min(256, n - start), arguments.seed, start, arguments.level)[1]
        for start in starts
    )
    write_slices(folder, parts)


def interpolate_command(run: TrainedRun, arguments):
    check_n(arguments.n, 2)
    check_level(run, arguments.level)
    folder = place_for(arguments, run.folder, "interpolated")
    steps, images = run.walk(arguments.n, arguments.seed, arguments.level)
    write_slices(folder, iter([images]))
    write_strip(folder, images, [f"{v:.2f}" for v in steps.tolist()], run.stamp)


def check_level(run: TrainedRun, level):
    if level is not None and not run.conditional:
        raise UserError(Exit.USAGE, f"--level: {NO_LEVELS}; leave --level out")


def check_n(n: int, least: int):
    if n < least:
        raise UserError(Exit.USAGE, f"--n {n}: at least {least} slice{'s' * (least > 1)}")


def write_strip(folder: Path, images: Tensor, labels: list[str], stamp: str):
    """strip.png, at most 16 slices; walk.gif, all of them, there and back."""
    some = evenly(len(images), 16)
    row, chosen = images[some, 0].numpy(), [labels[i] for i in some]
    runtime.save_figure(folder / "strip.png", lambda: figures.strip(row, chosen, stamp))
    frames = [Image.fromarray(figures.as_bytes(image)) for image in images[:, 0].numpy()]
    there_and_back = frames + frames[-2:0:-1]
    there_and_back[0].save(
        folder / "walk.gif", save_all=True, append_images=there_and_back[1:],
        duration=80, loop=0,
    )  # fmt: skip
    runtime.say(f"strip.png and walk.gif in {folder}")


def reconstruct_command(run: TrainedRun, arguments):
    given = {k: getattr(arguments, k) for k in ("slices", "axis") if k in arguments}
    slices = torch.from_numpy(read_slices(arguments.data, replace(run.config, **given)))
    shown, scores = [], []  # of the first part; of all

    def parts() -> Iterator[Tensor]:
        for images in map(unit_range, slices.split(128)):
            maps, outputs = run.reconstruct(images)
            shown.append((images[:8, 0].numpy(), run.ranks(maps[:8]), outputs[:8, 0].numpy()))
            del shown[1:]
            scores.append(metrics.ssim(images, outputs))
            yield outputs

    folder = place_for(arguments, run.folder, "reconstructed")
    write_slices(folder, parts())
    similarity = torch.cat(scores)
    runtime.say(f"SSIM {similarity.mean():.4f} (sd {similarity.std(correction=0):.4f})")
    (originals, ranks, back), values = shown[0], similarity[:8].tolist()
    used = len(run.code_map.used)
    runtime.save_figure(
        folder / "comparison.png",
        lambda: figures.reconstructions(originals, ranks, back, values, used, run.stamp),
    )


def export_command(run: TrainedRun, arguments):
    check_own(run)
    sharing.export(run, Path(arguments.out))
    runtime.say(f"to share: {arguments.out}" + (f" ({run.stamp})" if run.stamp else ""))


def check_own(run: TrainedRun):
    if (run.folder / sharing.WEIGHTS).exists():
        raise UserError(
            Exit.USAGE, f"{run.folder} is an export, without scores and logs; give the folder "
            "of the run that it was made from",
        )  # fmt: skip


def evaluate_command(run: TrainedRun, arguments):
    check_own(run)
    given = {k: getattr(arguments, k) for k in ("data", "cache", "samples") if k in arguments}
    run.config = replace(run.config, **given)
    for stage, kimg in run.trained.items():
        if stage == "vqvae":
            continue  # without its end there are no index maps
        last = runtime.load_checkpoint(run.folder / f"{stage}_last.pt", stage=stage)
        if last["nimg"] < kimg * 1000:
            raise UserError(
                Exit.CHECKPOINT, f"{run.folder} is not trained to its end; run driver.py again"
            )
    folder = run.folder.resolve().parent
    ours = (folder / "data_report.json").exists()  # not if a seed's folder lies by itself
    with runtime.writing_alone(folder if ours else run.folder):
        data = open_data(run.config)
        result = evaluate_and_save(run, data)
        if ours and (folder / "results.json").exists():  # stages by hand make none
            if is_own_number(run):
                rows = results.rows_in(folder)
                rows[run.seed] = results.scored_row(result)
                results.write(folder, rows)
            save_report(folder, data, str(run.device))


def is_own_number(run: TrainedRun) -> bool:
    """Whether it is scored with as many slices as it was trained to be."""
    saved = runtime.read_json(run.folder / "config.json")["config"]
    return run.config.samples == saved["samples"]


def evaluate_and_save(run: TrainedRun, data: Data) -> dict:
    """Scores and figures of a finished run into its folder; prints the table.

    metrics.json comes last, since it marks the run as finished. It holds the run's own number
    of samples: FD at another N is another unit, and goes to metrics-N.json.
    """
    name = "metrics.json" if is_own_number(run) else f"metrics-{run.config.samples}.json"
    result, scorer = evaluate(run, data)
    runtime.say(table(result))
    if processes.is_first():
        with runtime.warning_only("drawing figures"):
            save_figures(run, data, scorer, result, runtime.Log(run.folder / "log.csv").rows())
    processes.first(lambda: runtime.write_json(run.folder / name, result))
    return result


def save_report(folder: Path, data: Data, device: str):
    """report.html of a results folder: all its runs, and its best run in pictures."""
    with runtime.warning_only("writing report.html"):
        best = runtime.read_json(folder / "results.json")["best"]
        run = load_run(folder / best, device) if best else None
        runtime.write_text(folder / "report.html", report.page(folder, run, data))


COMMANDS = {
    "generate": generate_command,
    "interpolate": interpolate_command,
    "reconstruct": reconstruct_command,
    "evaluate": evaluate_command,
    "export": export_command,
}


def main(arguments):
    run = load_run(arguments.run, getattr(arguments, "device", "auto"))
    COMMANDS[arguments.command](run, arguments)


if __name__ == "__main__":
    runtime.run_script(lambda: main(ARGUMENTS))
