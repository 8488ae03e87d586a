"""Faults on purpose: kills, signals, full disks, little memory, hostile and damaged files.

Promises: nothing saved is lost, no wrong score or picture appears, no code in a file runs, and
every ending has its exit code.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, called, parsed_by
from matplotlib.figure import Figure
from test_dataset import failure

import driver
import predict
import train
from config import Exit, UserError
from loading import cache
from scores import results
from stages import stage as stages_stage
from support import checkpoints, cli, endings, files, messages, runs
from support.checkpoints import FORMAT

resource = pytest.importorskip("resource")  # limits, fork and signals as on Linux
FORK = multiprocessing.get_context("fork")


def ending(main, **given) -> Exit:
    """The exit code of `driver.main` or `train.main` with SMALL and these options."""
    arguments = parsed_by("driver.py", SMALL)
    vars(arguments).update({name: str(value) for name, value in given.items()})
    return endings._ending(lambda: main(arguments))


def patched(code: str, *flags, cwd) -> subprocess.Popen:
    """driver.py with SMALL in a process that runs `code` before it."""
    lines = [
        "import os, runpy, sys, time",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import driver",
        "from loading import cache",
        "from stages import stage",
        code,
        f"runpy.run_path({str(ROOT / 'driver.py')!r}, run_name='__main__')",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines), *SMALL, *map(str, flags)], cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextlib.contextmanager
def file_limit(size: int):
    """No file can grow beyond `size` bytes. To a writer this is a full disk."""
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


@pytest.fixture
def data(finished, slices, monkeypatch):
    """The folder of slices. The working folder is the finished run's, which has their cache."""
    monkeypatch.chdir(finished[0])
    return slices


# --- kills --------------------------------------------------------------------------------


def save_forever(path: Path, saved):
    """Save numbers that show whether a file is one save or a mixture of two."""
    torch.set_num_threads(1)  # the parent's threads do not exist in a forked process
    number = (checkpoints.load_last(path) or {"number": 0})["number"]
    while True:
        number += 1
        values = {"number": number, "tensor": torch.full((250_000,), float(number))}
        checkpoints.save_checkpoint(path, values, keep_previous=True)
        saved.set()


def test_a_kill_while_saving_leaves_a_complete_checkpoint_30_times(tmp_path):
    path, draw, last = tmp_path / "x_last.pt", random.Random(0), 0
    for _ in range(30):
        saved = FORK.Event()
        writer = FORK.Process(target=save_forever, args=(path, saved), daemon=True)
        writer.start()
        assert saved.wait(60)
        time.sleep(draw.uniform(0, 0.1))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = checkpoints.load_last(path)  # raises for a damaged one
        if found is not None:
            assert (found["tensor"] == found["number"]).all() and found["number"] >= last
            last = found["number"]
        with runs.writing_alone(tmp_path):  # as the next start does
            assert temporaries(tmp_path) == []
    assert last >= 30 and not list(tmp_path.glob("*.damaged-*"))


def hold(folder: Path, path: Path):
    """Lock a folder, begin a file, and wait to be killed."""
    with runs.writing_alone(folder), files.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        path.with_name("ready").touch()
        time.sleep(60)


@pytest.fixture
def writer(tmp_path):
    """A process that holds the folder `out` and writes into `cache`."""
    (tmp_path / "cache").mkdir()
    process = FORK.Process(target=hold, args=(tmp_path / "out", tmp_path / "cache/x.npy"))
    process.start()
    while not (tmp_path / "cache/ready").exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_second_writer_is_exit_5_and_the_error_names_the_first(
    writer, data, tmp_path, capsys
):
    code = ending(train.main, data=data, out=tmp_path / "out", stage="vqvae")
    error = capsys.readouterr().err
    assert code == Exit.BUSY and error.count("\n") == 1, error
    assert f'"pid": {writer.pid}, "host"' in error
    cache.remove_stale(tmp_path / "cache")
    assert len(temporaries(tmp_path)) == 1  # its writer still runs


def test_the_lock_and_files_of_a_killed_writer_are_taken_over(writer, tmp_path, capsys):
    writer.kill()
    writer.join()
    with runs.writing_alone(tmp_path / "out"):
        said = capsys.readouterr().out
    assert f'took over the lock of a process that ended: {{"pid": {writer.pid}' in said
    cache.remove_stale(tmp_path / "cache")
    assert temporaries(tmp_path) == []


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    problem = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=problem))
    with runs.writing_alone(tmp_path):
        pass
    assert "has no locks" in capsys.readouterr().err


# --- signals ------------------------------------------------------------------------------

SLOW_THIRD_STEP = """
real = stage.Stage.after_step
def slow(self, *given):
    if os.path.exists('out/seed-0/vqvae_prev.pt'):
        open('slow', 'w').close()
        time.sleep(60)
    return real(self, *given)
stage.Stage.after_step, stage.CHECKPOINT_EVERY_S = slow, 0
"""


def wait_for(path: Path, process: subprocess.Popen):
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)


def test_the_second_ctrl_c_ends_at_once_and_the_checkpoint_is_complete(slices, tmp_path):
    running = patched(SLOW_THIRD_STEP, "--data", slices, "--out", "out", cwd=tmp_path)
    wait_for(tmp_path / "slow", running)
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None  # the step goes on
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=600)
    assert running.returncode == Exit.INTERRUPTED, error
    assert time.monotonic() - start < 5
    last = tmp_path / "out/seed-0/vqvae_last.pt"
    assert checkpoints.load_checkpoint(last)["nimg"] == 16 and not temporaries(last.parent)


def test_every_signal_sets_a_flag_until_the_next_check():
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        saves = []
        with pytest.raises(endings.Interrupted), endings.Signals() as signals:
            os.kill(os.getpid(), signum)  # nothing happens yet
            signals.check(lambda saves=saves: saves.append(1))
        assert saves == [1]


def test_a_signal_during_decoding_has_its_exit_code(slices, tmp_path):
    code = "cache._survey = lambda item: (open('s', 'w'), time.sleep(0.4))"
    running = patched(code, "--data", slices, "--out", "out", cwd=tmp_path)
    wait_for(tmp_path / "s", running)
    running.send_signal(signal.SIGTERM)
    _, error = running.communicate(timeout=600)
    assert running.returncode == Exit.TERMINATED and "To continue" in error, error
    assert not (tmp_path / "out").exists()


# --- full disks ---------------------------------------------------------------------------


def test_a_full_disk_at_a_checkpoint_is_exit_7_and_the_last_one_is_intact(
    data, tmp_path, monkeypatch, capsys
):
    saves, save = [], stages_stage.Stage.save

    def save_third_on_a_full_disk(stage):
        saves.append(stage.nimg)
        with file_limit(20_000) if len(saves) == 3 else contextlib.nullcontext():
            save(stage)

    monkeypatch.setattr(stages_stage.Stage, "save", save_third_on_a_full_disk)
    monkeypatch.setattr(stages_stage, "CHECKPOINT_EVERY_S", 0)
    assert ending(driver.main, data=data, out=tmp_path / "out") == Exit.WRITE
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "vqvae_last.pt" in line and "MB free" in line and "MB needed" in line
    last = tmp_path / "out/seed-0/vqvae_last.pt"
    assert checkpoints.load_checkpoint(last)["nimg"] == 16 and not temporaries(tmp_path / "out")


def test_a_full_disk_at_a_figure_is_a_warning(tmp_path, capsys):
    with file_limit(1000):
        files.save_figure(tmp_path / "x.png", lambda: Figure((9, 9)))
    assert "warning: drawing x.png failed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_at_figures_costs_only_the_figures(finished, tmp_path):
    folder = tmp_path / "out/seed-0"
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    shutil.rmtree(folder / "figures")
    (folder / "metrics.json").unlink()
    with file_limit(20_000):
        done = called("predict.py", "evaluate", folder, cwd=finished[0])
    assert done.returncode == Exit.DONE, done.stderr
    assert "warning: drawing " in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("warning: writing report.html failed") == 1
    assert not list((folder / "figures").iterdir())
    assert files.read_json(folder / "metrics.json")["generation"]


def test_a_full_disk_at_a_log_line_does_not_end_the_run(tmp_path, capsys):
    log = files.Log(tmp_path / "log.csv", ("stage", "nimg", "loss"))
    log.keep("vqvae", -1)
    log.add(stage="vqvae", nimg=1, loss=0.125)
    limit = log.path.stat().st_size + 9
    with file_limit(limit), messages.logging_to(tmp_path / "run.log"):
        log.add(stage="vqvae", nimg=2, loss=0.12345)  # nine bytes of it fit
        for _ in range(100):
            messages.log("a line of which most copies are lost")
    assert "a row of log.csv was lost" in capsys.readouterr().err
    assert [row["nimg"] for row in log.rows()] == [1]  # the cut row is ignored
    log.add(stage="vqvae", nimg=3, loss=0.25)
    log.add(stage="vqvae", nimg=4, loss=0.5)
    assert [row["nimg"] for row in log.rows()] in ([1, 4], [1, 3, 4])
    with open(log.path, "a") as file:
        file.write("vqvae,5,0.1")  # cut from 0.125, and still a number
    assert log.rows()[-1]["nimg"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_no_failure(finished, tmp_path):
    command = [sys.executable, str(ROOT / "predict.py"), "generate", "out", "--n", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--out", tmp_path / "x"], cwd=finished[0], stdout=full, text=True,
            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "x/00000.png").exists()


@pytest.mark.parametrize("out", ["notes.txt", "notes.txt/inside"])
def test_an_output_folder_that_is_a_file_is_exit_7(out, finished, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    for module in (driver, train):
        monkeypatch.setattr(module, "open_data", None)  # not even the data are opened
        assert ending(module.main, out=tmp_path / out) == Exit.WRITE
    run = finished[0] / "out"
    done = called("predict.py", "generate", run, "--n", 1, "--out", out, cwd=tmp_path)
    assert done.returncode == Exit.WRITE and done.stderr.count("\n") == 1
    assert out in done.stderr and "choose another --out" in done.stderr


def test_a_checkpoint_that_reads_back_damaged_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "x_last.pt"
    checkpoints.save_checkpoint(path, {"number": 1}, keep_previous=True)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: "data.pkl")
    message = failure(checkpoints.save_checkpoint, path, {"number": 2}, True, code=Exit.WRITE)
    assert "reads back damaged" in message
    monkeypatch.undo()
    assert not temporaries(tmp_path)
    assert checkpoints.load_checkpoint(path)["number"] == 1


# --- memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("vqvae", "--batch-size 4"), ("codes", "out of memory"), ("decoder", "--batch-size 4"),
        ("dcgan", "--gan-batch-size 4"), ("denoiser", "--denoiser-batch-size 8"),
    ],
)  # fmt: skip
def test_out_of_memory_is_exit_8_and_suggests_half_of_the_batch(
    stage, words, monkeypatch, capsys
):
    monkeypatch.setitem(train.STAGES, stage, lambda run: torch.zeros(10**15))  # petabytes
    config = cli.config_from(parsed_by("driver.py", SMALL))
    run = argparse.Namespace(config=config, signals=contextlib.nullcontext())
    assert endings._ending(lambda: train.run_stages(run, [stage])) == Exit.MEMORY
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# --- hostile and damaged files ------------------------------------------------------------


class Bomb:
    """A careless load of its pickle opens the file `marker` for writing."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_no_script_runs_code_from_a_checkpoint(finished, slices, tmp_path):
    where, marker, folder = finished[0], tmp_path / "marker", tmp_path / "out/seed-0"
    shutil.copytree(where / "out", tmp_path / "out")
    (folder / "metrics.json").unlink()  # the driver skips a finished seed
    for path in folder.glob("*.pt"):
        torch.save({"format": FORMAT, "stage": path.stem, "bomb": Bomb(marker)}, path)
    training = "--data", slices, "--out", tmp_path / "out", *SMALL
    for words in (
        ("driver.py", *training),
        ("train.py", *training),
        ("predict.py", "generate", folder, "--out", tmp_path / "x"),
        ("predict.py", "interpolate", folder),
        ("predict.py", "evaluate", folder),
        ("predict.py", "reconstruct", folder, "--data", "."),
    ):
        done = called(*words, cwd=where)
        assert done.returncode == Exit.CHECKPOINT, (words, done.stderr)
        assert "more than tensors and plain values" in done.stderr
    assert not marker.exists() and not (tmp_path / "x").exists()
    torch.load(folder / "codes.pt", weights_only=False)["bomb"].close()
    assert marker.exists()  # the control: a careless load runs it


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_byte_in_a_checkpoint_is_found(at, tmp_path):
    path, good = tmp_path / "x.pt", torch.arange(5000.0)
    checkpoints.save_checkpoint(path, {"tensor": good})
    blob = path.read_bytes()
    first = int(at * len(blob))
    for place in range(first, first + 12):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 0x10]) + blob[place + 1 :])
        with contextlib.suppress(UserError):  # zip ignores some bytes
            assert torch.equal(checkpoints.load_checkpoint(path)["tensor"], good)


def bloated(path: Path):
    """Add a part to the file that unpacks to 200 MB."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(200_000_000))


def saved(**values):
    """A function that saves these values in place of a checkpoint."""
    return lambda path: torch.save({"format": FORMAT} | values, path)


LOOP: list = []
LOOP.append(LOOP)
HUGE_VIEW = torch.zeros(1).expand(10**6, 10**6)  # four bytes that claim 4 TB


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (saved(x=HUGE_VIEW), "claims more"),
        (saved(x=LOOP), "not a usable checkpoint"),
        (saved(x=torch.tensor(np.nan)), "x is not finite"),
        (saved(x=[np.inf]), "x[0] is not finite"),
        (saved(format=FORMAT - 1), checkpoints.OTHER_VERSION),
        (saved(format=torch.ones(2)), "not a usable checkpoint"),
        (lambda p: torch.save([1], p), "of this project"),
        (lambda p: p.write_bytes(b""), "not a usable checkpoint"),
        (lambda p: p.write_text("text"), "not a usable checkpoint"),
        (lambda p: p.unlink(), "no such file"),
        (bloated, "claim more bytes"),
    ],
)
def test_a_bad_checkpoint_is_exit_4_with_its_reason(spoil, words, tmp_path):
    path = tmp_path / "x.pt"
    checkpoints.save_checkpoint(path, {"x": torch.ones(3)})
    spoil(path)
    message = failure(checkpoints.load_checkpoint, path, code=Exit.CHECKPOINT)
    assert words in message and str(path) in message


def test_too_little_memory_does_not_count_as_damage(tmp_path, monkeypatch):
    path = tmp_path / "x_last.pt"
    checkpoints.save_checkpoint(path, {"x": 1})
    problem = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=problem))
    with pytest.raises(RuntimeError, match="allocate"):
        checkpoints.load_last(path)
    assert path.exists()  # a damaged file would be renamed


def relink(folder: Path, changed: str):
    """Update checksums in the other files, so that only the fault in `changed` is found."""
    for name, target in predict.LINKS:
        if f"{target}.pt" == changed:
            values = checkpoints.load_checkpoint(folder / f"{name}.pt")
            values[target.removesuffix("_best")] = checkpoints.checksum(folder / changed)
            checkpoints.save_checkpoint(folder / f"{name}.pt", values)
            relink(folder, f"{name}.pt")


@pytest.mark.parametrize(
    "name",
    ["vqvae_best.pt", "codes.pt", "decoder_best.pt", "dcgan_best.pt", "denoiser_best.pt"],
)
def test_predict_refuses_a_cut_file_and_one_with_a_missing_or_wrong_part(name, seed):
    path = seed / name
    values, blob = checkpoints.load_checkpoint(path), path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    assert name in failure(predict.load_run, seed, code=Exit.CHECKPOINT)
    unused = {"format", "nimg", "score", "maps"}
    unused |= {"model"} if name == "vqvae_best.pt" else set()  # decoder_best.pt replaces it
    for key in values.keys() - unused:
        lacking = {k: v for k, v in values.items() if k != key}
        for other in (lacking, values | {key: -7}, values | {key: torch.full((3,), -7.0)}):
            checkpoints.save_checkpoint(path, other)
            relink(seed, name)
            assert name in failure(predict.load_run, seed, code=Exit.CHECKPOINT), key
    checkpoints.save_checkpoint(path, values)
    relink(seed, name)
    predict.load_run(seed)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, "\xff", "3", "{", '{"config": 3}', '{"config": {}}',
        '{"config": {"seed": 0}, "data": "f"}',
    ],
    ids=range(7),
)  # fmt: skip
def test_a_damaged_config_json_is_exit_4(text, tmp_path):
    (tmp_path / "vqvae_best.pt").touch()  # the folder of a seed
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in failure(predict.load_run, tmp_path, code=Exit.CHECKPOINT)


def test_a_training_checkpoint_that_lacks_a_part_is_exit_4(seed, data, finished):
    shutil.copy(finished[0] / "out/config.json", seed.parent)
    path = seed / "dcgan_last.pt"
    values = checkpoints.load_checkpoint(path)
    for key in ("nimg", "parts", "sums", "seconds"):
        checkpoints.save_checkpoint(path, {k: v for k, v in values.items() if k != key})
        code = ending(train.main, data=data, out=seed.parent, stage="all")
        assert code == Exit.CHECKPOINT, key


# --- numbers that are not finite ----------------------------------------------------------


def test_a_nan_in_the_loss_is_exit_6_and_the_last_checkpoint_is_from_before(
    data, tmp_path, monkeypatch, capsys
):
    factors, real = iter([1, 1, 1, np.nan]), train.loss_of

    def with_nan_in_the_fourth_step(*given):
        loss = real(*given)
        return lambda *images: loss(*images) * next(factors)

    monkeypatch.setattr(train, "loss_of", with_nan_in_the_fourth_step)
    monkeypatch.setattr(stages_stage, "CHECKPOINT_EVERY_S", 0)
    assert ending(driver.main, data=data, out=tmp_path / "out") == Exit.DIVERGED
    error = capsys.readouterr().err
    for word in ("vqvae diverged", "step 4", "32 slices seen", "vqvae_last.pt"):
        assert word in error
    assert checkpoints.load_checkpoint(tmp_path / "out/seed-0/vqvae_last.pt")["nimg"] == 24
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["best"] is None and written["runs"][0]["status"] == "diverged"


PARTS = "encoder", "codebook", "decoder", "generator", "denoiser"
OVERFLOW = [("encoder", 1e30), ("decoder", 1e30)]


@pytest.mark.parametrize(("part", "factor"), [(part, np.nan) for part in PARTS] + OVERFLOW)
def test_weights_that_are_not_finite_or_overflow_write_no_picture(
    part, factor, seed, slices, tmp_path, monkeypatch
):
    real = predict.load_run

    def spoiled(*arguments):
        run = real(*arguments)
        for weights in {
            "encoder": run.vqvae.encoder.parameters(),
            "codebook": [run.vqvae.quantizer.codebook],
            "decoder": run.vqvae.decoder.parameters(),
            "generator": run.generator.parameters(),
            "denoiser": run.denoiser.parameters(),
        }[part]:
            weights *= factor
        return run

    monkeypatch.setattr(predict, "load_run", spoiled)
    command = ["generate", "--n", 1]
    if part in ("encoder", "codebook"):
        command = ["reconstruct", "--data", slices / "keras_png_slices_test"]
    done = called("predict.py", *command, seed, "--out", "x", cwd=tmp_path)
    assert done.returncode == Exit.DIVERGED and not list(tmp_path.glob("x/*"))
    assert "not finite" in done.stderr and done.stderr.count("\n") == 1


def test_results_leave_out_scores_that_are_not_finite(finished, tmp_path):
    values = files.read_json(finished[0] / "out/seed-0/metrics.json")
    for number, score in enumerate((np.nan, 3.0, np.inf)):
        values["generation"][results.SCORE]["generated"] = score
        (tmp_path / f"seed-{number}").mkdir()
        (tmp_path / f"seed-{number}/metrics.json").write_text(json.dumps(values))
    rows = {seed: results.row_of(tmp_path, seed, 8) for seed in range(4)}
    states = [row["status"] for row in rows.values()]
    assert states == ["diverged", "done", "diverged", "unfinished"]
    results.write(tmp_path, rows)
    assert json.loads((tmp_path / "results.json").read_text())["best"] == "seed-1"
    other = results.row_of(tmp_path, 1, 16)  # FD of 8 and of 16 slices cannot be compared
    assert other["status"] == "unfinished" and "8 slices, not 16" in other["why"]
    (tmp_path / "seed-1/metrics.json").write_text("{}")
    assert "metrics.json" in failure(results.row_of, tmp_path, 1, 8, code=Exit.CHECKPOINT)


def test_a_score_that_is_not_finite_is_never_written(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(FloatingPointError, match=r"x\.json"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
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
        (endings.Interrupted(signal.SIGTERM), 143),
        (endings.Interrupted(signal.SIGUSR1), 143),
        (endings.Interrupted(signal.SIGINT), 130),
    ],
)
def test_every_ending_has_its_code_and_one_line(problem, code, capsys):
    assert endings._ending(mock.Mock(side_effect=problem)) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(("error: ", "stopped by "))


def test_a_bug_is_exit_1_and_its_traceback_is_in_run_log(tmp_path, capsys):
    def main():
        with messages.logging_to(tmp_path / "run.log"):
            raise KeyError("a bug")

    assert endings._ending(main) == Exit.BUG
    assert "KeyError: 'a bug'" in (tmp_path / "run.log").read_text()


def test_commands_that_start_together_get_different_folders(tmp_path):
    start = threading.Barrier(8)

    def make(_):
        start.wait()
        return runs.new_folder(tmp_path, "generated")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(make, range(8)))
    assert len(set(found)) == 8 and all(folder.is_dir() for folder in found)
