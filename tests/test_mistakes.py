"""Common mistakes: each message says what is wrong, where, and what to do."""

import contextlib
import io
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, called
from test_dataset import failure

import predict
from config import Config, Exit
from support import device, endings, messages


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder with a finished run, one that was stopped early, and odd files."""
    monkeypatch.chdir(tmp_path)
    for name in ("good/seed-0/figures", "early/seed-0", "two/seed-0", "two/seed-1"):
        Path("runs", name).mkdir(parents=True)
    Path("runs/good/results.json").write_text(json.dumps({"best": "seed-0"}))
    config = {"config": Config().to_dict(), "data": "f", "stamp": ""}
    Path("runs/early/seed-0/config.json").write_text(json.dumps(config))
    Path("notes.txt").write_text("hello")
    Path("empty").mkdir()


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("runs/god", ["runs/god", "does not exist", "runs/quick"]),
        ("notes.txt", ["notes.txt", "is a file", "folder"]),
        ("empty", ["empty", "holds no run", "driver.py"]),
        ("runs", ["several results folders", "one of them: good"]),
        ("runs/good/seed-0/figures", ["figures", "holds no run", "results folder"]),
        ("runs/two", ["runs/two", "driver.py again", "seed-*"]),
        ("runs/early", ["early/seed-0/vqvae_best.pt", "finished?", "driver.py continues"]),
    ],
)
def test_a_wrong_run_folder_is_exit_4(folders, run, words):
    message = failure(predict.load_run, run, code=Exit.CHECKPOINT)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["driver.py", "--gan-kmg"], "did you mean --gan-kimg?"),
        (["driver.py", "--commitment"], "did you mean --set commitment=VALUE?"),
        (["driver.py", "--colour"], "see --help"),
        (["predict.py", "generate", "RUN", "--noise"], "see --help"),  # lacks --set noise_dim
    ],
)
def test_a_mistyped_flag_names_the_nearest(words, hint, tmp_path):
    done = called(*words, "3", cwd=tmp_path)
    assert done.returncode == Exit.USAGE
    assert done.stderr == f"error: unrecognized arguments: {words[-1]} 3; {hint}\n"


def test_an_old_torch_is_exit_2_with_the_command_that_upgrades_it():
    for version in ("2.10.0", "2.15.0+cpu", "3.0.1", torch.__version__):
        endings.check_torch(version)
    for version in ("1.13.1+cu117", "2.9.1", "2.2.0a0"):
        message = failure(endings.check_torch, version, code=Exit.USAGE)
        assert version in message and "pip install --upgrade 'torch>=2.10'" in message
    oldest = re.search(r"^torch>=(\d+)\.(\d+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert tuple(map(int, oldest.groups())) == endings.OLDEST_TORCH


def test_every_script_checks_torch_first(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.0.1")
    assert endings._ending(lambda: pytest.fail("it ran")) == Exit.USAGE
    assert "torch 2.0.1 is too old" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_exit_2(monkeypatch):
    absent = AssertionError("Torch not compiled with CUDA enabled")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "zeros", mock.Mock(side_effect=absent))
    message = failure(device.choose_device, "cuda", code=Exit.USAGE)
    assert re.search("not compiled.*use cpu.*built without CUDA", message)


def test_a_closed_terminal_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with contextlib.redirect_stdout(Gone()), contextlib.redirect_stderr(Gone()):
        messages.say("a line")
        messages.warn("another")
