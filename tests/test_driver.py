"""Which folder and seeds a command trains, and which run is chosen as the best."""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_dataset import failure

import driver
from config import Config, Exit
from scores import results
from support import files, runs

QUICK = Config()
DIVERGED = {"status": "diverged", "why": "loss"}


def done(score: float, ssim: float = 0.9) -> dict:
    return {"status": "done", "validation": {results.SCORE: score}, "test": {"ssim": ssim}}


def leave(folder: Path, seed: int, finished: bool = True):
    """Leave a seed as a finished or a stopped run does."""
    (folder / f"seed-{seed}").mkdir(exist_ok=True)
    if finished:
        files.write_json(folder / f"seed-{seed}" / "metrics.json", {})


# --- folders and seeds --------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)


def test_the_same_command_continues_an_unfinished_seed_and_then_adds_the_next(here):
    folder = Path("runs/quick")
    assert runs.results_folder(QUICK, "data") == (folder, range(1))
    leave(folder, 0, finished=False)
    assert runs.results_folder(QUICK, "data") == (folder, range(1))
    leave(folder, 0)
    assert runs.results_folder(QUICK, "data") == (folder, range(1, 2))
    leave(folder, 1, finished=False)
    leave(folder, 2)
    assert runs.results_folder(QUICK, "data") == (folder, range(1, 2))


def test_results_never_go_into_the_data_folder(here):
    for config in (Config(data="slices", out="slices/results"), Config(data=".")):
        assert "give another --out" in failure(runs.check_out, config)
    runs.check_out(Config(data="slices", out="slices-results"))


def test_a_seed_that_diverged_is_not_tried_again(here):
    folder, _ = runs.results_folder(QUICK, "data")
    leave(folder, 0, finished=False)
    results.write(folder, {0: DIVERGED})
    assert runs.results_folder(QUICK, "data") == (folder, range(1, 2))


def test_seed_and_runs_fix_the_seeds(here):
    folder, _ = runs.results_folder(replace(QUICK, seed=5), "data", seed_given=True)
    leave(folder, 5)
    three, again = replace(QUICK, runs=3), replace(QUICK, runs=3, seed=5)
    assert runs.results_folder(three, "data", runs_given=True) == (folder, range(5, 8))
    assert runs.results_folder(again, "data", True, True) == (folder, range(5, 8))
    other = replace(QUICK, seed=9)
    assert runs.results_folder(other, "data", seed_given=True) == (folder, range(9, 10))


def test_with_out_the_seeds_are_those_of_the_first_command(here):
    folder, config = Path("mine"), replace(QUICK, out="mine")
    first = replace(config, seed=4)
    assert runs.results_folder(first, "data", seed_given=True) == (folder, range(4, 5))
    leave(folder, 4)
    assert runs.results_folder(config, "data") == (folder, range(4, 5))
    two = replace(config, runs=2)
    assert runs.results_folder(two, "data", runs_given=True) == (folder, range(4, 6))
    values = files.read_json(folder / "config.json")
    assert values["seed"] == 4 and values["data"] == "data" and values["preset"] == "quick"
    assert values["config"] == QUICK.identity()


def test_other_settings_or_data_get_a_folder_of_their_own_without_out(here):
    first, _ = runs.results_folder(QUICK, "data")
    settings, _ = runs.results_folder(replace(QUICK, lr=0.5), "data")
    data, _ = runs.results_folder(QUICK, "other data")
    assert len({first, settings, data}) == 3
    for folder in (settings, data):
        assert len(folder.name.removeprefix("quick-")) == 6
    (first / "config.json").unlink()  # a deleted runs/quick does not move the others
    assert runs.results_folder(replace(QUICK, lr=0.5), "data")[0] == settings
    Path("runs/smoke").mkdir()
    Path("runs/smoke/notes.txt").touch()
    assert runs.results_folder(Config(preset="smoke"), "data")[0].name.startswith("smoke-")


def test_other_settings_or_data_in_out_are_exit_4_with_the_differences(here):
    config = replace(QUICK, out="mine")
    runs.results_folder(config, "data")
    before = Path("mine/config.json").read_bytes()
    message = failure(runs.results_folder, config, "other", code=Exit.CHECKPOINT)
    assert "data is 'data', expected 'other'" in message
    other = replace(config, lr=0.5, codes=9)
    message = failure(runs.results_folder, other, "data", code=Exit.CHECKPOINT)
    assert "codes (512 there, 9 here), lr (" in message
    assert Path("mine/config.json").read_bytes() == before


@pytest.mark.parametrize(
    "old", [{"config": QUICK.identity() | {"an_old_field": 1}}, {"format": 2}]
)
def test_a_folder_of_another_version_is_refused(here, old):
    config, path = replace(QUICK, out="mine"), Path("mine/config.json")
    runs.results_folder(config, "data")
    files.write_json(path, files.read_json(path) | old)
    for refuse, *given in ((runs.check_out, config), (runs.results_folder, config, "data")):
        message = failure(refuse, *given, code=Exit.CHECKPOINT)
        assert "another version of this project; choose another --out" in message


# --- the best run -------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7])
def test_the_lowest_finite_validation_score_wins_in_any_order(order):
    good, better_on_test, unfinished = done(3.0, 0.8), done(4.0, 0.99), {"status": "unfinished"}
    every = good, better_on_test, done(math.nan), DIVERGED, unfinished
    rows = {seed: every[place] for seed, place in enumerate(order)}
    assert every[order[next(iter(results.ranks(rows)))]] == good


def test_results_are_strict_json_with_mean_and_sd(tmp_path):
    rows = {0: done(3.0, 0.8), 1: done(2.0, 0.9), 2: DIVERGED}
    results.write(tmp_path, rows)
    assert results.rows_in(tmp_path) == rows
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["best"] == "seed-1" and written["finished"]
    assert written["test_mean_sd"]["ssim"]["mean"] == pytest.approx(0.85)
    assert written["test_mean_sd"]["ssim"]["sd"] == pytest.approx(0.05 * 2**0.5)
    results.write(tmp_path, {0: done(3.0)})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["test_mean_sd"]["ssim"]["sd"] is None
    results.write(tmp_path, {0: done(3.0), 1: {"status": "unfinished"}}, range(2))
    assert not json.loads((tmp_path / "results.json").read_text())["finished"]


def test_if_every_run_failed_the_exit_is_6(tmp_path):
    results.write(tmp_path, {0: DIVERGED})
    failure(driver.conclude, tmp_path, "quick", code=Exit.DIVERGED)
    assert results.row_of(tmp_path, 0, 8)["status"] == "diverged"  # and is not tried again


def test_the_report_is_renewed_if_a_seed_ended_after_it(tmp_path, monkeypatch):
    made, page, log = [], tmp_path / "report.html", tmp_path / "seed-0" / "run.log"
    monkeypatch.setattr(driver.predict, "save_report", lambda *a: made.append(page.touch()))
    log.parent.mkdir()
    log.touch()
    for seconds, count in ((-9, 1), (-9, 1), (9, 2)):  # no page; a newer page; an older page
        if page.exists():
            when = page.stat().st_mtime_ns + seconds * 10**9
            os.utime(log, ns=(when, when))
        driver.publish(tmp_path, {0: done(3.0)}, range(1), None, QUICK)
        assert len(made) == count
