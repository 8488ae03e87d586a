"""results.json of a folder: one row per run, the best run, mean and sd of test scores.

In: the metrics.json of each seed. Validation chooses; test scores are only reported.
"""

import math
import statistics
from pathlib import Path

from support import checkpoints, files, runs

# Chooses the best run: relative FD to validation slices, lower is better (docs/quality.md).
SCORE = "fd_validation"


def row_of(folder: Path, seed: int, n: int) -> dict:
    """The row of one seed, from its metrics.json if there is one.

    n: slices of each kind. FD at another n has another unit, so a run that was scored with
    another n counts as unfinished.
    """
    path = folder / f"seed-{seed}" / "metrics.json"
    if not path.exists():
        return runs.diverged(folder).get(seed, {"status": "unfinished"})
    metrics = files.read_json(path)
    with checkpoints.reading(path):
        scored = metrics["generation"]["n"]
        if scored != n:
            return {"status": "unfinished", "why": f"scored with {scored} slices, not {n}"}
        return scored_row(metrics)


def scored_row(metrics: dict) -> dict:
    """The row of a run, from the values of its metrics.json."""
    r, g = metrics["reconstruction"], metrics["generation"]
    test = {name: r[name]["mean"] for name in ("ssim", "ssim_in_brain", "psnr_db")}
    names = ("judge_auc_test", "fd_test", "fd_train", "coverage", "recall")
    test |= {name: g[name]["generated"] for name in names}
    validation = {SCORE: g[SCORE]["generated"]}
    if not all(map(math.isfinite, [*test.values(), *validation.values()])):
        return {"status": "diverged", "why": "a score is not finite"}
    return {"status": "done", "validation": validation, "test": test}


def rows_in(folder: Path) -> dict[int, dict]:
    """Seed -> its row, as results.json has it. Raises UserError (exit 4) if it has none."""
    path = folder / "results.json"
    with checkpoints.reading(path):
        rows = {row.pop("seed"): row for row in files.read_json(path)["runs"]}
        for row in rows.values():
            del row["folder"], row["rank"]
    return rows


def ranks(rows: dict[int, dict]) -> dict[int, int]:
    """Rank of each finished run by its finite validation score, 1 for the lowest."""
    scores = {s: r["validation"][SCORE] for s, r in rows.items() if r["status"] == "done"}
    finite = sorted((s for s in scores if math.isfinite(scores[s])), key=scores.get)
    return {seed: place for place, seed in enumerate(finite, 1)}


def write(folder: Path, rows: dict[int, dict], seeds: range | None = None):
    """Write results.json: all runs, the best one by validation, mean and sd of test scores.

    seeds: the folder is finished if these are [all of `rows`].
    """
    places = ranks(rows)
    best = next(iter(places), None)
    done = [row["test"] for row in rows.values() if row["status"] == "done"]
    spread = {}
    for name in done[0] if done else ():
        values = [scores[name] for scores in done]
        sd = statistics.stdev(values) if len(values) > 1 else None
        spread[name] = {"mean": statistics.fmean(values), "sd": sd}
    listed = [
        {"seed": s, "folder": f"seed-{s}", "rank": places.get(s), **r} for s, r in rows.items()
    ]
    results = {
        "best": None if best is None else f"seed-{best}",
        "why": f"lowest {SCORE} of the runs that finished; test scores played no part",
        "finished": all(rows[s]["status"] != "unfinished" for s in seeds or rows),
        "runs": listed,
        "test_mean_sd": spread,
    }
    files.write_json(folder / "results.json", results)
