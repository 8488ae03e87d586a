"""Common mistakes: each message says what is wrong, where, and what to do."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch

import predict
from config import Config, Exit, UserError
from loading import sources
from support import cli, device, endings, messages

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder with a finished run, one that was stopped early, and odd files."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/good/seed-0/figures", "runs/early/seed-0", "runs/two/seed-0", "empty"):
        Path(name).mkdir(parents=True)
    Path("runs/two/seed-1").mkdir()
    Path("runs/good/results.json").write_text(json.dumps({"best": "seed-0"}))
    Path("runs/early/seed-0/config.json").write_text(
        json.dumps({"config": Config().to_dict(), "data": "f", "stamp": ""})
    )
    Path("notes.txt").write_text("hello")


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
    with pytest.raises(UserError) as problem:
        predict.load_run(run)
    assert problem.value.code == Exit.CHECKPOINT
    assert all(word in str(problem.value) for word in words), problem.value


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--gan-kmg", "did you mean --gan-kimg?"),
        ("--commitment", "did you mean --set commitment=VALUE?"),
        ("--colour", "see --help"),
    ],
)
def test_a_mistyped_flag_names_the_nearest(capsys, word, hint):
    parser = cli.Parser("")
    cli.add_options(parser)
    with pytest.raises(SystemExit) as problem:
        parser.parse_args([word, "3"])
    assert problem.value.code == Exit.USAGE
    assert capsys.readouterr().err == f"error: unrecognized arguments: {word} 3; {hint}\n"


def test_predict_suggests_no_option_that_it_lacks(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["predict.py", "generate", "RUN", "--noise", "3"])
    with pytest.raises(SystemExit):
        predict.parse()  # --set noise_dim=3 is for training
    assert "--noise 3; see --help" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data.zip", "OASIS.tar.gz"])
def test_an_archive_must_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match="unpack it, and give the folder"):
        sources.find(tmp_path / name, Config())


def test_a_folder_with_only_segmentations_is_exit_3(tmp_path):
    (tmp_path / "keras_png_slices_seg_train").mkdir()
    (tmp_path / "keras_png_slices_seg_train/seg_001_slice_0.nii.png").write_bytes(b"")
    with pytest.raises(UserError, match="it holds 1 segmentations") as problem:
        sources.find(tmp_path, Config())
    assert problem.value.code == Exit.DATA


def test_an_old_torch_is_exit_2_with_the_command_that_upgrades_it():
    for version in ("2.10.0", "2.15.0+cpu", "3.0.1", torch.__version__):
        endings.check_torch(version)
    for version in ("1.13.1+cu117", "2.9.1", "2.2.0a0"):
        with pytest.raises(UserError, match=r"pip install --upgrade 'torch>=2.10'") as problem:
            endings.check_torch(version)
        assert version in str(problem.value) and problem.value.code == Exit.USAGE
    oldest = re.search(r"^torch>=(\d+)\.(\d+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert tuple(map(int, oldest.groups())) == endings.OLDEST_TORCH


def test_every_script_checks_torch_first(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.0.1")
    assert endings._ending(lambda: pytest.fail("it ran")) == Exit.USAGE
    assert "torch 2.0.1 is too old" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["notes.txt", "notes.txt/inside"])
def test_an_output_folder_that_is_a_file_is_exit_7(folders, capsys, place):
    end = endings._ending(lambda: predict.write_slices(Path(place), iter(())))
    said = capsys.readouterr().err
    assert end == Exit.WRITE and said.count("\n") == 1
    assert place in said and "choose another --out" in said


def test_cuda_without_a_gpu_is_exit_2(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)

    def absent(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "zeros", absent)
    with pytest.raises(
        UserError, match=r"not compiled.*use cpu.*built without CUDA"
    ) as problem:
        device.choose_device("cuda")
    assert problem.value.code == Exit.USAGE


def test_a_closed_terminal_does_not_end_the_run(monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        flush = write

    with contextlib.redirect_stdout(Gone()), contextlib.redirect_stderr(Gone()):
        messages.say("a line")
        messages.warn("another")
