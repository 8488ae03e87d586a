"""Shared by the tests: scripts in this or another process, a tiny data set, its trained run."""

import argparse
import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import pytest
import torch

from support import cli, endings

torch.set_num_threads(1)  # several small tests at once; and the same bits on any machine
ROOT = Path(__file__).parent.parent
SMALL = [
    "--codes", "16", "--widths", "4", "4", "4", "4", "--batch-size", "8",
    "--vqvae-kimg", "0.08", "--decoder-kimg", "0.08",
    "--gan-widths", "4", "4", "--gan-batch-size", "8", "--gan-kimg", "0.08",
    "--denoiser-kimg", "0.08", "--samples", "8",
]  # fmt: skip


def script(name, *arguments, cwd, timeout=600, **env):
    """Run a script in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)],
        cwd=cwd, timeout=timeout, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def called(name, *arguments, cwd) -> SimpleNamespace:
    """Run a script's main function in this process, which saves the import of torch.

    Returns returncode, stdout and stderr, as `script`.
    """
    module, argv = importlib.import_module(Path(name).stem), [name, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
    ):  # fmt: skip
        try:
            parsed = module.parse() if name == "predict.py" else parsed_by(name, argv[1:])
            code = int(endings._ending(lambda: module.main(parsed)))
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def parsed_by(name, words: list[str]) -> argparse.Namespace:
    """The arguments of driver.py or train.py."""
    parser = cli.Parser("")
    cli.add_options(parser)
    if name == "train.py":
        parser.add_argument("--stage", default="all")
    return parser.parse_args(list(map(str, words)))


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers that a test does not seed itself are the same in every run."""
    torch.manual_seed(0)


def disks(n: int, seed: int, wide: float = 1.0) -> torch.Tensor:
    """Bright ellipses of random sizes and grey levels on black: (n,1,256,256)."""
    draw, images = np.random.default_rng(seed), np.zeros((n, 256, 256), np.uint8)
    for image in images:
        axes = int(wide * draw.integers(45, 65)), int(draw.integers(70, 110))
        cv2.ellipse(image, (128, 128), axes, 0, 0, 360, int(draw.integers(100, 250)), -1)
    return torch.from_numpy(images)[:, None].float() / 255


@pytest.fixture(scope="session")
def slices(tmp_path_factory):
    """The course's layout: 24 + 4 + 4 cases of 4 slices, under a name with a space and an ä."""
    root = tmp_path_factory.mktemp("Schnitte ä") / "keras_png_slices_data"
    draw, case = np.random.default_rng(0), 0
    for part, cases in (("train", 24), ("validate", 4), ("test", 4)):
        folder = root / f"keras_png_slices_{part}"
        folder.mkdir(parents=True)
        for _ in range(cases):
            case += 1
            for k in range(4):
                image = np.zeros((256, 256), np.uint8)
                axes = (int(draw.integers(50, 90)), int(draw.integers(70, 110)))
                cv2.ellipse(image, (128, 128), axes, 0, 0, 360, int(draw.integers(80, 250)), -1)
                file = folder / f"case_{case:03d}_slice_{k}.nii.png"
                file.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return root


@pytest.fixture(scope="session")
def finished(slices, tmp_path_factory):
    """A folder in which `driver.py --out out --runs 2` has run, and what it printed."""
    where = tmp_path_factory.mktemp("work")
    done = script("driver.py", "--data", slices, "--out", "out", "--runs", 2, *SMALL, cwd=where)
    assert done.returncode == 0, done.stderr
    return where, done
