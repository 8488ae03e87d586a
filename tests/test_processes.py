"""Distributed training: N processes train the same weights, end together, write files once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, SMALL, script
from test_dataset import failure
from test_faults import ending
from test_train import differing, final_state

import train
from config import Config, Exit
from support import distributed
from support.checkpoints import load_checkpoint
from support.files import Log, read_json


def torchrun(count, name, *arguments, cwd):
    """Start several processes as a user does; the caller waits for them."""
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)
    return subprocess.Popen(
        [sys.executable, *launch, str(ROOT / name), *map(str, arguments)],
        cwd=cwd, text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """How far the steps of steps.py move the weights in one process."""
    where = tmp_path_factory.mktemp("steps")
    done = script("tests/steps.py", "one.pt", cwd=where)
    assert done.returncode == 0, done.stderr
    return torch.load(where / "one.pt", weights_only=True)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_take_the_same_steps_as_one(moved, count, tmp_path):
    code, _, err = finish(torchrun(count, "tests/steps.py", "all.pt", cwd=tmp_path))
    assert code == 0, err
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert moved["revived"] == found["revived"] == 5
    for name in ("gan", "decoder"):
        assert moved[f"{name}.losses"][1, -2:].min() > 0  # penalties are among what is compared
    for name, value in moved.items():
        # 2 % of each movement: rounding that moves one activation over its kink is 0.5 %.
        within = 0.02 * value.abs().max() + 1e-7
        assert (found[name] - value).abs().max() <= within, name


@pytest.fixture(scope="module")
def together(slices, tmp_path_factory):
    """A folder after driver.py with two processes, and what it printed."""
    where = tmp_path_factory.mktemp("together")
    done = torchrun(2, "driver.py", "--data", slices, "--out", "out", *SMALL, cwd=where)
    code, out, err = finish(done)
    assert code == 0, err
    return where, out


def test_two_processes_write_and_print_once(together, finished):
    where, out = together
    alone = finished[1].stdout.partition("seed 1")[0]
    words = [[line.split()[0] for line in text.splitlines()] for text in (alone, out)]
    assert words[1][: len(words[0])] == words[0]
    one, two = (folder / "out" / "seed-0" for folder in (finished[0], where))
    files = [{p.name for p in seed.iterdir() if p.is_file()} for seed in (one, two)]
    assert files[0] == files[1]  # other tests may have added folders of samples
    rows = [[(r["stage"], r["nimg"]) for r in Log(p / "log.csv").rows()] for p in (one, two)]
    assert rows[0] == rows[1]
    results = read_json(where / "out" / "results.json")
    assert results["best"] == "seed-0" and results["finished"]


def test_two_processes_make_the_same_index_maps_as_one(together, slices, tmp_path, monkeypatch):
    monkeypatch.chdir(together[0])  # its cache of slices
    shutil.copytree("out", tmp_path / "out")
    maps = tmp_path / "out" / "seed-0" / "codes.npy"
    before = maps.read_bytes()
    maps.unlink()
    code = ending(train.main, data=slices, out=tmp_path / "out", stage="codes")
    assert code == Exit.DONE and maps.read_bytes() == before


def wait_for(path: Path, rows: int, process):
    """Wait until log.csv has so many rows."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and len(Log(path).rows()) >= rows:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_two_processes_continue_bit_for_bit(together, slices, tmp_path):
    """SIGTERM as a cluster sends it, in two stages; then the same command once more."""
    options = ["--stage", "all", "--data", slices, "--out", "out", *SMALL]
    log = tmp_path / "out" / "seed-0" / "log.csv"
    for rows in (3, 23):
        process = torchrun(2, "train.py", *options, cwd=tmp_path)
        wait_for(log, rows, process)
        process.send_signal(signal.SIGTERM)
        code, _, err = finish(process)
        assert code != 0 and "stopped by SIGTERM. To continue: the same torchrun command" in err
    code, out, err = finish(torchrun(2, "train.py", *options, cwd=tmp_path))
    assert code == 0 and "resuming at" in out, err
    mine, whole = (
        SimpleNamespace(path=(folder / "out/seed-0").joinpath)
        for folder in (tmp_path, together[0])
    )
    assert differing(final_state(mine), final_state(whole)) == []


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_checkpoints_are_intact(slices, tmp_path):
    flags = ["--stage", "all", "--data", slices, "--out", "out", *SMALL]
    flags[flags.index("--decoder-kimg") + 1] = "4"  # long enough to be killed in it
    seed = tmp_path / "out" / "seed-0"
    process = torchrun(2, "train.py", *flags, cwd=tmp_path)
    wait_for(seed / "log.csv", 12, process)  # 10 rows of the VQ-VAE
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    pids = sorted(map(int, children.split()))
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = finish(process, timeout=60)
    # The other one ends by itself, unless torchrun is faster and sends it SIGTERM.
    ends = "error: this process could not reach the others", "stopped by SIGTERM"
    assert code != 0 and any(end in err for end in ends), err
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert load_checkpoint(seed / "vqvae_last.pt")["nimg"] == 80


def test_a_batch_that_does_not_divide_evenly_is_exit_2(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 3)
    message = failure(train.check_shares, Config(batch_size=8), code=Exit.USAGE)
    assert "--batch-size 8 does not divide evenly" in message


def test_a_process_that_others_left_is_exit_143(monkeypatch):
    left = mock.Mock(side_effect=RuntimeError("Connection closed by peer\nstack"))
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", left)
    message = failure(distributed.sum_, torch.ones(1), code=Exit.TERMINATED)
    assert message.endswith("continues. Cause: Connection closed by peer")
