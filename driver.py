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

import math
import shlex
import statistics
import time
from pathlib import Path

import predict
import processes
import runtime
import train
from dataset import Data, open_data

SCORE = (
    "fd_validation"  # chooses the best run: relative FD to validation slices, lower is better
)


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
        results = processes.first(
            lambda: {s: finished(folder, s) for s in sorted(known | set(seeds))}
        )
        waiting = [seed for seed in seeds if results[seed]["status"] == "unfinished"]
        for seed in waiting:
            results[seed] = one_run(folder, config, seed, data)
            processes.first(lambda: publish(folder, results, seeds, data, config))
        if not waiting:
            processes.first(lambda: publish(folder, results, seeds, data, config))
        processes.first(lambda: conclude(folder))


def publish(folder: Path, results: dict[int, dict], seeds: range, data: Data, config: Config):
    """results.json, the table of all runs so far, and report.html unless it shows them all."""
    write_results(folder, results, seeds)
    print_table(folder, results)
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
    return finished(folder, seed, result)


def finished(folder: Path, seed: int, metrics: dict | None = None) -> dict:
    """A row of results.json for one seed, from its metrics.json if it has one."""
    path = folder / f"seed-{seed}" / "metrics.json"
    if metrics is None:
        if not path.exists():
            return diverged(folder, seed) or {"status": "unfinished"}
        metrics = runtime.read_json(path)
    with runtime.reading(path):
        r, g = (metrics[name] for name in ("reconstruction", "generation"))
        test = {name: r[name]["mean"] for name in ("ssim", "ssim_in_brain", "psnr_db")}
        names = ("fd_test", "fd_train", "coverage", "recall", "ms_ssim_of_pairs")
        test |= {name: g[name]["generated"] for name in names}
        validation = {SCORE: g[SCORE]["generated"]}
        if not all(map(math.isfinite, [*test.values(), *validation.values()])):
            return {"status": "diverged", "why": "a score is not finite"}
    return {"status": "done", "validation": validation, "test": test}


def ranks(results: dict[int, dict]) -> dict[int, int]:
    """Place of each run that came through with a finite validation score, 1 for the lowest."""
    scores = {s: r["validation"][SCORE] for s, r in results.items() if r["status"] == "done"}
    finite = sorted((s for s in scores if math.isfinite(scores[s])), key=scores.get)
    return {seed: place for place, seed in enumerate(finite, 1)}


def choose(results: dict[int, dict]) -> int | None:
    """The seed of the lowest finite validation score among the runs that came through."""
    return next(iter(ranks(results)), None)


def diverged(folder: Path, seed: int) -> dict | None:
    """The row of a seed that diverged before: it would do so again."""
    if not (folder / "results.json").exists():
        return None
    rows = runtime.read_json(folder / "results.json").get("runs", [])
    return next((r for r in rows if r["seed"] == seed and r["status"] == "diverged"), None)


def write_results(folder: Path, results: dict[int, dict], seeds: range):
    """results.json: all runs, the best of them by validation, mean and sd of test scores."""
    best, places = choose(results), ranks(results)
    done = {s: r for s, r in results.items() if r["status"] == "done"}
    spread = {}
    for name in next(iter(done.values()), {"test": {}})["test"]:
        values = [r["test"][name] for r in done.values()]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[name] = {"mean": statistics.fmean(values), "sd": sd}
    runtime.write_json(
        folder / "results.json",
        {
            "best": None if best is None else f"seed-{best}",
            "why": f"lowest {SCORE} of the runs that finished; test scores played no part",
            "finished": all(results[s]["status"] != "unfinished" for s in seeds),
            "runs": [
                {"seed": s, "folder": f"seed-{s}", "rank": places.get(s), **r}
                for s, r in results.items()
            ],
            "test_mean_sd": spread,
        },
    )


def print_table(folder: Path, results: dict[int, dict]):
    """All runs so far, a line each."""
    best = runtime.read_json(folder / "results.json")["best"]
    for seed, result in results.items():
        scores = {**result.get("validation", {}), **result.get("test", {})}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        mark = "  <- best" if best == f"seed-{seed}" else ""
        runtime.say(f"seed {seed}: {result['status']} {shown}{mark}")


def conclude(folder: Path):
    """Say where to look; exit 6 if no run came through."""
    best = runtime.read_json(folder / "results.json")["best"]
    if best is None:
        raise UserError(Exit.DIVERGED, f"no run of {folder} came through; see its run.log")
    runtime.say(f"report: {folder / 'report.html'} (figures: {folder / best / 'figures'})")
    runtime.say(f"more samples: python predict.py generate {folder} --n 64")


if __name__ == "__main__":
    runtime.run_script(lambda: main(ARGUMENTS))
