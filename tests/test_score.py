"""`predict.py score`: any two folders of slices, without a run."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import called, disks


def write(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        pixels = np.rint(255 * image[0].numpy()).astype(np.uint8)
        (folder / f"{i:05d}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return folder


def score(cwd, *arguments):
    return called("predict.py", "score", *arguments, "--cache", "cache", cwd=cwd)


@pytest.fixture
def real(slices):
    return slices / "keras_png_slices_train"


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fakes") / "new", disks(16, 1, wide=1.6))


def test_two_folders_are_scored_beside_unseen_people(slices, real, fakes, tmp_path):
    done = score(tmp_path, real, fakes, "--against", slices / "keras_png_slices_test")
    assert done.returncode == 0, done.stderr
    scores = json.loads((fakes / "scores.json").read_text())
    fd = scores["fd_train"]
    assert scores["n"] == 16 and set(fd) == {"generated", "real", "unseen_people"}
    assert fd["generated"] > fd["real"]  # wider
    assert fd["unseen_people"] < 5 * fd["real"] + 1  # drawn alike
    assert 0 <= scores["judge_auc_test"]["generated"] <= 1
    assert scores["memorised_share"]["planted_copies"] == 1
    for label in ("relative FD", "KID", "trained judge", "tissue areas", "memorised share"):
        assert label in done.stdout
    assert "96 slices of 24 subjects" in done.stdout and "left out" not in done.stdout
    assert "only 16 slices of each kind" in done.stdout
    assert not done.stderr


def test_scores_that_need_unseen_people_are_left_out_with_the_reason(real, fakes, tmp_path):
    out = tmp_path / "here.json"
    done = score(tmp_path, real, fakes, "--out", out)
    assert done.returncode == 0, done.stderr
    assert not {"judge_auc_test", "memorised_share"} & set(json.loads(out.read_text()))
    assert "left out: trained judge, memorised share" in done.stdout


def test_the_same_people_on_both_sides_are_warned_of(slices, real, fakes, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(real, again)
    done = score(tmp_path, real, fakes, "--against", again)
    assert "24 subjects, such as case_001" in done.stderr
    nested = score(tmp_path, slices, real)
    assert nested.returncode == 2 and "separate folders" in nested.stderr


def test_too_few_slices_are_an_error(real, tmp_path):
    few = write(tmp_path / "few", torch.nn.functional.avg_pool2d(disks(4, 0), 4))
    done = score(tmp_path, real, few)
    assert done.returncode == 3 and "too few slices: 96 real, 4 generated" in done.stderr
    wrong = score(tmp_path, real, tmp_path / "mistyped")
    assert wrong.returncode == 3 and "mistyped is not a folder" in wrong.stderr
    assert not wrong.stdout  # no other folder was read before
