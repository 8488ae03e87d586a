"""The whole way, from slices to new brains: train, evaluate, choose the best of several runs.

`python driver.py` needs no data: it makes an embedded set. With OASIS slices, give their folder
as `--data PATH`, or write it below. The same command again continues where it stopped.
"""

from config import Config, Exit, Parser, UserError, add_options, config_from, flags

DATA_PATH = None  # for example "keras_png_slices_data"; None is the embedded set

if __name__ == "__main__":  # a mistyped flag must not wait for torch
    PARSER = Parser(
        "Learn brain MRI slices and draw new ones. The same command again continues."
    )
    add_options(PARSER)
    ARGUMENTS = PARSER.parse_args()

import shlex
import time
from pathlib import Path

import predict
import processes
import results
import runtime
import train
from dataset import Data, open_data
from evaluation import slices_compared


@processes.joined()
def main(arguments):
    if DATA_PATH is not None and "data" not in arguments:
        arguments.data = DATA_PATH
    config = config_from(arguments)
    device = runtime.choose_device(config.device)
    train.check_shares(config)
    given = shlex.join(flags(config)) or "all defaults"
    runtime.say(f"settings: {given} (every one: config.json, in the run's folder)")
    runtime.say(f"device: {device}, {config.precision} precision")
    runtime.check_out(config)
    data = processes.first_then_all(lambda: open_data(config))
    train.check_enough(data)
    folder, first = processes.first(
        lambda: runtime.results_folder(config, data.fingerprint, "seed" in arguments)
    )
    with runtime.writing_alone(folder):
        runtime.say(f"results: {folder}")
        known = {int(p.name[5:]) for p in folder.glob("seed-*") if p.name[5:].isdigit()}
        seeds = range(first, first + config.runs)
        n = slices_compared(config, data)
        rows = processes.first(
            lambda: {s: results.row_of(folder, s, n) for s in sorted(known | set(seeds))}
        )
        waiting = [seed for seed in seeds if rows[seed]["status"] == "unfinished"]
        for seed in waiting:
            rows[seed] = one_run(folder, config, seed, data)
            processes.first(lambda: publish(folder, rows, seeds, data, config))
        if not waiting:
            processes.first(lambda: publish(folder, rows, seeds, data, config))
        processes.first(lambda: conclude(folder))


def publish(folder: Path, rows: dict[int, dict], seeds: range, data: Data, config: Config):
    """results.json, the table of all runs so far, and report.html unless it shows them all."""
    results.write(folder, rows, seeds)
    print_table(folder, rows)
    page = folder / "report.html"
    ended = [path.stat().st_mtime_ns for path in folder.glob("seed-*/run.log")]
    if not page.exists() or page.stat().st_mtime_ns < max(ended, default=0):
        predict.save_report(folder, data, config.device)


def one_run(folder: Path, config: Config, seed: int, data: Data) -> dict:
    """Train, evaluate and draw one seed. Divergence is a result; other failures end it all."""
    run = train.open_seed(folder, config, seed, data)
    start = time.monotonic()
    with runtime.logging_to(run.path("run.log")):
        try:
            train.run_stages(run, train.STAGES)
            trained = predict.load_run(run.folder, str(run.device))
            result = predict.evaluate_and_save(trained, data)
        except (UserError, FloatingPointError) as problem:
            if getattr(problem, "code", Exit.DIVERGED) != Exit.DIVERGED:
                raise
            if processes.count() > 1 and isinstance(problem, FloatingPointError):
                raise  # it may be this process's alone, and the others wait for it
            runtime.warn(str(problem))
            return {"status": "diverged", "why": str(problem)}
        minutes = (time.monotonic() - start) / 60
        runtime.say(f"seed {seed}: {minutes:.1f} min, in {run.folder}")
    return results.scored_row(result)


def print_table(folder: Path, rows: dict[int, dict]):
    """All runs so far, a line each."""
    best = runtime.read_json(folder / "results.json")["best"]
    for seed, row in rows.items():
        scores = {**row.get("validation", {}), **row.get("test", {})}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        mark = "  <- best" if best == f"seed-{seed}" else ""
        runtime.say(f"seed {seed}: {row['status']} {shown}{mark}")


def conclude(folder: Path):
    """Say where to look; exit 6 if no run came through."""
    best = runtime.read_json(folder / "results.json")["best"]
    if best is None:
        raise UserError(Exit.DIVERGED, f"no run of {folder} came through; see its run.log")
    runtime.say(f"report: {folder / 'report.html'} (figures: {folder / best / 'figures'})")
    runtime.say(f"more samples: python predict.py generate {folder} --n 64")


if __name__ == "__main__":
    runtime.run_script(lambda: main(ARGUMENTS))
