"""The scripts as a user runs them: command line, exit codes, files, messages."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import cv2
import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, called, parsed_by, script

import predict
from config import PRESETS, Config, UserError
from dataset import PRIVATE
from scores import figures
from support import runs
from support.cli import FIELDS, config_from, flags

TRAINED = "vqvae", "decoder", "dcgan", "denoiser"  # stages that leave a network
MAIN = "driver.py", "train.py", "predict.py"


# --- the command line ---------------------------------------------------------------------


def config_of(*words) -> Config:
    return config_from(parsed_by("driver.py", words))


def test_presets_are_valid_and_differ_from_the_default():
    default = Config()
    for name, changes in PRESETS.items():
        made = Config(preset=name, **changes)
        assert all(getattr(default, k) != v for k, v in changes.items()), name
        assert Config.from_dict(made.to_dict()) == made == config_of("--preset", name)


def test_only_paths_device_seeds_and_what_follows_training_are_outside_the_identity():
    """So a new field of `Config` makes another run, unless it is added to this list."""
    outside = {f.name for f in fields(Config)} - set(Config().identity())
    assert outside == {
        "preset", "data", "out", "cache", "device", "threads", "seed", "runs", "samples",
    }  # fmt: skip


def other_value(f):
    """Another valid value of a field."""

    def other(value):
        if isinstance(value, bool):
            return not value
        if f.name == "preset":
            return "smoke"
        if choices := f.metadata["choices"]:
            return next(choice for choice in choices if choice != value)
        if isinstance(value, str):
            return "-a b,c=ä"
        number = value + (1 if isinstance(value, int) else 0.125)
        return number if number <= f.metadata["high"] else f.metadata["low"]

    value = f.default
    return tuple(map(other, value)) if isinstance(value, tuple) else other(value)


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda f: f.name)
def test_the_printed_flags_make_the_same_config_again(field):
    config = replace(Config(), **{field.name: other_value(field)})
    if field.name == "preset":
        config = replace(config, **PRESETS["smoke"])
    words = flags(config)
    assert config_of(*words) == config != Config()
    assert flags(Config()) == [] and len(words) >= 1


def test_flags_override_the_preset_and_set_takes_several_numbers():
    config = config_of(
        "--preset", "classic", "--set", "decoder_widths=48,24", "--set", "recipe=improved",
        "--set", "warm_up=0.5", "--lr", "0.25", "--gan-lr", "1e-4", "2e-4",
    )  # fmt: skip
    assert config.decoder_widths == (48, 24) and config.gan_lr == (1e-4, 2e-4)
    assert not config.original and config.lr == 0.25 and config.warm_up == 0.5
    rest = PRESETS["classic"] | {"recipe": "improved", "lr": 0.25, "gan_lr": (1e-4, 2e-4)}
    rest |= {"preset": "classic", "decoder_widths": (48, 24), "warm_up": 0.5}
    assert config == replace(Config(), **rest)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "nan"], ["lr", "allowed"]),
        (["--set", "runs=3"], ["runs", "flag of its own, --runs"]),
        (["--batch-size", "-1"], ["batch", "allowed", "65536"]),
        (["--codes", "1"], ["codes", "allowed"]),
        (["--codes", "1.5"], ["'1.5' is not int"]),
        (["--preset", "huge"], ["quick", "classic"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--batch", "8"], ["--batch"]),  # no abbreviations
        (["--widths", "4", "4"], ["--widths"]),
        (["--set", "speed=3"], ["'speed' is no field", "config.py"]),
        (["--set", "warm_up"], ["not float"]),
        (["--set", "warm_up=2"], ["warm_up", "allowed are 0 to 1"]),
        (["--set", "warm_up=inf"], ["warm_up", "allowed"]),
        (["--set", "recipe=best"], ["recipe", "improved, original"]),
        (["--set", "decoder_widths=32"], ["decoder_widths", "expected 2 numbers"]),
        (["--set", "decoder_widths=32,x"], ["'32,x' is not int"]),
        (["--set", "noise_dim=1,2"], ["'1,2' is not int"]),
        (["--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
    ],
)
def test_bad_options_are_exit_2_with_one_line(options, words, tmp_path):
    done = called("driver.py", *options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in ["error: ", *words]), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*MAIN, "benchmarks/soak.py"])
def test_help_needs_no_torch(name, tmp_path):
    code = (
        "import runpy, sys; path = sys.argv[1]; sys.argv = [path, '--help']\n"
        "try: runpy.run_path(path, run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "print('heavy:', sorted({'torch', 'numpy', 'cv2'} & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / name)], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str((ROOT / name).parent)},
    )  # fmt: skip
    assert "usage" in done.stdout and "heavy: [] 0" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
    if name == "driver.py":
        found = set(re.findall(r"^ +(--[a-z][a-z-]*)", done.stdout, re.M))
        shown = found - {"--help", "--version"}
        assert len(shown) <= 33, shown
        unseen = [f.name for f in FIELDS.values() if f.name not in done.stdout]
        assert [name for name in unseen if "--" + name.replace("_", "-") not in shown] == []


# --- what a run leaves --------------------------------------------------------------------


def test_the_driver_writes_what_the_readme_lists(finished):
    where, done = finished
    results = json.loads((where / "out/results.json").read_text())
    assert results["best"] in ("seed-0", "seed-1") and results["finished"]
    assert [run["status"] for run in results["runs"]] == ["done", "done"]
    scores = {run["folder"]: run["validation"]["fd_validation"] for run in results["runs"]}
    assert results["best"] == min(scores, key=scores.get)
    ranks = [1 + (run["folder"] != results["best"]) for run in results["runs"]]
    assert [run["rank"] for run in results["runs"]] == ranks
    for seed in ("seed-0", "seed-1"):
        names = {p.name for p in (where / "out" / seed).iterdir()}
        assert names >= {
            "config.json", "log.csv", "run.log", "metrics.json", "figures", "codes.npy",
            "codes.pt", *(f"{name}_{end}.pt" for name in TRAINED for end in ("best", "last")),
        }  # fmt: skip
        assert len(list((where / "out" / seed / "figures").glob("*.png"))) >= 8
        maps = np.load(where / "out" / seed / "codes.npy", mmap_mode="r")
        assert maps.dtype == np.uint16 and maps.shape == (128, 64, 64)
    assert cv2.imread(str(where / "out/decoded.png")).shape[1] > 8 * 256
    page = (where / "out/report.html").read_text(encoding="utf-8")
    assert 'id="generated"' in page and "mean (sd)" in page and PRIVATE in page
    assert len(re.findall("^seed 0: done", done.stdout, re.M)) == 2  # after each run
    assert len(re.findall("^seed 1: unfinished", done.stdout, re.M)) == 1
    assert "24 subjects" in done.stdout
    assert done.stderr.count("warning") == done.stderr.count("nearly alike")  # after ten steps
    assert not [p for p in where.rglob("*") if "tmp" in p.name]


def test_the_same_command_ends_at_once_and_changes_nothing(finished, slices):
    where, _ = finished
    before = {p: p.stat().st_mtime_ns for p in where.rglob("*.pt")}
    options = ["--data", slices, "--out", "out", "--runs", 2, *SMALL]
    assert called("driver.py", *options, cwd=where).returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in where.rglob("*.pt")}


def test_another_run_in_the_same_folder_is_refused_before_data_are_made(finished, slices):
    where, _ = finished
    other = called(
        "driver.py", "--data", slices, "--out", "out", *SMALL, "--lr", "0.5", cwd=where
    )
    assert other.returncode == 4 and "lr" in other.stderr and other.stderr.count("\n") == 1
    options = ["--subjects", 3, 2, 2, "--cache", "elsewhere"]
    for out, words in (("out", "holds another run"), ("out/seed-0", "folder of one seed")):
        done = called("driver.py", "--out", out, *options, cwd=where)
        assert done.returncode == 4 and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (where / "elsewhere").exists()


def without_terminal(name, *arguments, cwd):
    """No terminal, no display, an ASCII locale, and a backend that needs a display."""
    return script(
        name, *arguments, cwd=cwd, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0",
        MPLBACKEND="TkAgg", DISPLAY="",
    )  # fmt: skip


@pytest.mark.slow
def test_evaluate_repeats_the_scores_and_renews_the_table_of_runs(finished, slices):
    """Without a terminal, a display or UTF-8."""
    where, _ = finished
    path, table = where / "out/seed-0/metrics.json", where / "out/results.json"
    before, runs = json.loads(path.read_text()), json.loads(table.read_text())
    (where / "out/seed-0/figures/.a.tmp1").touch()  # of a killed process
    others = [where / ".b.tmp1", where / "out/cache/.c.tmp1"]  # may be in use
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.touch()
    # As a kill leaves it between a seed's scores and the table: another one is the best.
    killed = [{**row, "rank": None, "status": "unfinished"} for row in runs["runs"][:1]]
    worse = {**runs, "best": "seed-1", "runs": killed + runs["runs"][1:]}
    table.write_text(json.dumps(worse))
    options = ["evaluate", ".", "--data", slices]  # ASCII cannot spell the saved path
    done = without_terminal("predict.py", *options, cwd=where / "out/seed-0")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    after = json.loads(path.read_text())
    for values in (before, after):
        values.pop("peak_memory_mb", None)
    assert before == after
    assert json.loads(table.read_text()) == runs
    assert not list(where.glob("out/seed-0/**/.*.tmp*")) and all(o.exists() for o in others)
    for other in others:
        other.unlink()


@pytest.mark.slow
def test_the_folder_of_a_seed_by_itself_is_scored_and_its_neighbours_stay(finished, tmp_path):
    where, _ = finished
    shutil.copytree(where / "out/seed-0", tmp_path / "seed-0")
    (tmp_path / ".mine.tmp").touch()
    cache = where / "runs/cache"
    done = called("predict.py", "evaluate", "seed-0", "--cache", cache, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"seed-0", ".mine.tmp"}


# --- the commands of the pages ------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    """The words of every `python NAME.py ...` line in the code blocks of a page."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.S | re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"python (\w+\.py)( .*)?$", line.partition(" #")[0]) for line in lines]
    return [shlex.split(hit.group().replace("$", "")) for hit in found if hit]


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = [words[1:] for path in PAGES for words in commands(path.read_text("utf-8"))]
PREDICT = [words for words in COMMANDS if words[0] == "predict.py"]


def test_the_pages_show_the_commands_of_each_script():
    assert {words[0] for words in COMMANDS} >= {"driver.py", "predict.py"}
    shown = {words[1] for words in PREDICT}
    assert shown >= {"generate", "interpolate", "reconstruct", "evaluate", "export"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_of_the_pages_are_valid(words, monkeypatch):
    if words[0] not in MAIN:
        assert (ROOT / words[0]).exists()
    elif words[0] == "predict.py":
        monkeypatch.setattr(sys, "argv", words)
        predict.parse()
    else:
        words = [w if w != "SLURM_ARRAY_TASK_ID" else "3" for w in words]
        config_from(parsed_by(words[0], words[1:]))


@pytest.mark.parametrize(
    "words", [words for words in PREDICT if words[1] != "evaluate"], ids=" ".join
)
def test_the_predict_commands_of_the_pages_run_as_they_stand(words, finished, slices, tmp_path):
    """RUN is a results folder, DIR a new one; the user's data and runs are stand-ins here."""
    where, _ = finished
    (tmp_path / "scans").symlink_to(slices / "keras_png_slices_test")
    for at, word in enumerate(words[2:], 2):
        if words[at - 1] == "--data":
            words[at] = "scans"
        elif word == "RUN" or (at == 2 and word.startswith("runs/")):
            words[at] = str(where / "out")
        elif word == "pretrained":
            words[at] = str(ROOT / word)
        elif word.endswith("_DIR"):
            parts = {"REAL_DIR": "train", "FAKE_DIR": "test", "UNSEEN_DIR": "validate"}
            part = parts[word]
            words[at] = str(slices / f"keras_png_slices_{part}")
    if "--out" not in words:
        words = [*words, "--out", "new"]
    if "--n" in words:
        words[words.index("--n") + 1] = "5"
    done = called(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_lines_for_notebooks_run_as_they_stand(finished):
    where, _ = finished
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    said = re.search(r"# (\(.*?\)) indices, (\(.*?\)) in", block).groups()
    code = re.sub(r'"runs/\w+"', '"out"', block)
    assert code != block and len(code.split("\n")) <= 6
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        exec(code, names)
    maps, brains = names["maps"], names["brains"]
    assert (str(tuple(maps.shape)), str(tuple(brains.shape))) == said
    assert brains.min() >= 0 and brains.max() <= 1


# --- predict ------------------------------------------------------------------------------


def ran(where, *words):
    """`predict.py` with these words, which must succeed; returns what it printed."""
    done = called("predict.py", *words, cwd=where)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generated_slices_are_grey_and_depend_only_on_seed_and_number(finished):
    where, _ = finished
    for n, out in ((3, "a"), (35, "b")):
        ran(where, "generate", "out", "--n", n, "--seed", 5, "--out", out)
    for number in range(3):
        name = f"{number:05d}.png"
        assert (where / "a" / name).read_bytes() == (where / "b" / name).read_bytes()
    image = cv2.imread(str(where / "b/00034.png"), cv2.IMREAD_UNCHANGED)
    assert image.shape == (256, 256) and image.dtype == np.uint8
    assert (where / "a/grid.png").exists()


def test_a_level_can_be_given_and_swept_and_a_sweep_is_a_volume(finished):
    where, _ = finished
    for level, out in (("0", "low"), ("1", "high"), ("sweep", "sweep")):
        options = ["--volume"] if level == "sweep" else []
        said = ran(where, "generate", "out", "--n", 4, "--level", level, "--out", out, *options)
    assert "volume.nii.gz" in said
    assert nibabel.load(where / "sweep/volume.nii.gz").shape == (256, 256, 4)
    pictures = {
        out: [(where / out / f"{i:05d}.png").read_bytes() for i in range(4)]
        for out in ("low", "high", "sweep")
    }
    # All of a sweep is sample 0, which the other two folders hold too.
    assert pictures["sweep"][0] == pictures["low"][0]
    assert pictures["sweep"][3] == pictures["high"][0]
    assert (where / "sweep/strip.png").exists() and (where / "sweep/walk.gif").exists()
    for options, words in (
        (["--level", "1.5"], "0 to 1"), (["--volume"], "--level sweep"),
        (["--volume", "--level", "sweep", "--n", 1], "at least 2"),
    ):  # fmt: skip
        wrong = called("predict.py", "generate", "out", *options, cwd=where)
        assert wrong.returncode == 2 and words in wrong.stderr


def test_an_export_draws_samples_and_has_no_scores(finished):
    where, _ = finished
    assert PRIVATE in ran(where, "export", "out", "--out", "shared")
    ran(where, "generate", "shared", "--n", 2, "--out", "of-shared")
    assert (where / "of-shared/00001.png").exists()
    for command in (["evaluate", "shared"], ["export", "shared", "--out", "again"]):
        wrong = called("predict.py", *command, cwd=where)
        assert wrong.returncode == 2 and "is an export" in wrong.stderr, wrong.stderr


def test_samples_depend_on_the_level(finished):
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


def test_interpolation_goes_from_one_sample_to_the_next(finished):
    where, _ = finished
    ran(where, "interpolate", "out", "--n", 5, "--out", "walk")
    ran(where, "generate", "out", "--n", 1, "--out", "start")
    starts = [(where / folder / "00000.png").read_bytes() for folder in ("walk", "start")]
    assert starts[0] == starts[1] and (where / "walk/walk.gif").exists()
    run = predict.load_run(where / "out")
    walked, ends = run.walk(5, level=0.5)[1], run.sample(2, level=0.5)[1]
    ways = [figures.as_bytes(images.numpy()) for images in (walked[[0, 4]], ends)]
    assert np.array_equal(*ways)
    too_few = called("predict.py", "interpolate", "out", "--n", 1, cwd=where)
    assert too_few.returncode == 2 and "at least 2" in too_few.stderr


def test_reconstruct_takes_a_folder_and_a_file(finished, slices):
    where, _ = finished
    data = slices / "keras_png_slices_test"
    for path, out, count in ((data, "r", 16), (next(data.glob("*.png")), "1", 1)):
        said = ran(where, "reconstruct", "out", "--data", path, "--out", out)
        assert len(list((where / out).glob("0*.png"))) == count
        assert "SSIM" in said and "nan" not in said


def test_pictures_of_two_commands_do_not_mix(finished, tmp_path):
    """Without --out each call makes a new folder; contact sheets are no slices."""
    where, _ = finished
    seed = where / "out" / "seed-0"
    for n in (5, 2):
        ran(where, "generate", "out/seed-0", "--n", n)
    folders = sorted(seed.glob("generated*"), key=lambda p: p.stat().st_mtime)[-2:]
    assert [len(list(p.glob("0*.png"))) for p in folders] == [5, 2]
    names = ["reconstruct", "out/seed-0", "--data", folders[1], "--out", tmp_path / "back"]
    assert "2 slices and grid.png" in ran(where, *names)


def test_a_moved_folder_still_generates(finished):
    where, _ = finished
    (where / "moved").mkdir()
    os.rename(where / "out", where / "moved/elsewhere")
    try:
        ran(where, "generate", "moved/elsewhere", "--n", 1, "--out", "m")
    finally:
        os.rename(where / "moved/elsewhere", where / "out")


@pytest.mark.parametrize(
    "name", ["config.json", "codes.pt", *(f"{name}_best.pt" for name in TRAINED)]
)
def test_predict_refuses_a_damaged_file_and_names_it(finished, name):
    where, _ = finished
    path = where / "out/seed-0" / name
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    try:
        options = ["generate", "out/seed-0", "--n", 1, "--out", "x"]
        done = called("predict.py", *options, cwd=where)
        assert done.returncode == 4 and name in done.stderr and done.stderr.count("\n") == 1
        assert not (where / "x").exists()
    finally:
        path.write_bytes(good)


# --- stopping and continuing --------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_brains(finished, slices):
    where, _ = finished
    command = [sys.executable, ROOT / "driver.py", "--data", slices, "--out", "killed", *SMALL]
    log, env = where / "killed/seed-0/log.csv", {**os.environ, "OMP_NUM_THREADS": "1"}

    def rows():
        return len(log.read_text().splitlines()) if log.exists() else 0

    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = rows()
        running = subprocess.Popen(
            list(map(str, command)), cwd=where, env=env, stderr=subprocess.PIPE, text=True
        )
        for _ in range(1200):
            if rows() > before + 1:
                break
            time.sleep(0.05)
        running.send_signal(signum)
        _, error = running.communicate(timeout=60)
        assert running.returncode == code, error
        assert code == -9 or "To continue: python" in error
    done = script("driver.py", "--data", slices, "--out", "killed", *SMALL, cwd=where)
    assert done.returncode == 0, done.stderr
    a, b = (np.load(where / folder / "seed-0/codes.npy") for folder in ("out", "killed"))
    assert (a == b).all()
    scores = [
        json.loads((where / folder / "seed-0/metrics.json").read_text())["generation"]
        for folder in ("out", "killed")
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_without_out_stages_and_driver_continue_and_then_add_a_seed(slices, tmp_path):
    options = ["--data", slices, *SMALL]
    early = called("train.py", "--stage", "dcgan", *options, cwd=tmp_path)
    assert early.returncode == 4 and "codes.pt" in early.stderr
    for stage in ("vqvae", "codes", "decoder", "dcgan", "denoiser"):
        done = called("train.py", "--stage", stage, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    first = called("driver.py", *options, cwd=tmp_path)
    assert first.returncode == 0 and "continuing seed 0" in first.stdout, first.stderr
    again = called("driver.py", *options, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"quick", "cache"}
    assert (tmp_path / "runs/quick/seed-1/metrics.json").exists()
    results = json.loads((tmp_path / "runs/quick/results.json").read_text())
    assert len(results["runs"]) == 2 and results["finished"]
    other = called("train.py", "--stage", "vqvae", *options, "--lr", "0.001", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    names = {p.name for p in (tmp_path / "runs").iterdir()} - {"quick", "cache"}
    assert len(names) == 1 and re.fullmatch("quick-[0-9a-f]{6}", *names)


def test_a_stage_without_the_one_before_says_which(slices, tmp_path):
    needs = {"codes": "vqvae", "decoder": "codes", "dcgan": "codes", "denoiser": "codes"}
    for stage, before in needs.items():
        options = ["--stage", stage, "--data", slices, "--out", "out", *SMALL]
        done = called("train.py", *options, cwd=tmp_path)
        assert done.returncode == 4 and f"run --stage {before} first" in done.stderr, (
            done.stderr
        )


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["missing", "empty", "file.txt", "labels"])
def test_unusable_data_are_exit_3_and_leave_no_run_folder(data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels/seg").mkdir(parents=True)
    (tmp_path / "labels/seg/seg_001_slice_0.nii.png").write_bytes(b"")
    (tmp_path / "file.txt").write_text("not a slice")
    done = called("driver.py", "--data", data, cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert data in done.stderr and not (tmp_path / "runs").exists()
    assert ("accepted are folders" in done.stderr) == (data != "missing")


def test_a_folder_of_something_else_is_exit_5(slices, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    done = called("driver.py", "--data", slices, "--out", "other", *SMALL, cwd=tmp_path)
    assert done.returncode == 5 and "other files" in done.stderr
    assert not (tmp_path / "runs").exists()  # nothing was decoded for it


def test_the_cache_may_lie_in_the_folder_of_results(tmp_path):
    config = Config(out=str(tmp_path / "a"), cache=str(tmp_path / "a/b/cache"))
    (tmp_path / "a/b/cache").mkdir(parents=True)  # as an interrupted start leaves it
    runs.check_out(config)
    runs.results_folder(config, "data", False)
    with pytest.raises(UserError, match="other files"):
        runs.check_out(replace(config, out=str(tmp_path / "a/b/cache/.."), cache="x"))


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="not on this processor")
@pytest.mark.parametrize(("call", "left"), [("count()", 10**6), ("run_script(count)", 0)])
def test_scripts_round_denormal_numbers_to_zero_on_all_threads(call, left):
    """Below 1e-38 a processor is slow. The first call is the control, in its own process."""
    code = (
        "import torch; from support.endings import run_script\n"
        "count = lambda: print((torch.full((10**6,), 1e-30) * 1e-10).count_nonzero().item())\n"
        f"{call}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split()) == (0, [str(left)]), done.stderr
