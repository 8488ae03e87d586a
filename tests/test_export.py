"""Exports load back to the same samples, bit by bit; volumes lie as the head does."""

import argparse
import re
from dataclasses import replace

import cv2
import nibabel
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from test_report import a_run, result

import predict
from config import Exit, UserError
from dataset import PRIVATE
from loading import embedded
from scores import evaluation, export, figures, metrics
from support import checkpoints, files


@pytest.fixture
def run(tmp_path):
    run = a_run(tmp_path / "out/seed-0")
    scores = result()
    scores["generation"]["memorised_share"] = {"generated": 0.125, "planted_copies": 1.0}
    files.write_json(run.folder / "metrics.json", scores)
    counts = {"train": 10, "validation": 2, "test": 2}
    report = {
        "source": "embedded set", "root": "/home/somebody", "split": "by subject",
        "skipped": [], "subjects": counts, "slices": counts,
    }  # fmt: skip
    files.write_json(run.folder.parent / "data_report.json", report)
    return run


def test_an_export_draws_the_same_bits_and_remembers_its_run(run, tmp_path):
    run = replace(run, config=replace(run.config, data="/home/somebody"), stamp=PRIVATE)
    before = run.sample(6, seed=3)[1]
    export.export(run, tmp_path / "shared")
    assert 0 < (run.sample(6, seed=3)[1] - before).abs().mean() < 0.01  # rounded to float16
    back = predict.load_run(tmp_path / "shared", "cpu")
    for mine, theirs in zip(run.sample(6, seed=3), back.sample(6, seed=3), strict=True):
        assert torch.equal(mine, theirs) and len(mine.unique()) > 4
    assert torch.equal(run.sweep(3)[1], back.sweep(3)[1])
    assert torch.equal(run.reconstruct(before)[1], back.reconstruct(before)[1])
    assert torch.equal(run.counts, back.counts)
    assert back.config.identity() == run.config.identity()
    assert (back.seed, back.stamp, back.fingerprint) == (run.seed, PRIVATE, "f")
    example = cv2.imread(str(tmp_path / "shared/example.png"), cv2.IMREAD_UNCHANGED)
    sample = back.sample(1, seed=1)[1][0, 0].numpy()
    np.testing.assert_array_equal(example[2:258, 2:258], np.rint(255 * sample))


def test_the_pretrained_run_draws_its_example():
    folder = ROOT / "pretrained"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    drawn = predict.load_run(folder, "cpu").sample(8, seed=1)[1][:, 0].numpy()
    example = cv2.imread(str(folder / "example.png"), cv2.IMREAD_UNCHANGED)
    pair = (torch.from_numpy(x)[None, None] / 255 for x in (figures.grid(drawn, 4), example))
    assert metrics.ssim(*pair) > 0.95  # on another machine some cells differ


def test_the_card_says_whose_data_how_good_and_how_much_is_copied(run, tmp_path):
    export.export(run, tmp_path / "public")
    export.export(replace(run, stamp=PRIVATE), tmp_path / "private")
    public, private = (
        (tmp_path / name / "README.md").read_text() for name in ("public", "private")
    )
    assert "| train | 10 | 10 |" in public and "12.5 % of the\nsamples" in public
    assert all(label in public for label in evaluation.LABELS.values())
    assert "Louis Collins" in public and "OASIS" not in public
    assert PRIVATE in private and "data-use agreement" in private
    for path in (tmp_path / "private").iterdir():
        assert b"/home/somebody" not in path.read_bytes()
    names = set(re.findall(r"`([\w.]+\.\w+)`|\((\S+\.png)\)", public))
    assert {a or b for a, b in names} < {path.name for path in (tmp_path / "public").iterdir()}


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/README.md").write_text("my thesis")
    for folder in (tmp_path / "thesis", run.folder):
        before = {path: path.read_bytes() for path in folder.rglob("*.*")}
        with pytest.raises(UserError, match="holds other files") as problem:
            export.export(run, folder)
        assert problem.value.code == Exit.BUSY
        assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}
    export.export(run, tmp_path / "shared")
    export.export(replace(run, seed=7), tmp_path / "shared")  # an earlier export's may be
    assert predict.load_run(tmp_path / "shared").seed == 7


def test_pictures_of_an_export_do_not_go_into_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = tmp_path / "runs/shared"
    export.export(run, shared)
    before = set(shared.iterdir())
    given = argparse.Namespace(n=1, seed=0, level=None, volume=False, out="")
    predict.generate_command(predict.load_run("runs/shared"), given)
    assert (tmp_path / "runs/shared-generated/00000.png").exists()
    assert set(shared.iterdir()) == before


def harmed(blob: bytes, harm: str) -> bytes:
    """The weights of an export, with something wrong."""
    tensors = safetensors.torch.load(blob)
    if harm == "a flipped bit":
        return blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:]
    if harm == "no safetensors":
        return b"hello"
    if harm == "other tensors":
        tensors = {"somebody.weight": torch.zeros(3)}
    if harm == "an infinite number":
        tensors["codes.points"] = torch.full_like(tensors["codes.points"], torch.inf)
    if harm == "no codes":
        del tensors["codes.points"]
    return safetensors.torch.save(tensors)


@pytest.mark.parametrize(
    "harm",
    ["a flipped bit", "no safetensors", "other tensors", "an infinite number", "no codes"],
)
def test_a_damaged_export_is_refused_and_named(run, tmp_path, harm):
    weights, config = tmp_path / "shared/model.safetensors", tmp_path / "shared/config.json"
    export.export(run, tmp_path / "shared")
    weights.write_bytes(harmed(weights.read_bytes(), harm))
    if harm != "a flipped bit":  # the checksum fits
        values = files.read_json(config) | {"checksum": checkpoints.checksum(weights)}
        files.write_json(config, values)
    with pytest.raises(UserError, match=r"model\.safetensors") as problem:
        predict.load_run(tmp_path / "shared")
    assert problem.value.code == Exit.CHECKPOINT


def test_a_volume_lies_as_the_head_does(run, tmp_path):
    slices = run.sweep(9)[1]
    export.write_volume(tmp_path / "volume.nii.gz", slices, PRIVATE)
    volume = nibabel.load(tmp_path / "volume.nii.gz")
    assert volume.shape == (256, 256, 9) and volume.get_data_dtype() == np.uint8
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    np.testing.assert_allclose(volume.header.get_zooms(), (1, 1, export.HEIGHT_MM / 8))
    assert volume.header.get_xyzt_units()[0] == "mm"
    middle = (np.array(volume.shape) - 1) / 2
    np.testing.assert_allclose(nibabel.affines.apply_affine(volume.affine, middle), 0)
    assert PRIVATE.encode() in volume.header["descrip"].tobytes()
    voxels = np.asarray(volume.dataobj)
    # From the front to the back, from the patient's right to the left.
    pixels = np.rint(255 * slices[:, 0].numpy())
    np.testing.assert_array_equal(voxels[::-1, ::-1].transpose(2, 1, 0), pixels)
    assert len(np.unique(voxels)) > 4 and (voxels[..., 0] != voxels[..., 8]).any()


def test_the_height_of_a_volume_is_that_of_embedded_heads():
    people = (embedded._Person(np.random.default_rng([0, 0, i])) for i in range(3))
    heights = [np.ptp(person.heights(32)) for person in people]
    assert abs(np.mean(heights) - export.HEIGHT_MM) < 8
