"""From slices to new brains: train, evaluate, and choose the best of several runs.

`python driver.py` needs no data: it makes an embedded set. For OASIS slices give their folder
as `--data PATH`, or write it below. The same command again resumes where it stopped.
"""

from config import Config, Exit, UserError
from support.cli import Parser, add_options, config_from, flags

DATA_PATH = None  # for example "keras_png_slices_data"; None is the embedded set

if __name__ == "__main__":  # a mistyped flag must not wait for the import of torch
    PARSER = Parser("Learn brain MRI slices and draw new ones. The same command again resumes.")
    add_options(PARSER)
    ARGUMENTS = PARSER.parse_args()

import shlex
import time
from pathlib import Path

import predict
import train
from dataset import Data, evenly, open_data
from scores import figures, results
from scores.evaluation import slices_compared
from stages.stage import Run, open_seed
from support import device, distributed, endings, files, messages, runs


@distributed.joined()
def main(arguments):
    if DATA_PATH is not None and "data" not in arguments:
        arguments.data = DATA_PATH
    config = config_from(arguments)
    place = device.choose_device(config.device)
    train.check_shares(config)
    settings = shlex.join(flags(config)) or "all defaults"
    messages.say(f"settings: {settings} (all of them: config.json, in the run's folder)")
    messages.say(f"device: {place}, {config.precision} precision")
    runs.check_out(config)
    data = open_data(config)
    train.check_enough(data)
    given = data.fingerprint, "seed" in arguments, "runs" in arguments
    folder, seeds = distributed.first(lambda: runs.results_folder(config, *given))
    with runs.writing_alone(folder):
        messages.say(f"results: {folder}")
        distributed.first(lambda: draw_decoded(folder, data))
        rows = distributed.first(lambda: known_rows(folder, seeds, config, data))
        waiting = [seed for seed in seeds if rows[seed]["status"] == "unfinished"]
        for seed in waiting:
            rows[seed] = one_run(folder, config, seed, data)
            distributed.first(lambda: publish(folder, rows, seeds, data, config))
        if not waiting:
            distributed.first(lambda: publish(folder, rows, seeds, data, config))
        distributed.first(lambda: conclude(folder, config.preset))


def draw_decoded(folder: Path, data: Data):
    """Draw 24 training slices with their levels, to be looked at before an hour of training."""
    path, chosen = folder / "decoded.png", evenly(len(data.train), 24)
    if not path.exists():
        images = data.train.batch(chosen)[:, 0].numpy()
        labels = [f"level {level:.2f}" for level in data.train.levels[chosen]]
        files.save_figure(path, lambda: figures.strip(images, labels, data.stamp))


def known_rows(folder: Path, seeds: range, config: Config, data: Data) -> dict[int, dict]:
    """The row of results.json of each seed in the folder and of each of `seeds`."""
    n, every = slices_compared(config, data), {*runs.seeds_in(folder), *seeds}
    return {seed: results.row_of(folder, seed, n) for seed in sorted(every)}


def one_run(folder: Path, config: Config, seed: int, data: Data) -> dict:
    """Train, evaluate and draw one seed. Divergence is a result; other failures end all."""
    run = open_seed(folder, config, seed, data)
    start = time.monotonic()
    with messages.logging_to(run.path("run.log")):
        try:
            train.run_stages(run, train.STAGES)
            row = distributed.first(lambda: scored(run, data))
        except (UserError, FloatingPointError) as problem:
            if getattr(problem, "code", Exit.DIVERGED) != Exit.DIVERGED:
                raise
            if distributed.count() > 1 and isinstance(problem, FloatingPointError):
                raise  # in one process only, while the others wait for it
            messages.warn(str(problem))
            return {"status": "diverged", "why": str(problem)}
        minutes = (time.monotonic() - start) / 60
        messages.say(f"seed {seed}: {minutes:.1f} min since the last start, in {run.folder}")
    return row


def scored(run: Run, data: Data) -> dict:
    """Scores and figures of a trained seed -> its row of results.json."""
    trained = predict.load_run(run.folder, str(run.device))
    return results.scored_row(predict.evaluate_and_save(trained, data))


def publish(folder: Path, rows: dict[int, dict], seeds: range, data: Data, config: Config):
    """Write and print results.json; write report.html if a seed ended after the last one."""
    results.write(folder, rows, seeds)
    best = files.read_json(folder / "results.json")["best"]
    for seed, row in rows.items():
        scores = {**row.get("validation", {}), **row.get("test", {})}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        mark = "  <- best" if best == f"seed-{seed}" else ""
        messages.say(f"seed {seed}: {row['status']} {shown}{mark}")
    page = folder / "report.html"
    ended = [path.stat().st_mtime_ns for path in folder.glob("seed-*/run.log")]
    if not page.exists() or page.stat().st_mtime_ns < max(ended, default=0):
        predict.save_report(folder, data, config.device)


def conclude(folder: Path, preset: str):
    """Print where the results are. Raises UserError (exit 6) if every run failed."""
    best = files.read_json(folder / "results.json")["best"]
    if best is None:
        raise UserError(Exit.DIVERGED, f"every run in {folder} failed; see their run.log")
    messages.say(f"report: {folder / 'report.html'} (figures: {folder / best / 'figures'})")
    command = shlex.join(["python", "predict.py", "generate", str(folder), "--n", "64"])
    messages.say(f"more samples: {command}")
    if preset == "smoke":
        messages.say("smoke shows that everything runs; it is too short to draw brains")


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
