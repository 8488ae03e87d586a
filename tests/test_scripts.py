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
from test_dataset import failure

import predict
from config import PRESETS, Config, Exit
from dataset import PRIVATE
from support import runs
from support.cli import FIELDS, config_from, flag_of, flags

TRAINED = "vqvae", "decoder", "dcgan", "denoiser"  # stages that leave a network
MAIN = "driver.py", "train.py", "predict.py"


@pytest.fixture
def where(finished):
    """The folder of the finished run, `out`."""
    return finished[0]


# --- the command line ---------------------------------------------------------------------


def config_of(*words) -> Config:
    return config_from(parsed_by("driver.py", words))


def test_presets_are_valid_and_differ_from_the_default():
    default = Config()
    for name, changes in PRESETS.items():
        made = Config(preset=name, **changes)
        assert all(getattr(default, k) != v for k, v in changes.items()), name
        assert Config.from_dict(made.to_dict()) == made == config_of("--preset", name)
        assert flags(made) == (["--preset", name] if name != default.preset else [])


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
        if choices := f.metadata["choices"]:
            return next(choice for choice in choices if choice != value)
        if isinstance(value, str):
            return "-a b,c=ä"
        number = value + (1 if isinstance(value, int) else 0.125)
        return number if number <= f.metadata["high"] else f.metadata["low"]

    value = f.default
    return tuple(map(other, value)) if isinstance(value, tuple) else other(value)


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "preset"])
def test_the_printed_flags_make_the_same_config_again(name):
    config = replace(Config(), **{name: other_value(FIELDS[name])})
    assert config_of(*flags(config)) == config != Config()


def test_flags_override_the_preset_and_set_takes_several_numbers():
    config = config_of(
        "--preset", "classic", "--set", "decoder_widths=48,24", "--set", "recipe=improved",
        "--set", "warm_up=0.5", "--lr", "0.25", "--gan-lr", "1e-4", "2e-4",
    )  # fmt: skip
    rest = PRESETS["classic"] | {"recipe": "improved", "lr": 0.25, "gan_lr": (1e-4, 2e-4)}
    rest |= {"preset": "classic", "decoder_widths": (48, 24), "warm_up": 0.5}
    assert config == replace(Config(), **rest)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "nan"], ["lr", "allowed"]),
        (["--set", "runs=3"], ["runs", "flag of its own, --runs"]),
        (["--batch-size", "-1"], ["batch", "allowed", "65536"]),
        (["--codes", "1.5"], ["'1.5' is not int"]),
        (["--preset", "huge"], ["quick", "classic"]),
        (["--batch", "8"], ["--batch"]),  # no abbreviations
        (["--widths", "4", "4"], ["--widths"]),
        (["--set", "speed=3"], ["'speed' is no field", "config.py"]),
        (["--set", "warm_up"], ["not float"]),
        (["--set", "warm_up=2"], ["warm_up", "allowed are 0 to 1"]),
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
        shown = set(re.findall(r"^ +(--[a-z][a-z-]*)", done.stdout, re.M))
        assert len(shown - {"--help", "--version"}) <= 33, shown
        unseen = [f for f in FIELDS.values() if f.name not in done.stdout]
        assert {flag_of(f) for f in unseen} <= shown


# --- what a run leaves --------------------------------------------------------------------


def test_the_driver_writes_what_the_readme_lists(finished):
    where, done = finished
    results = json.loads((where / "out/results.json").read_text())
    runs = sorted(results["runs"], key=lambda run: run["validation"]["fd_validation"])
    assert [(run["rank"], run["status"]) for run in runs] == [(1, "done"), (2, "done")]
    assert results["best"] == runs[0]["folder"] and results["finished"]
    for seed in (where / "out/seed-0", where / "out/seed-1"):
        assert {path.name for path in seed.iterdir()} >= {
            "config.json", "log.csv", "run.log", "metrics.json", "figures", "codes.npy",
            "codes.pt", *(f"{name}_{end}.pt" for name in TRAINED for end in ("best", "last")),
        }  # fmt: skip
        assert len(list((seed / "figures").glob("*.png"))) >= 8
        maps = np.load(seed / "codes.npy", mmap_mode="r")
        assert maps.dtype == np.uint16 and maps.shape == (128, 64, 64)
    assert cv2.imread(str(where / "out/decoded.png")).shape[1] > 8 * 256
    page = (where / "out/report.html").read_text(encoding="utf-8")
    assert 'id="generated"' in page and "mean (sd)" in page and PRIVATE in page
    assert len(re.findall("^seed 0: done", done.stdout, re.M)) == 2  # after each run
    assert len(re.findall("^seed 1: unfinished", done.stdout, re.M)) == 1
    assert "24 subjects" in done.stdout
    assert done.stderr.count("warning") == done.stderr.count("nearly alike")  # after ten steps
    assert not [p for p in where.rglob("*") if "tmp" in p.name]


def test_the_same_command_ends_at_once_and_changes_nothing(where, slices):
    before = {p: p.stat().st_mtime_ns for p in where.rglob("*.pt")}
    options = ["--data", slices, "--out", "out", "--runs", 2, *SMALL]
    assert called("driver.py", *options, cwd=where).returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in where.rglob("*.pt")}


def test_another_run_in_the_same_folder_is_refused_before_data_are_made(where):
    options = ["--subjects", 3, 2, 2, "--cache", "elsewhere"]
    for out, words in (("out", "holds another run"), ("out/seed-0", "folder of one seed")):
        done = called("driver.py", "--out", out, *options, cwd=where)
        assert done.returncode == 4 and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (where / "elsewhere").exists()


@pytest.mark.slow
def test_evaluate_repeats_the_scores_and_renews_the_table_of_runs(where, slices):
    """Without a display, in an ASCII locale, with a backend that needs a display."""
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
    done = script(
        "predict.py", "evaluate", ".", "--data", slices,  # ASCII cannot spell the saved path
        cwd=where / "out/seed-0", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0",
        MPLBACKEND="TkAgg", DISPLAY="",
    )  # fmt: skip
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    after = json.loads(path.read_text())
    for values in (before, after):
        values.pop("peak_memory_mb", None)
    assert before == after
    assert json.loads(table.read_text()) == runs
    assert not list(where.glob("out/seed-0/**/.*.tmp*")) and all(o.exists() for o in others)
    for other in others:
        other.unlink()  # other tests use this folder


@pytest.mark.slow
def test_the_folder_of_a_seed_by_itself_is_scored_and_its_neighbours_stay(where, tmp_path):
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
def test_the_predict_commands_of_the_pages_run_as_they_stand(words, where, slices, tmp_path):
    """The user's data and runs are stand-ins here."""
    parts = {"scans": "test", "REAL_DIR": "train", "FAKE_DIR": "test", "UNSEEN_DIR": "validate"}
    places = {name: slices / f"keras_png_slices_{part}" for name, part in parts.items()}
    places |= {"RUN": where / "out", "pretrained": ROOT / "pretrained"}
    words = [places.get(word, word) for word in words]
    if "--out" not in words:
        words += ["--out", "new"]
    if "--n" in words:
        words[words.index("--n") + 1] = 5
    done = called(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_lines_for_notebooks_run_as_they_stand(where, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    said = re.search(r"# (\(.*?\)) indices, (\(.*?\)) in", block).groups()
    code = re.sub(r'"runs/\w+"', '"out"', block)
    assert code != block and len(code.split("\n")) <= 6
    names = {}
    monkeypatch.chdir(where)
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


def test_generated_slices_are_grey_and_depend_only_on_seed_and_number(where):
    for n, out in ((3, "a"), (35, "b")):
        ran(where, "generate", "out", "--n", n, "--seed", 5, "--out", out)
    for number in range(3):
        name = f"{number:05d}.png"
        assert (where / "a" / name).read_bytes() == (where / "b" / name).read_bytes()
    image = cv2.imread(str(where / "b/00034.png"), cv2.IMREAD_UNCHANGED)
    assert image.shape == (256, 256) and image.dtype == np.uint8
    assert (where / "a/grid.png").exists()


def test_slices_left_from_an_earlier_command_are_a_warning(tmp_path, capsys):
    for n, warned in ((3, False), (3, False), (2, True)):
        predict.write_slices(tmp_path, [torch.rand(n, 1, 256, 256)])
        assert warned == ("1 slices of an earlier command" in capsys.readouterr().err)


def test_sweeps_and_interpolations_are_drawn_and_odd_requests_are_exit_2(where):
    sweep = ["--n", 4, "--level", "sweep", "--volume", "--out", "sweep"]
    assert "volume.nii.gz" in ran(where, "generate", "out", *sweep)
    assert nibabel.load(where / "sweep/volume.nii.gz").shape == (256, 256, 4)
    ran(where, "interpolate", "out", "--n", 5, "--out", "walk")
    for name in ("sweep/strip.png", "sweep/walk.gif", "walk/00004.png", "walk/walk.gif"):
        assert (where / name).exists(), name
    for command, options, words in (
        ("generate", ["--level", "1.5"], "0 to 1"),
        ("generate", ["--volume"], "--level sweep"),
        ("generate", ["--volume", "--level", "sweep", "--n", 1], "at least 2"),
        ("interpolate", ["--n", 1], "at least 2"),
    ):
        wrong = called("predict.py", command, "out", *options, cwd=where)
        assert wrong.returncode == 2 and words in wrong.stderr


def test_an_export_is_stamped_and_has_no_scores(where):
    assert PRIVATE in ran(where, "export", "out", "--out", "shared")
    for command in (["evaluate", "shared"], ["export", "shared", "--out", "again"]):
        wrong = called("predict.py", *command, cwd=where)
        assert wrong.returncode == 2 and "is an export" in wrong.stderr, wrong.stderr


def test_samples_depend_on_the_level_and_sweeps_and_walks_end_at_samples(where):
    # A few steps of training draw the same black slice from anything; random weights do not.
    run, draw = predict.load_run(where / "out/seed-0"), torch.Generator().manual_seed(0)
    for weight in run.generator.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw))
    run.vqvae.decode = torch.Tensor.float  # shows the maps
    low, high = (run.sample(2, level=level)[1] for level in (0.0, 1.0))
    assert not torch.equal(low, high) and not torch.equal(low[0], low[1])
    swept = run.sweep(3)[1]
    assert torch.equal(swept[0], low[0]) and torch.equal(swept[2], high[0])
    for level, ends in ((0.0, low), (1.0, high)):
        walked = run.walk(5, level=level)[1]
        assert (walked[[0, 4]] == ends).float().mean() > 0.99  # its noise is rounded


def test_reconstruct_takes_a_folder_and_a_file(where, slices):
    data = slices / "keras_png_slices_test"
    for path, out, count in ((data, "r", 16), (next(data.glob("*.png")), "1", 1)):
        said = ran(where, "reconstruct", "out", "--data", path, "--out", out)
        assert len(list((where / out).glob("0*.png"))) == count
        assert "SSIM" in said and "nan" not in said


def test_without_out_each_command_makes_a_new_folder(where):
    for n in (5, 2):
        ran(where, "generate", "out/seed-0", "--n", n)
    every = (where / "out/seed-0").glob("generated*")
    folders = sorted(every, key=lambda p: p.stat().st_mtime)[-2:]
    assert [len(list(p.glob("0*.png"))) for p in folders] == [5, 2]


def test_a_moved_folder_still_generates(where):
    (where / "moved").mkdir()
    os.rename(where / "out", where / "moved/elsewhere")
    try:
        ran(where, "generate", "moved/elsewhere", "--n", 1, "--out", "m")
    finally:
        os.rename(where / "moved/elsewhere", where / "out")


# --- stopping and continuing --------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_brains(where, slices):
    command = [sys.executable, ROOT / "driver.py", "--data", slices, "--out", "killed", *SMALL]
    env, log = os.environ | {"OMP_NUM_THREADS": "1"}, where / "killed/seed-0/log.csv"
    given = {"cwd": where, "env": env, "stderr": subprocess.PIPE, "text": True}

    def rows():
        return len(log.read_text().splitlines()) if log.exists() else 0

    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = rows()
        running = subprocess.Popen(command, **given)
        while rows() <= before + 1 and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signum)
        _, error = running.communicate(timeout=60)
        assert running.returncode == code, error
        assert code == -9 or "To continue: python" in error
    done = subprocess.run(command, **given)
    assert done.returncode == 0, done.stderr
    whole, killed = (where / folder / "seed-0" for folder in ("out", "killed"))
    assert (whole / "codes.npy").read_bytes() == (killed / "codes.npy").read_bytes()
    scores = [json.loads((seed / "metrics.json").read_text()) for seed in (whole, killed)]
    assert scores[0]["generation"] == scores[1]["generation"]


@pytest.mark.slow
def test_without_out_stages_and_driver_continue_and_then_add_a_seed(slices, tmp_path):
    def run(*words):
        done = called(*words, "--data", slices, *SMALL, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for stage in ("vqvae", "codes", "decoder", "dcgan", "denoiser"):
        run("train.py", "--stage", stage)
    assert "continuing seed 0" in run("driver.py")
    run("driver.py")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"quick", "cache"}
    assert (tmp_path / "runs/quick/seed-1/metrics.json").exists()
    results = json.loads((tmp_path / "runs/quick/results.json").read_text())
    assert len(results["runs"]) == 2 and results["finished"]


def test_a_stage_without_the_one_before_says_which(slices, tmp_path):
    needs = {"codes": "vqvae", "decoder": "codes", "dcgan": "codes", "denoiser": "codes"}
    for stage, before in needs.items():
        options = ["--stage", stage, "--data", slices, "--out", "out", *SMALL]
        done = called("train.py", *options, cwd=tmp_path)
        assert done.returncode == 4, done.stderr
        assert f"run --stage {before} first" in done.stderr


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing", "does not exist"),
        ("data.zip", "unpack it, and give the folder"),
        ("OASIS.tar.gz", "unpack it, and give the folder"),
        ("labels", "it holds 1 segmentations"),
    ],
)
def test_unusable_data_are_exit_3_and_leave_no_run_folder(data, words, tmp_path):
    (tmp_path / "labels/seg").mkdir(parents=True)
    (tmp_path / "labels/seg/seg_001_slice_0.nii.png").touch()
    for name in ("data.zip", "OASIS.tar.gz"):
        (tmp_path / name).write_bytes(b"PK")
    done = called("driver.py", "--data", data, cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert data in done.stderr and words in done.stderr
    assert not (tmp_path / "runs").exists()


def test_out_may_hold_the_cache_and_no_other_files(tmp_path):
    config = Config(out=str(tmp_path / "a"), cache=str(tmp_path / "a/b/cache"))
    (tmp_path / "a/b/cache").mkdir(parents=True)  # as an interrupted start leaves it
    runs.check_out(config)
    (tmp_path / "a/thesis.tex").touch()
    for other in (config, replace(config, out=str(tmp_path / "a/b"), cache="x")):
        assert "other files" in failure(runs.check_out, other, code=Exit.BUSY)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="not on this processor")
def test_scripts_round_denormal_numbers_to_zero_on_all_threads():
    """Below 1e-38 a processor is slow."""
    assert (torch.full((10**6,), 1e-30) * 1e-10).count_nonzero() == 10**6  # the control
    code = (
        "import torch; from support.endings import run_script\n"
        "count = lambda: print((torch.full((10**6,), 1e-30) * 1e-10).count_nonzero().item())\n"
        "run_script(count)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
