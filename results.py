"""results.json of a folder: a row for each of its runs, the best of them, mean and sd.

In: the metrics.json of each seed. Validation chooses; test scores are only reported. Knows
nothing of networks and data.
"""

import math
import statistics
from pathlib import Path

import runtime

SCORE = (
    "fd_validation"  # chooses the best run: relative FD to validation slices, lower is better
)


def row_of(folder: Path, seed: int, n: int) -> dict:
    """A row for one seed, from its metrics.json if it has one.

    n: slices of each kind that runs are compared by. FD at another n is another unit, so what
    was scored with another is not finished.
    """
    path = folder / f"seed-{seed}" / "metrics.json"
    if not path.exists():
        return diverged(folder, seed) or {"status": "unfinished"}
    metrics = runtime.read_json(path)
    with runtime.reading(path):
        scored = metrics["generation"]["n"]
        if scored != n:
            return {"status": "unfinished", "why": f"scored with {scored} slices, not {n}"}
        return scored_row(metrics)


def scored_row(metrics: dict) -> dict:
    """A row from the scores of a run, as they are in its metrics.json."""
    r, g = (metrics[name] for name in ("reconstruction", "generation"))
    test = {name: r[name]["mean"] for name in ("ssim", "ssim_in_brain", "psnr_db")}
    names = ("fd_test", "fd_train", "coverage", "recall", "ms_ssim_of_pairs")
    test |= {name: g[name]["generated"] for name in names}
    validation = {SCORE: g[SCORE]["generated"]}
    if not all(map(math.isfinite, [*test.values(), *validation.values()])):
        return {"status": "diverged", "why": "a score is not finite"}
    return {"status": "done", "validation": validation, "test": test}


def diverged(folder: Path, seed: int) -> dict | None:
    """The row of a seed that diverged before: it would do so again."""
    if not (folder / "results.json").exists():
        return None
    row = rows_in(folder).get(seed, {})
    return row if row.get("status") == "diverged" else None


def rows_in(folder: Path) -> dict[int, dict]:
    """Seed -> its row, as results.json has it. Raises UserError (exit 4) if it has none."""
    path = folder / "results.json"
    with runtime.reading(path):
        rows = {row.pop("seed"): row for row in runtime.read_json(path)["runs"]}
        for row in rows.values():
            del row["folder"], row["rank"]
    return rows


def ranks(rows: dict[int, dict]) -> dict[int, int]:
    """Place of each run that came through with a finite validation score, 1 for the lowest."""
    scores = {s: r["validation"][SCORE] for s, r in rows.items() if r["status"] == "done"}
    finite = sorted((s for s in scores if math.isfinite(scores[s])), key=scores.get)
    return {seed: place for place, seed in enumerate(finite, 1)}


def choose(rows: dict[int, dict]) -> int | None:
    """The seed of the lowest finite validation score among the runs that came through."""
    return next(iter(ranks(rows)), None)


def write(folder: Path, rows: dict[int, dict], seeds: range | None = None):
    """results.json: all runs, the best of them by validation, mean and sd of test scores.

    seeds: those that the folder is finished with, of all `rows` unless said.
    """
    best, places = choose(rows), ranks(rows)
    done = {s: r for s, r in rows.items() if r["status"] == "done"}
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
            "finished": all(rows[s]["status"] != "unfinished" for s in seeds or rows),
            "runs": [
                {"seed": s, "folder": f"seed-{s}", "rank": places.get(s), **r}
                for s, r in rows.items()
            ],
            "test_mean_sd": spread,
        },
    )
