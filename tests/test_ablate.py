"""The table of mappings: its orders are orders, and EXPERIMENTS.md shows what was measured."""

from functools import partial
from pathlib import Path

import ablate
import pytest
import torch

from config import Config
from modules import CodeMap, Discriminator

ROOT = Path(__file__).parent.parent


def some_codes():
    draw = torch.Generator().manual_seed(0)
    codebook, counts = torch.randn(60, 8, generator=draw), torch.arange(60) * 10
    return CodeMap.fit(codebook, counts, "pc1", 1), codebook, counts


def length(used, codebook):
    return codebook[used].diff(dim=0).norm(dim=1).sum().item()


def test_the_salesman_goes_to_every_used_code_on_a_shorter_way():
    fitted, codebook, counts = some_codes()
    used, points = ablate.salesman_order(fitted, codebook, counts)
    assert sorted(used.tolist()) == sorted(fitted.used.tolist()) == list(range(1, 60))
    assert length(used, codebook) < 0.8 * length(fitted.used, codebook)
    maps = torch.arange(1, 60)[None, None]
    code_map = CodeMap(used, points, 60)
    assert torch.equal(code_map.decode(code_map.encode(maps)), maps)


def test_a_kohonen_chain_is_an_order_shorter_than_the_codes_own():
    fitted, codebook, counts = some_codes()
    used, _ = ablate.kohonen_order(fitted, codebook, counts)
    assert sorted(used.tolist()) == sorted(fitted.used.tolist())
    assert length(used, codebook) < 0.8 * length(fitted.used.sort().values, codebook)


def test_a_kohonen_chain_finds_a_curve_that_component_1_folds():
    angle = torch.linspace(0, 5, 60)  # most of a circle, in a random order
    mixed = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    codebook = torch.stack([angle[mixed].cos(), angle[mixed].sin()], 1)
    counts = torch.ones(60, dtype=torch.int64)
    fitted = CodeMap.fit(codebook, counts, "pc1", 1)
    used, _ = ablate.kohonen_order(fitted, codebook, counts)
    assert length(used, codebook) < 0.5 * length(fitted.used, codebook)


def test_quantile_places_are_the_middles_of_shares_and_lose_no_code():
    fitted, codebook, counts = some_codes()
    used, points = ablate.quantile_places(fitted, codebook, counts)
    share = (counts[used] / counts.sum()).tolist()
    assert points[0].item() == pytest.approx(share[0] - 1, abs=1e-6)
    assert points[-1].item() == pytest.approx(1 - share[-1], abs=1e-6)
    code_map, maps = CodeMap(used, points, 60), used[None, None]
    assert not code_map.even
    assert torch.equal(code_map.decode(code_map.encode(maps)), maps)


def test_without_jitter_the_bins_are_the_same():
    fitted, codebook, counts = some_codes()
    beside = CodeMap(*ablate.without_jitter(fitted, codebook, counts), 60)
    assert fitted.even and not beside.even
    u = torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (fitted.decode(u) == beside.decode(u)).float().mean() > 0.999


def test_soft_coordinates_are_codes_once_training_is_over():
    points = torch.randn(30, 4)
    G = ablate.SoftGenerator(Config(gan_widths=(4, 4)), points)
    for module in G.modules():  # logits of some size
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.weight.data.mul_(10)
    noise, level = torch.randn(3, 100), torch.rand(3)
    soft = G(noise, level)
    assert soft.shape == (3, 4, 64, 64) and soft.requires_grad
    hard = G.eval()(noise, level).permute(0, 2, 3, 1).flatten(0, 2)
    soft = soft.detach().permute(0, 2, 3, 1).flatten(0, 2)
    # By squares of differences: by products, which many points get, 0 is as far as 0.002.
    far = partial(torch.cdist, x2=points, compute_mode="donot_use_mm_for_euclid_dist")
    assert far(hard).amin(1).max() < 1e-3
    assert far(soft).amin(1).max() > 0.1


@pytest.mark.parametrize("h, w", [(64, 64), (56, 48)])
def test_augmentation_moves_and_cuts_but_leaves_what_is_flat(h, w, monkeypatch):
    seen = []
    monkeypatch.setattr(Discriminator, "forward", lambda self, u, level: seen.append(u))
    D = ablate.AugmentedDiscriminator(4, 2, batch_norm=False)
    flat, u = torch.full((5, 2, h, w), 0.7), torch.zeros(5, 2, h, w)
    u[:, :, 20:44, 20:44] = torch.rand(5, 2, 24, 24) + 1
    torch.manual_seed(0)
    for x in (flat, u):
        D(x, None)
    assert torch.equal(seen[0], flat)
    for before, after in zip(u, seen[1], strict=True):
        assert set(after.unique().tolist()) <= set(before.unique().tolist())
        assert not torch.equal(before, after)
        assert (after != 0).sum() < (before != 0).sum()


def test_a_drawn_map_is_what_the_whole_network_says_cell_by_cell(monkeypatch):
    torch.manual_seed(0)
    prior = ablate.PixelCNN(7, width=8).eval()
    prior.last.weight.data.mul_(20)  # far from ties
    monkeypatch.setattr(prior, "choose", lambda logits: logits.argmax(1))
    level = torch.tensor([0.1, 0.9])
    ranks = prior.draw(level, 12, 10)
    with torch.no_grad():
        assert torch.equal(prior(ranks, level).argmax(-1), ranks)
    assert len(ranks.unique()) > 2


def test_the_prior_sees_no_cell_that_comes_later():
    prior, level = ablate.PixelCNN(7, width=8), torch.tensor([0.5])
    ranks = torch.randint(0, 7, (1, 12, 10))
    other = ranks.clone()
    other[0, 6, 5:], other[0, 7:] = (ranks[0, 6, 5:] + 1) % 7, (ranks[0, 7:] + 1) % 7
    a, b = prior(ranks, level)[0].flatten(0, 1), prior(other, level)[0].flatten(0, 1)
    torch.testing.assert_close(a[:66], b[:66])
    assert (a[66:] - b[66:]).abs().amax(1).min() > 0


def test_pixels_are_enlarged_to_slices():
    levels = torch.full((2, 64, 64), 51)
    torch.testing.assert_close(ablate.enlarge(None, levels), torch.full((2, 1, 256, 256), 0.2))


def test_every_row_is_a_valid_configuration():
    for row in ablate.ROWS.values():
        Config(**row.config)


def test_the_table_of_the_csv_is_shown():
    notes = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    shown = notes.split("<!-- ablation -->")[1].split("<!-- /ablation -->")[0]
    assert shown.strip() == ablate.table()
