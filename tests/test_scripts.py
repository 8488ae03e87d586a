"""The scripts as a user meets them: real processes, exit codes, files, messages."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, script
from PIL import Image

import predict
import runtime
from config import Config, UserError
from dataset import PRIVATE

TRAINED = "vqvae", "decoder", "dcgan", "denoiser"  # stages that leave a network


def test_the_driver_writes_what_the_readme_lists(finished):
    where, done = finished
    results = json.loads((where / "out/results.json").read_text())
    assert results["best"] in ("seed-0", "seed-1") and results["finished"]
    assert [run["status"] for run in results["runs"]] == ["done", "done"]
    scores = {run["folder"]: run["validation"]["fd_validation"] for run in results["runs"]}
    assert results["best"] == min(scores, key=scores.get)
    for seed in ("seed-0", "seed-1"):
        names = {p.name for p in (where / "out" / seed).iterdir()}
        assert names >= {
            "config.json", "log.csv", "run.log", "metrics.json", "figures", "codes.npy",
            "codes.pt",
        }  # fmt: skip
        assert names >= {f"{name}_{end}.pt" for name in TRAINED for end in ("best", "last")}
        assert len(list((where / "out" / seed / "figures").glob("*.png"))) == 11
        maps = np.load(where / "out" / seed / "codes.npy", mmap_mode="r")
        assert maps.dtype == np.uint16 and maps.shape == (128, 64, 64)
    page = (where / "out/report.html").read_text(encoding="utf-8")
    assert 'id="generated"' in page and "mean (sd)" in page and PRIVATE in page
    assert [run["rank"] for run in results["runs"]] == [
        1 + (run["folder"] != results["best"]) for run in results["runs"]
    ]
    # The table, after each run.
    assert len(re.findall("^seed 0: done", done.stdout, re.M)) == 2
    assert len(re.findall("^seed 1: unfinished", done.stdout, re.M)) == 1
    assert "24 subjects" in done.stdout and "warning" not in done.stderr
    assert not [p for p in where.rglob("*") if "tmp" in p.name]


def test_the_same_command_ends_at_once_and_changes_nothing(finished, slices):
    where, _ = finished
    before = {p: p.stat().st_mtime_ns for p in where.rglob("*.pt")}
    again = script(
        "driver.py", "--data", slices, "--out", "out", "--runs", 2, *SMALL, cwd=where
    )
    assert again.returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in where.rglob("*.pt")}


def test_another_configuration_in_the_same_folder_is_refused(finished, slices):
    where, _ = finished
    options = [*SMALL, "--lr", "0.5"]
    other = script("driver.py", "--data", slices, "--out", "out", *options, cwd=where)
    assert other.returncode == 4 and "lr" in other.stderr and other.stderr.count("\n") == 1


def test_generate_writes_grey_slices_that_depend_on_seed_and_number_alone(finished):
    where, _ = finished
    for n, out in ((3, "a"), (35, "b")):
        done = script(
            "predict.py", "generate", "out", "--n", n, "--seed", 5, "--out", out, cwd=where
        )
        assert done.returncode == 0, done.stderr
    for number in range(3):
        name = f"{number:05d}.png"
        assert (where / "a" / name).read_bytes() == (where / "b" / name).read_bytes()
    image = cv2.imread(str(where / "b/00034.png"), cv2.IMREAD_UNCHANGED)
    assert image.shape == (256, 256) and image.dtype == np.uint8
    assert (where / "a/grid.png").exists()


def test_a_level_can_be_asked_for_and_swept(finished):
    where, _ = finished
    for level, out in (("0", "low"), ("1", "high"), ("sweep", "sweep")):
        options = ["--n", 4, "--level", level, "--out", out]
        done = script("predict.py", "generate", "out", *options, cwd=where)
        assert done.returncode == 0, done.stderr
    pictures = {
        out: [(where / out / f"{i:05d}.png").read_bytes() for i in range(4)]
        for out in ("low", "high", "sweep")
    }
    # One subject: its noise is that of sample 0, which the other two folders hold too.
    assert pictures["sweep"][0] == pictures["low"][0]
    assert pictures["sweep"][3] == pictures["high"][0]
    assert (where / "sweep/strip.png").exists() and (where / "sweep/walk.gif").exists()
    wrong = script("predict.py", "generate", "out", "--level", "1.5", cwd=where)
    assert wrong.returncode == 2 and "0 to 1" in wrong.stderr


def test_a_sweep_becomes_a_volume_and_a_run_an_export(finished):
    where, _ = finished
    options = ["--level", "sweep", "--volume", "--n", 3, "--out", "stack"]
    done = script("predict.py", "generate", "out", *options, cwd=where)
    assert done.returncode == 0 and "volume.nii.gz" in done.stdout, done.stderr
    assert nibabel.load(where / "stack/volume.nii.gz").shape == (256, 256, 3)
    for options, words in (
        (["generate", "out", "--volume"], "--level sweep"),
        (["generate", "out", "--volume", "--level", "sweep", "--n", 1], "at least 2"),
    ):
        wrong = script("predict.py", *options, cwd=where)
        assert wrong.returncode == 2 and words in wrong.stderr
    done = script("predict.py", "export", "out", "--out", "shared", cwd=where)
    assert done.returncode == 0 and PRIVATE in done.stdout, done.stderr
    done = script("predict.py", "generate", "shared", "--n", 1, "--out", "n", cwd=where)
    assert done.returncode == 0, done.stderr
    for command, code in (("evaluate", 2), ("export", 2)):
        options = ["--out", "again"] if command == "export" else []
        wrong = script("predict.py", command, "shared", *options, cwd=where)
        assert wrong.returncode == code and "is an export" in wrong.stderr, wrong.stderr


def test_what_is_drawn_depends_on_the_level(finished):
    # A few steps of training draw the same black slice from anything; random weights do not.
    where, _ = finished
    run = predict.load_run(where / "out/seed-0")
    draw = torch.Generator().manual_seed(0)
    for weight in run.generator.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw))
    low, high = (run.sample(3, level=level)[0] for level in (0.0, 1.0))
    assert not torch.equal(low, high) and not torch.equal(low[0], low[1])
    noise = run.noise(1)[0].expand(3, -1)
    swept = run.draw(noise, torch.tensor([0.0, 0.5, 1.0]))[0]
    assert torch.equal(swept[0], low[0]) and torch.equal(swept[2], high[0])


def test_the_readmes_lines_for_notebooks_run_as_they_stand(finished):
    where, _ = finished
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    said = re.search(r"# (\(.*?\)) indices, (\(.*?\)) in", block).groups()
    code = block.replace("runs/NAME", "out")
    assert code != block and "\n\n" in code and len(code.split("\n")) <= 6
    code += (
        "print(tuple(maps.shape), tuple(brains.shape), brains.min() >= 0, brains.max() <= 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=where, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split(" tensor")[0] == " ".join(said), done.stderr
    assert done.stdout.count("tensor(True)") == 2


def test_a_gif_goes_there_and_back(tmp_path):
    images = torch.linspace(0, 1, 5)[:, None, None, None].expand(-1, 1, 256, 256)
    predict.write_strip(tmp_path, images, list("abcde"), "")
    with Image.open(tmp_path / "walk.gif") as gif:
        assert gif.n_frames == 8 and gif.size == (256, 256)


def test_interpolation_walks_from_one_sample_to_the_next(finished):
    where, _ = finished
    options = ["--n", 5, "--level", 0.5, "--out", "walk"]
    done = script("predict.py", "interpolate", "out", *options, cwd=where)
    assert done.returncode == 0, done.stderr
    options = ["--n", 2, "--level", 0.5, "--out", "ends"]
    script("predict.py", "generate", "out", *options, cwd=where)
    for step, sample in ((0, 0), (4, 1)):
        walked = (where / f"walk/{step:05d}.png").read_bytes()
        assert walked == (where / f"ends/{sample:05d}.png").read_bytes()
    assert (where / "walk/walk.gif").exists()
    too_few = script("predict.py", "interpolate", "out", "--n", 1, cwd=where)
    assert too_few.returncode == 2 and "at least 2" in too_few.stderr


def test_reconstruct_takes_any_folder(finished, slices):
    where, _ = finished
    data = slices / "keras_png_slices_test"
    done = script("predict.py", "reconstruct", "out", "--data", data, "--out", "r", cwd=where)
    assert done.returncode == 0, done.stderr
    assert len(list((where / "r").glob("0*.png"))) == 16 and "SSIM" in done.stdout
    one = next(data.glob("*.png"))
    done = script("predict.py", "reconstruct", "out", "--data", one, "--out", "1", cwd=where)
    assert done.returncode == 0 and "SSIM" in done.stdout and "nan" not in done.stdout
    assert len(list((where / "1").glob("0*.png"))) == 1


def test_evaluate_repeats_the_scores_and_renews_the_table_of_runs(finished):
    where, _ = finished
    path, table = where / "out/seed-0/metrics.json", where / "out/results.json"
    before, runs = json.loads(path.read_text()), json.loads(table.read_text())
    (where / "out/seed-0/figures/.a.tmp1").touch()  # of a killed process
    others = [where / ".b.tmp1", where / "out/cache/.c.tmp1"]  # in use, for all we know
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.touch()
    # As a kill leaves it between a seed's scores and the table: another one is the best.
    killed = [{**row, "rank": None, "status": "unfinished"} for row in runs["runs"][:1]]
    worse = {**runs, "best": "seed-1", "runs": killed + runs["runs"][1:]}
    table.write_text(json.dumps(worse))
    done = script("predict.py", "evaluate", ".", cwd=where / "out/seed-0")
    assert done.returncode == 0, done.stderr
    after = json.loads(path.read_text())
    for values in (before, after):
        del values["peak_memory_mb"]
    assert before == after
    assert json.loads(table.read_text()) == runs
    assert not list(where.glob("out/seed-0/**/.*.tmp*")) and all(o.exists() for o in others)


def test_a_seeds_folder_by_itself_is_scored_and_leaves_its_neighbours_alone(finished, tmp_path):
    where, _ = finished
    shutil.copytree(where / "out/seed-0", tmp_path / "seed-0")
    (tmp_path / ".mine.tmp").touch()
    done = script(
        "predict.py", "evaluate", "seed-0", "--cache", where / "runs/cache", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"seed-0", ".mine.tmp"}


def test_a_moved_folder_still_generates(finished):
    where, _ = finished
    (where / "moved").mkdir()
    os.rename(where / "out", where / "moved/elsewhere")
    try:
        done = script("predict.py", "generate", "moved/elsewhere", "--n", 1, cwd=where)
        assert done.returncode == 0, done.stderr
    finally:
        os.rename(where / "moved/elsewhere", where / "out")


@pytest.mark.parametrize(
    "name",
    ["config.json", "codes.pt", *(f"{name}_best.pt" for name in TRAINED)],
)
def test_predict_refuses_a_damaged_file_and_names_it(finished, name):
    where, _ = finished
    path = where / "out/seed-0" / name
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    try:
        done = script("predict.py", "generate", "out/seed-0", "--n", 1, "--out", "x", cwd=where)
        assert done.returncode == 4 and name in done.stderr and done.stderr.count("\n") == 1
        assert not (where / "x").exists()
    finally:
        path.write_bytes(good)


def test_a_malicious_checkpoint_runs_nothing(finished):
    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    where, _ = finished
    marker, path = where / "marker", where / "out/seed-0/dcgan_best.pt"
    good = path.read_bytes()
    torch.save({"format": 1, "stage": "dcgan", "bomb": Bomb()}, path)
    try:
        done = script("predict.py", "generate", "out/seed-0", "--n", 1, cwd=where)
        assert done.returncode == 4 and not marker.exists()
    finally:
        path.write_bytes(good)


def test_a_killed_run_continues_to_the_same_brains(finished, slices):
    where, _ = finished
    command = [
        sys.executable,
        str(ROOT / "driver.py"),
        "--data",
        str(slices),
        "--out",
        "killed",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for signum, code in ((15, 143), (2, 130), (9, -9)):
        running = subprocess.Popen(
            [*command, *SMALL], cwd=where, env=env, stderr=subprocess.PIPE, text=True
        )
        log = where / "killed/seed-0/log.csv"
        rows = len(log.read_text().splitlines()) if log.exists() else 0
        for _ in range(600):
            if log.exists() and len(log.read_text().splitlines()) > rows + 1:
                break
            time.sleep(0.05)
        running.send_signal(signum)
        _, error = running.communicate(timeout=60)
        assert running.returncode == code, error
        assert signum == 9 or "To continue: python" in error
    done = script("driver.py", "--data", slices, "--out", "killed", *SMALL, cwd=where)
    assert done.returncode == 0, done.stderr
    a, b = (np.load(where / folder / "seed-0/codes.npy") for folder in ("out", "killed"))
    assert (a == b).all()
    scores = [
        json.loads((where / folder / "seed-0/metrics.json").read_text())["generation"]
        for folder in ("out", "killed")
    ]
    assert scores[0] == scores[1]


def test_stages_by_hand_without_out_continue_the_newest_folder(slices, tmp_path):
    options = ["--data", slices, *SMALL]
    early = script("train.py", "--stage", "dcgan", *options, cwd=tmp_path)
    assert early.returncode == 4 and "codes.pt" in early.stderr
    for stage in ("vqvae", "codes", "decoder", "dcgan", "denoiser"):
        done = script("train.py", "--stage", stage, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    folders = [p for p in (tmp_path / "runs").iterdir() if p.name != "cache"]
    assert len(folders) == 1
    whole = script("driver.py", *options, cwd=tmp_path)
    assert whole.returncode == 0 and "continuing" in whole.stdout
    again = script("driver.py", *options, cwd=tmp_path)  # "rerun and pick the best" by hand
    assert again.returncode == 0, again.stderr
    folders = sorted(p for p in (tmp_path / "runs").iterdir() if p.name != "cache")
    assert len(folders) == 2 and (folders[1] / "seed-1/metrics.json").exists()


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["driver.py", "train.py", "predict.py", "benchmarks/ablate.py", "benchmarks/soak.py"],
)
def test_help_is_there_at_once(name, tmp_path):
    start = time.monotonic()
    done = script(name, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage" in done.stdout
    assert time.monotonic() - start < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "nan"], ["lr", "allowed"]),
        (["--batch-size", "-1"], ["batch", "allowed"]),
        (["--codes", "1"], ["codes", "allowed"]),
        (["--preset", "huge"], ["quick", "classic"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--device", "cuda"], ["cuda", "cpu"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
    ],
)
def test_bad_options_are_exit_2_with_one_line(options, words, tmp_path):
    done = script("driver.py", *options, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in ["error: ", *words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", ["missing", "empty", "file.txt", "labels"])
def test_unusable_data_are_exit_3_and_leave_no_run_folder(data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels/seg").mkdir(parents=True)
    (tmp_path / "labels/seg/seg_001_slice_0.nii.png").write_bytes(b"")
    (tmp_path / "file.txt").write_text("not a slice")
    done = script("driver.py", "--data", data, cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert "accepted are folders" in done.stderr and not (tmp_path / "runs").exists()


def test_a_folder_of_something_else_is_exit_5(slices, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    done = script("driver.py", "--data", slices, "--out", "other", *SMALL, cwd=tmp_path)
    assert done.returncode == 5 and "other files" in done.stderr
    assert not (tmp_path / "runs").exists()  # nothing was decoded for it


def test_the_cache_may_lie_in_the_folder_of_results(tmp_path):
    config = Config(out=str(tmp_path / "a"), cache=str(tmp_path / "a/b/cache"))
    (tmp_path / "a/b/cache").mkdir(parents=True)  # as a start leaves it that ended there
    runtime.check_out(config)
    runtime.results_folder(config, "data", False)
    with pytest.raises(UserError, match="other files"):
        runtime.check_out(replace(config, out=str(tmp_path / "a/b/cache/.."), cache="x"))


def test_no_terminal_no_display_and_plain_ascii(slices, tmp_path):
    done = script(
        "driver.py", "--data", slices, "--out", "ergebnis-ä", *SMALL, cwd=tmp_path,
        LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0", MPLBACKEND="TkAgg", DISPLAY="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_pictures_of_two_commands_do_not_mix(finished, tmp_path):
    """Without --out each call has a folder of its own; contact sheets are no slices."""
    where, _ = finished
    seed = where / "out" / "seed-0"
    for n in (5, 2):
        done = script("predict.py", "generate", "out/seed-0", "--n", n, cwd=where)
        assert done.returncode == 0, done.stderr
    folders = sorted(seed.glob("generated*"), key=lambda p: p.stat().st_mtime)[-2:]
    assert [len(list(p.glob("0*.png"))) for p in folders] == [5, 2]
    names = ["reconstruct", "out/seed-0", "--data", folders[1], "--out", tmp_path / "back"]
    done = script("predict.py", *names, cwd=where)
    assert done.returncode == 0 and "2 slices and grid.png" in done.stdout, done


def test_a_folder_of_another_run_is_refused_before_data_are_made(finished):
    where, _ = finished
    options = ["--subjects", 3, 2, 2, "--cache", "elsewhere"]
    for out, words in (("out", "holds another run"), ("out/seed-0", "folder of one seed")):
        done = script("driver.py", "--out", out, *options, cwd=where)
        assert done.returncode == 4 and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (where / "elsewhere").exists()


def test_a_stage_without_the_one_before_says_which(slices, tmp_path):
    needs = {"codes": "vqvae", "decoder": "codes", "dcgan": "codes", "denoiser": "codes"}
    for stage, before in needs.items():
        options = ["--stage", stage, "--data", slices, "--out", "out", *SMALL]
        done = script("train.py", *options, cwd=tmp_path)
        assert done.returncode == 4 and f"run --stage {before} first" in done.stderr, (
            done.stderr
        )


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="not on this processor")
def test_scripts_take_what_is_nearly_nothing_for_nothing():
    """On all threads. Below 1e-38 a processor counts slowly; the control is outside of them."""
    count = "(torch.full((10**6,), 1e-30) * 1e-10).count_nonzero().item()"
    script = f"import torch, runtime; count = lambda: print({count}); runtime.run_script(count)"
    for code, found in ((script, "0"), (f"import torch; print({count})", "1000000")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout.strip()) == (0, found), done.stderr
