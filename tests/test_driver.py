"""Selection among runs: validation decides, and only runs that came through take part."""

import itertools
import json
import math
import os

import pytest

import driver
import results
import runtime
from config import Config, Exit, UserError


def done(score: float, ssim: float = 0.9) -> dict:
    return {"status": "done", "validation": {results.SCORE: score}, "test": {"ssim": ssim}}


RUNS = {
    "good": done(3.0, 0.8),
    "better on test only": done(4.0, 0.99),
    "not a number": done(math.nan),
    "diverged": {"status": "diverged", "why": "loss"},
    "unfinished": {"status": "unfinished"},
}


@pytest.mark.parametrize("order", list(itertools.permutations(RUNS))[::7])
def test_the_best_finite_validation_score_wins_in_any_order(order):
    rows = {seed: RUNS[name] for seed, name in enumerate(order)}
    assert order[results.choose(rows)] == "good"


def test_results_are_strict_json_with_mean_and_sd(tmp_path):
    rows = {0: done(3.0, 0.8), 1: done(2.0, 0.9), 2: {"status": "diverged", "why": "loss"}}
    results.write(tmp_path, rows)
    assert results.rows_in(tmp_path) == rows
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["best"] == "seed-1" and written["finished"]
    assert written["test_mean_sd"]["ssim"]["mean"] == pytest.approx(0.85)
    assert written["test_mean_sd"]["ssim"]["sd"] == pytest.approx(0.05 * 2**0.5)


def test_an_unfinished_seed_leaves_the_folder_unfinished(tmp_path):
    results.write(tmp_path, {0: done(3.0), 1: {"status": "unfinished"}}, range(2))
    assert not json.loads((tmp_path / "results.json").read_text())["finished"]


def test_a_seed_that_was_left_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, seed = runtime.results_folder(Config(runs=2), "data", False)
    results.write(folder, {0: done(3.0), 1: {"status": "unfinished"}}, range(1))  # --runs 1
    assert runtime.results_folder(Config(runs=2), "data", False) == (folder, seed)
    assert runtime.results_folder(Config(runs=1), "data", False)[0] != folder


def test_without_a_run_that_came_through_the_exit_is_6(tmp_path):
    results.write(tmp_path, {0: {"status": "diverged", "why": "loss"}})
    with pytest.raises(UserError) as problem:
        driver.conclude(tmp_path)
    assert problem.value.code == Exit.DIVERGED
    assert results.row_of(tmp_path, 0, 8)["status"] == "diverged"  # and is not tried again


def test_a_report_is_made_when_a_seed_ended_after_it(tmp_path, monkeypatch):
    made, page, log = [], tmp_path / "report.html", tmp_path / "seed-0" / "run.log"
    monkeypatch.setattr(driver.predict, "save_report", lambda *a: made.append(page.touch()))
    log.parent.mkdir()
    log.touch()
    for seconds, count in ((-9, 1), (-9, 1), (9, 2)):  # none yet; newer; a kill came before it
        if page.exists():
            when = page.stat().st_mtime_ns + seconds * 10**9
            os.utime(log, ns=(when, when))
        driver.publish(tmp_path, {0: done(3.0)}, range(1), None, Config())
        assert len(made) == count
