"""Faults on purpose: kills, signals, full disks, little memory, hostile and damaged files.

Real processes, signals and limits. What is promised: nothing saved is lost, no wrong score or
picture appears, no code of a stranger runs, and every ending has its exit code.
"""

import argparse
import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import ablate
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, script

import dataset
import driver
import predict
import results
import runtime
import train
from config import Config, Exit, UserError, config_from

resource = pytest.importorskip("resource")  # limits, fork and signals as on Linux
FORK = multiprocessing.get_context("fork")


def given(**options) -> argparse.Namespace:
    """What argparse would make of these options and of SMALL."""
    parser = driver.Parser("")
    driver.add_options(parser)
    return argparse.Namespace(**vars(parser.parse_args(SMALL)), **options)


def patched(code: str, *options, cwd, **keywords) -> subprocess.Popen:
    """driver.py with SMALL as a process in which `code` ran before `driver.main`."""
    lines = [
        "import os, signal, sys, time, resource",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import driver, runtime, torch, train",
        "parser = driver.Parser('')",
        "driver.add_options(parser)",
        "arguments = parser.parse_args()",
        code,
        "runtime.run_script(lambda: driver.main(arguments))",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines), *SMALL, *map(str, options)], cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords,
    )  # fmt: skip


@contextlib.contextmanager
def file_limit(size: int):
    """No file grows beyond `size` bytes: to a writer, a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def temporaries(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if "tmp" in p.name]


@pytest.fixture
def seed(finished, tmp_path):
    """A copy of a finished seed's folder, to be damaged."""
    return shutil.copytree(finished[0] / "out/seed-0", tmp_path / "seed-0")


# --- kills --------------------------------------------------------------------------------


def save_forever(path: Path):
    """Saves with numbers that tell whether a file is one save or a mixture of two."""
    torch.set_num_threads(1)  # the threads of the process before do not exist in this one
    number = (runtime.load_last(path) or {"number": 0})["number"]
    while True:
        number += 1
        values = {"number": number, "tensor": torch.full((250_000,), float(number))}
        runtime.save_checkpoint(path, values, keep_previous=True)


def time_of(path: Path) -> int:
    """When a file was written; 0 while it is being replaced."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_a_kill_while_saving_leaves_a_whole_checkpoint_30_times(tmp_path):
    path, draw, last = tmp_path / "x_last.pt", random.Random(0), 0
    for _ in range(30):
        before = time_of(path)
        writer = FORK.Process(target=save_forever, args=(path,))
        writer.start()
        while time_of(path) in (before, 0) and writer.is_alive():
            time.sleep(0.001)  # until it has saved, on a busy machine too
        time.sleep(draw.uniform(0, 0.1))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = runtime.load_last(path)  # raises for a damaged one
        if found is not None:
            assert (found["tensor"] == found["number"]).all() and found["number"] >= last
            last = found["number"]
        with runtime.writing_alone(tmp_path):  # as the next start does
            assert temporaries(tmp_path) == []
    assert last >= 30 and not list(tmp_path.glob("*.damaged-*"))


def hold(folder: Path, path: Path):
    """Be the writer of a folder, begin a file in it, and wait for the end."""
    with runtime.writing_alone(folder), runtime.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        (folder / "ready").touch()
        time.sleep(60)


@pytest.fixture
def writer(tmp_path):
    """A process that holds the folder `out` and writes into `cache`."""
    (tmp_path / "cache").mkdir()
    process = FORK.Process(target=hold, args=(tmp_path / "out", tmp_path / "cache/x.npy"))
    process.start()
    while not (tmp_path / "out/ready").exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_second_writer_is_told_who_the_first_is(writer, tmp_path):
    words = f'"pid": {writer.pid}, "host"'
    with (
        pytest.raises(UserError, match=words) as problem,
        runtime.writing_alone(tmp_path / "out"),
    ):
        pass
    assert problem.value.code == Exit.BUSY
    dataset._remove_stale(tmp_path / "cache")
    assert len(temporaries(tmp_path)) == 1  # it is being written


def test_what_a_killed_writer_leaves_is_taken_over_and_cleared(writer, tmp_path, capsys):
    writer.kill()
    writer.join()
    with runtime.writing_alone(tmp_path / "out"):
        assert f'took over the lock of a process that ended: {{"pid": {writer.pid}' in (
            capsys.readouterr().out
        )
    dataset._remove_stale(tmp_path / "cache")
    assert temporaries(tmp_path) == []


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    import fcntl

    def absent(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", absent)
    with runtime.writing_alone(tmp_path):
        pass
    assert "has no locks" in capsys.readouterr().err


def test_a_second_script_in_one_folder_is_exit_5(slices, tmp_path):
    with runtime.writing_alone(tmp_path / "out"):
        runtime.results_folder(config_from(given(out=str(tmp_path / "out"))), "", False)
        (tmp_path / "out/config.json").unlink()
        done = script("train.py", "--data", slices, "--out", "out", *SMALL, cwd=tmp_path)
    assert done.returncode == 5 and done.stderr.count("\n") == 1, done.stderr
    assert str(os.getpid()) in done.stderr


# --- signals ------------------------------------------------------------------------------

SLOW = """
real = train.reconstruction_loss
def slow(*given):
    if len(os.listdir('out/seed-0')) and os.path.exists('out/seed-0/vqvae_prev.pt'):
        open('slow', 'w').close()
        time.sleep(60)
    return real(*given)
train.reconstruction_loss, train.CHECKPOINT_EVERY_S = slow, 0
"""


def test_the_second_ctrl_c_ends_at_once_and_the_last_checkpoint_is_whole(slices, tmp_path):
    running = patched(SLOW, "--data", slices, "--out", "out", cwd=tmp_path)
    while not (tmp_path / "slow").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None  # the step is being finished
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=600)
    assert running.returncode == 130, error
    assert time.monotonic() - start < 5
    last = tmp_path / "out/seed-0/vqvae_last.pt"
    assert runtime.load_checkpoint(last)["nimg"] == 16 and not temporaries(last.parent)


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found += [int(stat.parent.name)] * (
                int(stat.read_text().rpartition(")")[2].split()[1]) == pid
            )
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_signal_while_decoding_ends_with_its_code_and_leaves_no_orphans(slices, tmp_path):
    code = "import dataset\ndataset._survey = lambda item: (open('s', 'w'), time.sleep(0.4))"
    running = patched(code, "--data", slices, "--out", "out", cwd=tmp_path)
    while not (tmp_path / "s").exists() and running.poll() is None:
        time.sleep(0.05)
    orphans = children_of(running.pid)
    running.send_signal(signal.SIGTERM)
    _, error = running.communicate(timeout=600)
    assert running.returncode == 143 and "To continue" in error, error
    assert not [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
    assert not (tmp_path / "out").exists()


# --- space --------------------------------------------------------------------------------


def test_a_full_disk_at_a_checkpoint_is_exit_7_and_the_last_one_is_intact(slices, tmp_path):
    # One slow step after the second checkpoint: time to lower the limit.
    options = ["--data", slices, "--out", "out"]
    code = SLOW.replace("time.sleep(60)", "") + (
        "real_add = train.Stage.save\n"
        "def save(stage):\n"
        "    if os.path.exists('slow'):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))\n"
        "    real_add(stage)\n"
        "train.Stage.save = save\n"
    )
    running = patched(code, *options, cwd=tmp_path)
    _, error = running.communicate(timeout=600)
    assert running.returncode == 7, error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "vqvae_last.pt" in line and "MB free" in line and "MB needed" in line
    last = tmp_path / "out/seed-0/vqvae_last.pt"
    assert runtime.load_checkpoint(last)["nimg"] == 16 and not temporaries(tmp_path / "out")


def test_a_full_disk_at_figures_costs_the_figures_alone(finished, slices, tmp_path):
    where, _ = finished
    shutil.copytree(where / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/seed-0/figures")
    config = json.loads((where / "out/seed-0/config.json").read_text())["config"]
    code = (
        f"sys.path.insert(0, {str(ROOT)!r}); import predict, runtime, resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))\n"
        "sys.argv[1:] = ['evaluate', 'out/seed-0', '--cache', sys.argv[1]]\n"
        "arguments = predict.parse()\n"
        "runtime.run_script(lambda: predict.main(arguments))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sys; " + code, config["cache"]], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: drawing ") == 11 and "Traceback" not in done.stderr
    assert done.stderr.count("warning: writing report.html failed") == 1
    assert not list((tmp_path / "out/seed-0/figures").iterdir())
    written, before = (
        json.loads((place / "out/seed-0/metrics.json").read_text())
        for place in (tmp_path, where)
    )
    assert written["generation"] == before["generation"]


def test_a_full_disk_at_a_log_line_is_no_end(tmp_path, capsys):
    log = runtime.Log(tmp_path / "log.csv", ("stage", "nimg", "loss"))
    log.keep("vqvae", -1)
    log.add(stage="vqvae", nimg=1, loss=0.125)
    limit = (tmp_path / "log.csv").stat().st_size + 9
    with file_limit(limit), runtime.logging_to(tmp_path / "run.log"):
        log.add(stage="vqvae", nimg=2, loss=0.12345)  # nine bytes of it fit
        for _ in range(100):
            runtime.log("a line that is lost from some time on")
    assert "a row of log.csv was lost" in capsys.readouterr().err
    assert [row["nimg"] for row in log.rows()] == [1]  # half a row is none
    log.add(stage="vqvae", nimg=3, loss=0.25)
    log.add(stage="vqvae", nimg=4, loss=0.5)
    assert [row["nimg"] for row in log.rows()] in ([1, 4], [1, 3, 4])


def test_half_a_last_number_is_no_number(tmp_path):
    log = runtime.Log(tmp_path / "log.csv", ("stage", "nimg", "loss"))
    log.keep("vqvae", -1)
    log.add(stage="vqvae", nimg=1, loss=0.125)
    with open(log.path, "a") as file:
        file.write("vqvae,2,0.1")  # of 0.125
    assert [row["nimg"] for row in log.rows()] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_no_failure(finished, tmp_path):
    command = [sys.executable, str(ROOT / "predict.py"), "generate", "out", "--n", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--out", tmp_path / "x"], cwd=finished[0], stdout=full, text=True,
            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "x/00000.png").exists()


def test_unwritable_output_is_found_before_training(slices, finished, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(driver, "open_data", None)  # not even the data are looked at
    for out in ("file", "file/x"):
        for main in (driver.main, train.main):
            assert runtime._ending(lambda m=main, o=out: m(given(out=str(tmp_path / o)))) == 7
    command = [
        "generate",
        str(finished[0] / "out"),
        "--n",
        "1",
        "--out",
        str(tmp_path / "file"),
    ]
    assert predict_ending(command, monkeypatch) == 7


def predict_ending(command: list[str], monkeypatch) -> Exit:
    """The exit code of predict.py with this command line."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, command)])
    return runtime._ending(lambda: predict.main(predict.parse()))


def test_a_checkpoint_that_reads_back_damaged_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "x_last.pt"
    runtime.save_checkpoint(path, {"number": 1}, keep_previous=True)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: "data.pkl")
    with pytest.raises(UserError, match="reads back damaged") as problem:
        runtime.save_checkpoint(path, {"number": 2}, keep_previous=True)
    monkeypatch.undo()
    assert problem.value.code == Exit.WRITE and not temporaries(tmp_path)
    assert runtime.load_checkpoint(path)["number"] == 1


# --- memory -------------------------------------------------------------------------------


def test_out_of_memory_is_exit_8_and_says_half_of_the_batch(slices, tmp_path):
    code = (
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 700_000_000, -1))\n"
    )
    options = ["--data", slices, "--out", "out", "--batch-size", 8192]
    running = patched(code, *options, cwd=tmp_path)
    _, error = running.communicate(timeout=600)
    assert running.returncode == 8, error
    assert error.count("\n") == 1 and "--batch-size 4096" in error


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("vqvae", "--batch-size 4"),
        ("codes", "out of memory"),
        ("decoder", "--batch-size 4"),
        ("dcgan", "--gan-batch-size 4"),
        ("denoiser", "--gan-batch-size 4"),
    ],
)
def test_every_stage_that_runs_out_of_memory_names_its_own_option(
    stage, words, monkeypatch, capsys
):
    def big(run):
        np.zeros(10**15)  # a petabyte: no system lends it

    monkeypatch.setitem(train.STAGES, stage, big)
    run = argparse.Namespace(config=config_from(given()), signals=contextlib.nullcontext())
    assert runtime._ending(lambda: train.run_stages(run, [stage])) == Exit.MEMORY
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# --- hostile and damaged files ------------------------------------------------------------


class Bomb:
    """A pickle of it opens `marker` for writing when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_no_script_runs_what_a_checkpoint_holds(
    finished, slices, tmp_path, monkeypatch, capsys
):
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    monkeypatch.chdir(finished[0])  # its cache
    marker, folder = tmp_path / "marker", tmp_path / "out/seed-0"
    runs = {
        "driver": lambda: driver.main(given(data=str(slices), out=str(tmp_path / "out"))),
        "train": lambda: train.main(
            argparse.Namespace(
                **vars(given(data=str(slices), out=str(tmp_path / "out"))), stage="all"
            )
        ),
        "ablate": lambda: ablate.main(ablate.parse()),
    }
    (folder / "metrics.json").unlink()  # driver.py would not look at a finished seed
    for path in folder.glob("*.pt"):
        torch.save({"format": 1, "stage": path.stem, "bomb": Bomb(marker)}, path)
    monkeypatch.setattr(sys, "argv", ["ablate.py", str(folder)])
    for name, run in runs.items():
        assert runtime._ending(run) == Exit.CHECKPOINT, (name, capsys.readouterr().err)
    for command in (
        ["generate"],
        ["interpolate"],
        ["evaluate"],
        ["reconstruct", "--data", "."],
    ):
        assert predict_ending([*command, folder], monkeypatch) == Exit.CHECKPOINT, command
    assert "more than tensors and plain values" in capsys.readouterr().err
    assert not marker.exists()
    with pytest.raises(FileNotFoundError):  # the bomb is live: a careless load sets it off
        torch.load(folder / "codes.pt", weights_only=False) and marker.unlink()
        marker.unlink()
    assert not marker.exists()


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_byte_in_a_checkpoint_is_found(at, tmp_path):
    path = tmp_path / "x.pt"
    runtime.save_checkpoint(path, {"tensor": torch.arange(5000.0)})
    good = runtime.load_checkpoint(path)
    blob = bytearray(path.read_bytes())
    for place in range(int(at * len(blob)), min(int(at * len(blob)) + 12, len(blob))):
        blob[place] ^= 0x10
        path.write_bytes(blob)
        blob[place] ^= 0x10
        with contextlib.suppress(UserError):  # a byte that zip itself does not look at
            found = runtime.load_checkpoint(path)
            assert torch.equal(found["tensor"], good["tensor"])


def huge_view():
    return torch.zeros(1).expand(10**6, 10**6)  # four bytes that claim 4 TB


def bloated(path: Path):
    """The same file, with one part compressed that unpacks to 200 MB."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(200_000_000))


def endless() -> list:
    loop = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: torch.save({"format": 1, "x": huge_view()}, p), "claims more"),
        (lambda p: torch.save({"format": 1, "x": endless()}, p), "not a usable checkpoint"),
        (lambda p: torch.save({"format": 1, "x": torch.tensor(np.nan)}, p), "x is not finite"),
        (lambda p: torch.save({"format": 1, "x": [np.inf]}, p), r"x\[0\] is not finite"),
        (lambda p: torch.save({"format": 2}, p), "of this version"),
        (lambda p: torch.save([1], p), "of this version"),
        (lambda p: torch.save({"format": torch.ones(2)}, p), "not a usable checkpoint"),
        (lambda p: p.write_bytes(b""), "not a usable checkpoint"),
        (lambda p: p.write_text("text"), "not a usable checkpoint"),
        (lambda p: p.unlink(), "no such file"),
        (bloated, "claim more bytes"),
    ],
)
def test_other_bad_checkpoints_are_exit_4_with_their_reason(spoil, words, tmp_path):
    path = tmp_path / "x.pt"
    runtime.save_checkpoint(path, {"x": torch.ones(3)})
    spoil(path)
    with pytest.raises(UserError, match=words) as problem:
        runtime.load_checkpoint(path)
    assert problem.value.code == Exit.CHECKPOINT and str(path) in str(problem.value)


def test_little_memory_is_no_damage(tmp_path, monkeypatch):
    def none(*arguments, **keywords):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    path = tmp_path / "x_last.pt"
    runtime.save_checkpoint(path, {"x": 1})
    monkeypatch.setattr(torch, "load", none)
    with pytest.raises(RuntimeError, match="allocate"):  # a damaged file would be put aside
        runtime.load_last(path)
    assert path.exists()


def without(values, key):
    return {k: v for k, v in values.items() if k != key}


def relink(folder: Path, changed: str):
    """Make the other files belong to a changed one, so that its own fault is what is found."""
    for name, target in predict.LINKS:
        if f"{target}.pt" == changed:
            values = runtime.load_checkpoint(folder / f"{name}.pt")
            values[target.removesuffix("_best")] = runtime.checksum(folder / changed)
            runtime.save_checkpoint(folder / f"{name}.pt", values)
            relink(folder, f"{name}.pt")


@pytest.mark.parametrize(
    "name",
    ["vqvae_best.pt", "codes.pt", "decoder_best.pt", "dcgan_best.pt", "denoiser_best.pt"],
)
def test_predict_refuses_a_file_that_lacks_a_part_or_holds_another(name, seed):
    path = seed / name
    values = runtime.load_checkpoint(path)
    unused = {"format", "nimg", "score", "maps"}
    unused |= {"model"} if name == "vqvae_best.pt" else set()  # that of decoder_best.pt is used
    for key in values.keys() - unused:
        wrong = torch.full((3,), 7.0)
        for other in (without(values, key), values | {key: 7}, values | {key: wrong}):
            runtime.save_checkpoint(path, other)
            relink(seed, name)
            with pytest.raises(UserError, match=name) as problem:
                predict.load_run(seed)
            assert problem.value.code == Exit.CHECKPOINT, key
    runtime.save_checkpoint(path, values)
    relink(seed, name)
    predict.load_run(seed)


@pytest.mark.parametrize("change", [{"config": 3}, {"stamp": None, "seed": 1}, {"config": {}}])
def test_predict_refuses_another_config_json(change, seed):
    path = seed / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | change))
    if "stamp" in change:
        path.write_text(json.dumps(without(values, "stamp")))
    with pytest.raises(UserError, match=r"config\.json") as problem:
        predict.load_run(seed)
    assert problem.value.code == Exit.CHECKPOINT


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", "3", "{"])
def test_json_of_any_kind_is_no_crash(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as problem:
        runtime.read_json(tmp_path / "x.json")
    assert problem.value.code == Exit.CHECKPOINT


def test_a_training_checkpoint_that_lacks_a_part_is_exit_4(seed, slices, finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    options = given(data=str(slices), out=str(seed.parent))
    options.stage = "all"
    shutil.copy(finished[0] / "out/config.json", seed.parent)
    path = seed / "dcgan_last.pt"
    values = runtime.load_checkpoint(path)
    for key in ("nimg", "parts", "sums", "seconds"):
        runtime.save_checkpoint(path, without(values, key))
        assert runtime._ending(lambda: train.main(options)) == Exit.CHECKPOINT, key


# --- what is not finite -------------------------------------------------------------------


def test_a_nan_in_a_running_step_is_exit_6_with_stage_step_and_last_good(slices, tmp_path):
    code = """
real, calls = train.reconstruction_loss, []
def poisoned(*given):
    calls.append(1)
    return real(*given) * (float('nan') if len(calls) == 4 else 1)
train.reconstruction_loss, train.CHECKPOINT_EVERY_S = poisoned, 0
"""
    running = patched(code, "--data", slices, "--out", "out", cwd=tmp_path)
    _, error = running.communicate(timeout=600)
    assert running.returncode == 6 and "Traceback" not in error, error
    for word in ("vqvae diverged", "step 4", "32 images seen", "vqvae_last.pt is from before"):
        assert word in error
    assert runtime.load_checkpoint(tmp_path / "out/seed-0/vqvae_last.pt")["nimg"] == 24
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["best"] is None and results["runs"][0]["status"] == "diverged"


def test_weights_that_overflow_make_no_picture(seed, slices, tmp_path, monkeypatch, capsys):
    commands = {
        "encoder": ["reconstruct", "--data", slices / "keras_png_slices_test"],
        "decoder": ["generate", "--n", 1],
    }
    for name, command in commands.items():
        copy = shutil.copytree(seed, tmp_path / name)
        values = runtime.load_checkpoint(copy / "decoder_best.pt")
        for key in [k for k in values["model"] if k.startswith(name)]:
            values["model"][key] *= 1e30
        runtime.save_checkpoint(copy / "decoder_best.pt", values)
        ending = predict_ending([*command, copy, "--out", tmp_path / "x"], monkeypatch)
        assert ending == Exit.DIVERGED, name
        error = capsys.readouterr().err
        assert "output is not finite" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x/*"))


@pytest.mark.parametrize("where", ["encoder", "codebook", "generator", "denoiser"])
def test_a_nan_in_memory_makes_no_picture(where, seed, slices, tmp_path, monkeypatch):
    real = predict.load_run

    def poisoned(*arguments):
        run = real(*arguments)
        weights = {
            "encoder": run.vqvae.encoder[0].weight,
            "codebook": run.vqvae.quantizer.codebook,
            "generator": next(run.generator.parameters()),
            "denoiser": run.denoiser.head.weight,
        }[where]
        weights[:] = torch.nan
        return run

    monkeypatch.setattr(predict, "load_run", poisoned)
    command = ["reconstruct", "--data", slices / "keras_png_slices_test"]
    command = ["generate"] if where in ("generator", "denoiser") else command
    ending = predict_ending([*command, seed, "--out", tmp_path / "x"], monkeypatch)
    assert ending == Exit.DIVERGED and not list(tmp_path.glob("x/*"))


def test_results_leave_out_scores_that_are_not_finite(finished, tmp_path):
    where, _ = finished
    for number, score in ((0, "NaN"), (1, "3.0"), (2, "Infinity")):
        folder = tmp_path / f"seed-{number}"
        folder.mkdir()
        text = (where / "out/seed-0/metrics.json").read_text()
        values = json.loads(text)
        values["generation"][results.SCORE]["generated"] = 12345.0
        (folder / "metrics.json").write_text(json.dumps(values).replace("12345.0", score))
    rows = {seed: results.row_of(tmp_path, seed, 8) for seed in range(4)}
    states = [row["status"] for row in rows.values()]
    assert states == ["diverged", "done", "diverged", "unfinished"]
    results.write(tmp_path, rows)
    assert json.loads((tmp_path / "results.json").read_text())["best"] == "seed-1"
    other = results.row_of(tmp_path, 1, 16)  # FD at another number of slices is another unit
    assert other == {"status": "unfinished", "why": "scored with 8 slices, not 16"}
    (tmp_path / "seed-1/metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.json"):
        results.row_of(tmp_path, 1, 8)


def test_a_score_that_is_not_finite_is_never_written(tmp_path):
    runtime.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(FloatingPointError, match=r"x\.json"):
        runtime.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


# --- endings and folders ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (UserError(Exit.DATA, "two\nlines"), 3),
        (FloatingPointError("not finite"), 6),
        (OSError(28, "No space left on device"), 7),
        (FileExistsError(17, "File exists", "x"), 7),
        (MemoryError(), 8),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 8),
        (KeyboardInterrupt(), 130),
        (runtime.Interrupted(signal.SIGTERM), 143),
        (runtime.Interrupted(signal.SIGINT), 130),
    ],
)
def test_every_ending_has_its_code_and_one_line(problem, code, capsys):
    def main():
        raise problem

    assert runtime._ending(main) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(("error: ", "stopped by "))


def test_a_bug_is_exit_1_and_its_traceback_is_in_run_log(tmp_path, capsys):
    def main():
        with runtime.logging_to(tmp_path / "run.log"):
            raise KeyError("a bug")

    assert runtime._ending(main) == Exit.BUG
    assert "KeyError: 'a bug'" in (tmp_path / "run.log").read_text()


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    found, start = [], threading.Barrier(8)

    def make():
        start.wait()
        found.append(runtime.new_folder(tmp_path, "20260101-000000-quick"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8 and all(folder.is_dir() for folder in found)


def test_other_data_or_settings_are_exit_4_with_what_differs(tmp_path):
    folder = tmp_path / "out"
    runtime.results_folder(Config(out=str(folder)), "some data", False)
    before = (folder / "config.json").read_bytes()
    for config, data, words in (
        (Config(out=str(folder)), "other data", r"data is 'some data', expected 'other data'"),
        (Config(out=str(folder), lr=0.5, codes=9), "some data", r"codes \(512.*lr \(0\.003"),
    ):
        words = words if data == "other data" else r"(?s)codes \(512 there, 9 here\).*lr \("
        with pytest.raises(UserError, match=words) as problem:
            runtime.results_folder(config, data, False)
        assert problem.value.code == Exit.CHECKPOINT
    assert (folder / "config.json").read_bytes() == before
