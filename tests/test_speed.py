"""Speed is compared between equals: both sides compute the same; what is counted is right."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import sides
import speed
import torch
import torch.nn.functional as F

import train
from config import Config
from dataset import BrainSlices

ROOT = Path(__file__).parent.parent
CONFIG = Config(codes=64, gan_widths=(8, 8), precision="float32", device="cpu")


@pytest.fixture(scope="module")
def here():
    """In place of the embedded set: 32 textured ellipses on black."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    a, b = draw.uniform(0.4, 0.8, (2, 32, 1, 1))
    inside = (x / a) ** 2 + (y / b) ** 2 < 1
    images = (
        inside * (120 + 60 * np.cos(20 * x * a) + draw.normal(0, 9, (32, 256, 256)))
    ).clip(0)
    split = BrainSlices(images.astype(np.uint8), range(32), ["s"] * 32, np.linspace(0, 1, 32))
    made = sides.Inputs("", "")
    made.config, made.data = CONFIG, SimpleNamespace(train=split)
    return made


def close(ours, theirs, rtol=1e-3):
    """Gradients add up tens of thousands of float32 numbers, each side in another order.

    Where rounding is all there is (the loss does not see the discriminator's last bias), two
    numbers below 1e-8 are alike.
    """
    atol = max(rtol * theirs.abs().max().item(), 1e-8)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_the_plain_vqvae_step_has_the_projects_loss_gradients_and_codebook(here):
    model = sides.some_vqvae(here, CONFIG)
    twin, images = sides.plain_twin(model), here.slices(4)
    assert torch.equal(twin.encode(images), model.encode(images).flatten())
    adams = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (model, twin)]
    corner = sides.a_corner(images)
    ours = train.vqvae_step(model, adams[0], CONFIG, 1.0, images, corner, True)[0]["loss"]
    theirs = plain.vqvae_step(twin, adams[1], images, CONFIG, corner)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    others = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        close(parameter.grad, others[name].grad)
    for name in ("codebook", "count", "sum"):
        close(getattr(model.quantizer, name), getattr(twin.quantizer, name), rtol=1e-5)


def one_dcgan_step(here, function, penalise: bool):
    """Losses of one step, and how far it moved every weight: by SGD, so as gradients say."""
    gan = sides.a_gan(here, CONFIG, fused=False)
    gan.G_optimizer = torch.optim.SGD(gan.G.parameters(), lr=0.01)
    gan.D_optimizer = torch.optim.SGD(gan.D.parameters(), lr=0.01)
    weights = [*gan.G.parameters(), *gan.D.parameters()]
    before = [w.detach().clone() for w in weights]
    losses = function(gan, *gan.ready, penalise)
    return (losses["g_loss"], losses["d_loss"]), [
        w.detach() - old for w, old in zip(weights, before, strict=True)
    ]


@pytest.mark.parametrize("penalise", [True, False])
def test_the_plain_dcgan_step_has_the_projects_losses_and_moves_its_weights_alike(
    here, penalise
):
    ours, mine = one_dcgan_step(here, train.dcgan_step, penalise)
    theirs, others = one_dcgan_step(here, plain.dcgan_step, penalise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(mine, others, strict=True):
        close(a, b)


def test_plain_ssim_and_detail_are_the_projects(here):
    x, y = sides.ssim_pair(here, loss=True)
    torch.testing.assert_close(plain.ssim(x, y), sides.metrics.ssim(x, y), rtol=0, atol=1e-5)
    ours = sides.metrics.detail_strength(x)
    torch.testing.assert_close(plain.detail(x), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_the_libraries_search_finds_the_same_codes(here, dense):
    pytest.importorskip("monai")
    pytest.importorskip("vector_quantize_pytorch")
    found = {}
    for make in (sides.search_here, sides.search_monai, sides.search_vqp):
        torch.manual_seed(0)
        work, items = make(dense, here)
        assert items == 32_768
        found[make] = work()
    ours = found[sides.search_here]
    monai = found[sides.search_monai][0].permute(0, 2, 3, 1).flatten(0, 2)
    vqp = found[sides.search_vqp][0].flatten(0, 1)
    for other in (monai, vqp):  # two codes may be equally near, but for rounding
        assert ((ours - other).abs().amax(1) < 1e-5).float().mean() > 0.9999


def test_every_side_is_in_the_table_and_every_line_has_its_sides():
    for line in speed.LINES:
        assert {line.here, line.other} <= set(speed.GROUPS[line.group])
    shown = {(line.group, side) for line in speed.LINES for side in (line.here, line.other)}
    made = {(group, side) for group in speed.GROUPS for side in speed.GROUPS[group]}
    assert made - shown == {("machine", side) for side in speed.GROUPS["machine"]}
    assert set(speed.COUNTED) <= made


def test_bytes_and_operations_of_known_operators():
    a, x = torch.ones(20, 30), torch.ones(1, 2, 8, 8)
    with speed.Count() as counted:
        a.T @ a  # reads one tensor, though twice
        F.conv2d(x, torch.ones(4, 2, 3, 3))
        a.expand(5, 20, 30).sum()
    found = counted.operators
    assert found["mm"]["operations"] == 2 * 30 * 20 * 30
    assert found["mm"]["bytes"] == 4 * (20 * 30 + 30 * 30)
    assert found["convolution"]["operations"] == 2 * (6 * 6 * 4) * (2 * 3 * 3)
    assert found["convolution"]["bytes"] == 4 * (2 * 8 * 8 + 4 * 2 * 9 + 4 * 6 * 6)
    assert found["sum"]["bytes"] == 4 * (20 * 30 + 1)
    assert found["permute"]["bytes"] == found["expand"]["bytes"] == 0


def measured() -> dict:
    """A file of results in which every side took 1 s an item, and this project's 0.1 s."""
    groups = {
        group: {"seconds": {s: [9.0, 0.1 if s.startswith("here") else 1.0, 0.01] for s in
                            speed.contenders(group)}, "counts": {}}
        for group in speed.GROUPS
    }  # fmt: skip
    step = {"items": 2, "operators": {"mm": {"bytes": 5, "operations": 4, "seconds": 3}}}
    groups["dcgan"]["counts"]["here"] = step
    machine = {"processor": "one", "cores": 2, "torch": "2"}
    return {"groups": groups, "bfloat16": True, "machine": machine}


def test_the_table_shows_ratios_of_medians_and_what_is_not_installed():
    found = measured()
    found["groups"]["ssim"]["seconds"][speed.MSSSIM] = None
    lines = speed.table(found).splitlines()
    assert "| 10.0 slices/s | plain | 1 slices/s | 10.0x | 10.0x | 10x |" in lines[2]
    (missing,) = [line for line in lines if "not installed" in line]
    assert missing.startswith("| SSIM as a metric") and "| - |" in missing
    assert "pip install -r benchmarks/requirements.txt" in missing
    step = lines[-3]  # of 0.2 s, where a byte or an operation takes 0.1 s at best
    assert step.startswith("| DCGAN") and "`mm` 100 %" in step
    assert "(250 %)" in step and "(200 %)" in step


def test_a_library_that_is_absent_does_not_end_the_run(monkeypatch):
    class Absent(dict):
        def __init__(self, *places):
            pass

        def ask(self, function, group, side):
            if not side.startswith("here"):
                raise ModuleNotFoundError(side)
            return 0.5

        def close(self):
            pass

    monkeypatch.setattr(speed, "Pools", Absent)
    found = speed.measure("search", "", "")["seconds"]
    assert found["here"] == [0.5] * speed.TURNS
    assert {found[s] for s in speed.contenders("search") if s != "here"} == {None}


def test_the_readme_has_a_place_for_the_tables_with_this_scripts_rows():
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- speed -->")[1].split("<!-- /speed -->")[0].strip()
    steps = {f"| {label}" for label in speed.COUNTED.values()}
    works = steps | {line.split(" | ")[0] for line in speed.table(measured()).splitlines()}
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert {row.split(" | ")[0] for row in rows} <= works
