"""Which folder and seeds a command trains, and which run is chosen as the best."""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

import driver
from config import Config, Exit, UserError
from scores import results
from support import files, runs

QUICK = Config()


def done(score: float, ssim: float = 0.9) -> dict:
    return {"status": "done", "validation": {results.SCORE: score}, "test": {"ssim": ssim}}


def end(folder: Path, seed: int):
    """Leave a seed as a finished run does."""
    files.write_json(folder / f"seed-{seed}" / "metrics.json", {})


def begin(folder: Path, *seeds: int):
    """Leave seeds as stopped runs do."""
    for seed in seeds:
        (folder / f"seed-{seed}").mkdir()


# --- folders and seeds --------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_same_command_continues_an_unfinished_seed_and_then_adds_the_next(here):
    folder = Path("runs/quick")
    assert runs.results_folder(QUICK, "data") == (folder, range(1))
    assert runs.results_folder(QUICK, "data") == (folder, range(1))
    begin(folder, 0)
    assert runs.results_folder(QUICK, "data") == (folder, range(1))
    end(folder, 0)
    assert runs.results_folder(QUICK, "data") == (folder, range(1, 2))
    begin(folder, 1, 2)
    end(folder, 2)
    assert runs.results_folder(QUICK, "data") == (folder, range(1, 2))


def test_results_never_go_into_the_data_folder(here):
    for config in (Config(data="slices", out="slices/results"), Config(data=".")):
        with pytest.raises(UserError, match="give another --out") as problem:
            runs.check_out(config)
        assert problem.value.code == Exit.DATA
    runs.check_out(Config(data="slices", out="slices-results"))


def test_a_seed_that_diverged_is_not_tried_again(here):
    folder, _ = runs.results_folder(QUICK, "data")
    begin(folder, 0)
    results.write(folder, {0: {"status": "diverged", "why": "loss"}})
    assert runs.results_folder(QUICK, "data") == (folder, range(1, 2))


def test_seed_and_runs_fix_the_seeds(here):
    folder, _ = runs.results_folder(replace(QUICK, seed=5), "data", seed_given=True)
    begin(folder, 5)
    end(folder, 5)
    three, again = replace(QUICK, runs=3), replace(QUICK, runs=3, seed=5)
    assert runs.results_folder(three, "data", runs_given=True) == (folder, range(5, 8))
    assert runs.results_folder(again, "data", True, True) == (folder, range(5, 8))
    other = replace(QUICK, seed=9)
    assert runs.results_folder(other, "data", seed_given=True) == (folder, range(9, 10))


def test_with_out_the_seeds_are_those_of_the_first_command(here):
    config = replace(QUICK, out="mine", seed=4)
    assert runs.results_folder(config, "data", seed_given=True) == (Path("mine"), range(4, 5))
    begin(Path("mine"), 4)
    end(Path("mine"), 4)
    for count in (1, 2):
        config = replace(QUICK, out="mine", runs=count)
        assert runs.results_folder(config, "data", runs_given=count > 1) == (
            Path("mine"),
            range(4, 4 + count),
        )
    values = files.read_json(Path("mine/config.json"))
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
    for other, data, words in (
        (config, "other", r"data is 'data', expected 'other'"),
        (replace(config, lr=0.5, codes=9), "data", r"codes \(512 there, 9 here\).*lr \("),
    ):
        with pytest.raises(UserError, match=words) as problem:
            runs.results_folder(other, data)
        assert problem.value.code == Exit.CHECKPOINT
    assert Path("mine/config.json").read_bytes() == before


@pytest.mark.parametrize("old", [{"config": {"an_old_field": 1}}, {"format": 2}])
def test_a_folder_of_another_version_is_refused(here, old):
    config = replace(QUICK, out="mine")
    runs.results_folder(config, "data")
    values = files.read_json(Path("mine/config.json"))
    values |= {"config": values["config"] | old["config"]} if "config" in old else old
    files.write_json(Path("mine/config.json"), values)
    for refuse in (runs.check_out, lambda config: runs.results_folder(config, "data")):
        with pytest.raises(UserError, match=r"another version.*another --out") as problem:
            refuse(config)
        assert problem.value.code == Exit.CHECKPOINT


# --- the best run -------------------------------------------------------------------------

RUNS = {
    "good": done(3.0, 0.8),
    "better on test only": done(4.0, 0.99),
    "not a number": done(math.nan),
    "diverged": {"status": "diverged", "why": "loss"},
    "unfinished": {"status": "unfinished"},
}


@pytest.mark.parametrize("order", list(itertools.permutations(RUNS))[::7])
def test_the_lowest_finite_validation_score_wins_in_any_order(order):
    rows = {seed: RUNS[name] for seed, name in enumerate(order)}
    assert order[next(iter(results.ranks(rows)))] == "good"


def test_results_are_strict_json_with_mean_and_sd(tmp_path):
    rows = {0: done(3.0, 0.8), 1: done(2.0, 0.9), 2: {"status": "diverged", "why": "loss"}}
    results.write(tmp_path, rows)
    assert results.rows_in(tmp_path) == rows
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["best"] == "seed-1" and written["finished"]
    assert written["test_mean_sd"]["ssim"]["mean"] == pytest.approx(0.85)
    assert written["test_mean_sd"]["ssim"]["sd"] == pytest.approx(0.05 * 2**0.5)
    results.write(tmp_path, {0: done(3.0)})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["test_mean_sd"]["ssim"]["sd"] is None


def test_an_unfinished_seed_leaves_the_folder_unfinished(tmp_path):
    results.write(tmp_path, {0: done(3.0), 1: {"status": "unfinished"}}, range(2))
    assert not json.loads((tmp_path / "results.json").read_text())["finished"]


def test_if_every_run_failed_the_exit_is_6(tmp_path):
    results.write(tmp_path, {0: {"status": "diverged", "why": "loss"}})
    with pytest.raises(UserError) as problem:
        driver.conclude(tmp_path, "quick")
    assert problem.value.code == Exit.DIVERGED
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
