"""Speed: both sides of a comparison compute the same, and the table shows what was measured."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import speed
import torch

import train
from config import Config
from dataset import BrainSlices
from modules import VQVAE
from scores import metrics
from stages.losses import structural_loss

ROOT = Path(__file__).parent.parent
SMALL = {"codes": 64, "gan_widths": (8, 8), "precision": "float32", "device": "cpu"}
CONFIG = Config(optimizer="adam", **SMALL)


@pytest.fixture(scope="module")
def here():
    """32 textured ellipses on black instead of the embedded set."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    a, b = draw.uniform(0.4, 0.8, (2, 32, 1, 1))
    inside = (x / a) ** 2 + (y / b) ** 2 < 1
    texture = 120 + 60 * np.cos(20 * x * a) + draw.normal(0, 9, (32, 256, 256))
    images = (inside * texture).clip(0).astype(np.uint8)
    split = BrainSlices(images, range(32), ["s"] * 32, np.linspace(0, 1, 32))
    made = speed.Inputs("", "")
    made.config, made.data = CONFIG, SimpleNamespace(train=split, images=images)
    return made


def close(ours, theirs, rtol=1e-3):
    """Gradients are sums of tens of thousands of float32 numbers, in another order here.

    The loss does not depend on the discriminator's last bias, so its gradient is only rounding:
    numbers below 1e-8 count as equal.
    """
    atol = max(rtol * theirs.abs().max().item(), 1e-8)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_the_plain_vqvae_step_has_the_same_loss_gradients_and_codebook(here):
    model = speed.some_vqvae(here, CONFIG)
    twin, images = speed.plain_twin(model), here.slices(4)
    assert torch.equal(twin.encode(images), model.encode(images).flatten())
    still = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (model, twin)]
    loss, corner = structural_loss(CONFIG), speed.a_corner(images)
    ours = train.vqvae_step(model, still[0], CONFIG, loss, images, corner, True)[0]["loss"]
    theirs = plain.vqvae_step(twin, still[1], images, CONFIG, corner)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    others = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        close(parameter.grad, others[name].grad)
    for name in ("codebook", "count", "sum"):
        close(getattr(model.quantizer, name), getattr(twin.quantizer, name), rtol=1e-5)


def one_dcgan_step(gan, step, penalise: bool):
    """Losses of one step, and how far it moved each weight. SGD moves it by its gradient.

    In float64: the penalty's gradients magnify rounding.
    """
    gan.G.double(), gan.D.double()
    real, level, noise = (x.double() for x in gan.ready)
    gan.G_optimizer = torch.optim.SGD(gan.G.parameters(), lr=0.01)
    gan.D_optimizer = torch.optim.SGD(gan.D.parameters(), lr=0.01)
    weights = [*gan.G.parameters(), *gan.D.parameters()]
    before = [w.detach().clone() for w in weights]
    losses = step(gan, real, level, noise, penalise)
    moved = [w.detach() - old for w, old in zip(weights, before, strict=True)]
    return (losses["g_loss"], losses["d_loss"]), moved


@pytest.mark.parametrize("penalise", [True, False])
def test_the_plain_dcgan_step_has_the_same_losses_and_moves_weights_alike(here, penalise):
    ours, mine = one_dcgan_step(speed.Gan(here, CONFIG), train.dcgan_step, penalise)
    gan = speed.plain_gan(here, CONFIG)
    theirs, others = one_dcgan_step(gan, plain.dcgan_step, penalise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_dtype=False)
    for a, b in zip(mine, others, strict=True):
        close(a, b)


def test_plain_ssim_and_detail_agree(here):
    x = here.slices(32)
    y = (x + 0.05 * torch.randn(x.shape)).clamp(0, 1)
    torch.testing.assert_close(plain.ssim(x, y), metrics.ssim(x, y), rtol=0, atol=1e-5)
    ours = metrics.detail_strength(x)
    torch.testing.assert_close(plain.detail(x), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_generation_gives_as_many_slices_as_are_counted(here, monkeypatch):
    drawn, decode = [], VQVAE.decode
    monkeypatch.setattr(
        VQVAE, "decode", lambda self, maps: drawn.append(decode(self, maps)) or drawn[-1]
    )
    work, items = speed.generate_here(here)
    work()
    assert torch.cat(drawn).shape == (items, 1, 256, 256)


def test_each_side_of_the_table_exists_and_has_a_label():
    for row in speed.ROWS:
        sides = filter(None, (row.here, row.other))
        assert all(callable(getattr(speed, side)) for side in sides)
        assert row.other.rpartition("_")[2] in speed.LABELS
    assert f"{speed.PNGS:,} PNG" in speed.OPEN


def test_a_turn_gives_seconds_per_item(monkeypatch):
    monkeypatch.setattr(speed, "TURN_S", 0)
    monkeypatch.setattr(speed, "made", lambda side: (lambda: float(6), 3))
    assert speed.turn("any") == 2.0  # measured by the side itself
    calls = []
    monkeypatch.setattr(speed, "made", lambda side: (lambda: calls.append(1), 3))
    assert 0 < speed.turn("any") < 1 and len(calls) == 4  # three to warm up, one is timed
    monkeypatch.setattr(speed, "WARM_S", 0)
    assert 0 < speed.turn("any") < 1 and len(calls) == 4 + 2  # slow work is warm at once


def measured() -> dict:
    """Results in which another side took 1 s an item, and this project's side 0.1 s."""
    sides = [side for group in speed.GROUPS for side in speed.sides_of(group)]
    return {side: [9.0, 0.1 if "_here" in side else 1.0, 0.01] for side in sides}


def test_the_table_shows_ratios_of_medians_and_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(speed, "machine", lambda: "one, 2 cores")
    found = measured() | {"vqvae_monai": None}
    del found["vqvae_monai" + speed.TAMED]
    lines = speed.table(found).splitlines()
    assert "| 10.0 slices/s | plain | 1 slices/s | 10.0x | 10.0x | 10x |" in lines[2]
    (missing,) = [line for line in lines if "not installed" in line]
    assert "| MONAI VQVAE |" in missing and "| - | - | 6x |" in missing
    assert "pip install -r benchmarks/requirements.txt" in missing
    assert lines[-1] == "Measured on one, 2 cores."


def test_a_library_that_is_absent_does_not_end_the_run(monkeypatch):
    class Absent:
        def __init__(self, *given):
            pass

        def submit(self, function, side):
            def result():
                if "_here" not in side:
                    raise ModuleNotFoundError(side)
                return 0.5

            return SimpleNamespace(result=result)

        def shutdown(self):
            pass

    monkeypatch.setattr(speed, "ProcessPoolExecutor", Absent)
    found = speed.measure("dcgan", "", "")
    assert found.pop("dcgan_here") == [0.5] * speed.TURNS
    assert len(found) == 2 and set(found.values()) == {None}


def test_the_page_has_only_rows_of_this_script():
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    shown = page.split("<!-- speed -->")[1].split("<!-- /speed -->")[0].strip()
    works = {line.split(" | ")[0] for line in speed.table(measured()).splitlines()}
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert rows and {row.split(" | ")[0] for row in rows} <= works | {
        "|---|---|---|---|---|---|---|"
    }
