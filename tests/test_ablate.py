"""The ablation: orders of codes, the autoregressive prior, the table of docs/experiments.md."""

import sys
from pathlib import Path
from types import SimpleNamespace

import ablate
import numpy as np
import pytest
import torch
from conftest import SMALL, script
from pixelcnn import PixelCNN

from config import Config
from modules import CodeMap

ROOT = Path(__file__).parent.parent


def some_codes():
    draw = torch.Generator().manual_seed(0)
    codebook, counts = torch.randn(60, 8, generator=draw), torch.arange(60) * 10
    return CodeMap.fit(codebook, counts, "pc1", 1), codebook, counts


def length(used, codebook):
    return codebook[used].diff(dim=0).norm(dim=1).sum().item()


def test_the_salesman_visits_each_used_code_on_a_shorter_path():
    fitted, codebook, counts = some_codes()
    used, points = ablate.salesman_order(fitted, codebook, counts)
    assert sorted(used.tolist()) == sorted(fitted.used.tolist()) == list(range(1, 60))
    assert length(used, codebook) < 0.8 * length(fitted.used, codebook)
    maps = torch.arange(1, 60)[None, None]
    code_map = CodeMap(used, points, 60)
    assert torch.equal(code_map.decode(code_map.encode(maps)), maps)


def test_a_kohonen_chain_is_shorter_than_the_order_of_numbers():
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


def test_a_map_drawn_cell_by_cell_agrees_with_the_whole_network(monkeypatch):
    torch.manual_seed(0)
    prior = PixelCNN(7, width=8).eval()
    prior.last.weight.data.mul_(20)  # far from ties
    monkeypatch.setattr(prior, "choose", lambda logits: logits.argmax(1))
    level = torch.tensor([0.1, 0.9])
    ranks = prior.draw(level, 12, 10)
    with torch.no_grad():
        assert torch.equal(prior(ranks, level).argmax(-1), ranks)
    assert len(ranks.unique()) > 2


def test_the_prior_does_not_depend_on_later_cells():
    prior, level = PixelCNN(7, width=8), torch.tensor([0.5])
    ranks = torch.randint(0, 7, (1, 12, 10))
    other = ranks.clone()
    other[0, 6, 5:], other[0, 7:] = (ranks[0, 6, 5:] + 1) % 7, (ranks[0, 7:] + 1) % 7
    a, b = prior(ranks, level)[0].flatten(0, 1), prior(other, level)[0].flatten(0, 1)
    torch.testing.assert_close(a[:66], b[:66])
    assert (a[66:] - b[66:]).abs().amax(1).min() > 0


def test_pixels_are_enlarged_to_slices():
    levels = torch.full((2, 64, 64), 51)
    torch.testing.assert_close(ablate.enlarge(None, levels), torch.full((2, 1, 256, 256), 0.2))


def test_pixels_are_means_of_the_slices(tmp_path):
    images = np.zeros((2, 256, 256), np.uint8)
    images[1, :4, 4:8] = np.arange(16).reshape(4, 4)  # cell (0, 1), mean 7.5
    train = SimpleNamespace(rows=np.arange(2))
    run = SimpleNamespace(
        data=SimpleNamespace(images=images, train=train), config=Config(),
        path=lambda name: tmp_path / name,
    )  # fmt: skip
    values = ablate.write_pixels(run)
    maps = np.load(tmp_path / "codes.npy")
    assert maps.shape == (2, 64, 64) and maps[1, 0, 1] == 8 and maps.sum() == 8
    assert values["counts"]["train"][[0, 8]].tolist() == [2 * 64 * 64 - 1, 1]
    assert len(values["counts"]["train"]) == Config.codes


def test_every_row_is_a_valid_configuration():
    for row in ablate.ROWS.values():
        Config(**ablate.ALONE | row.config)


def test_every_row_of_the_csv_has_a_label():
    names = {row["row"] for row in ablate.read_rows()}
    assert names <= {*ablate.ROWS, *ablate.EARLIER, *ablate.REFERENCES}


def test_rows_of_another_base_are_lines_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "CSV", tmp_path / "ablation.csv")
    one = dict.fromkeys(ablate.SCORES | ablate.EFFORT, 1.0) | {"row": "pc1"}
    old, new = {"base": "a", "commit": "c1"}, {"base": "b", "commit": "c2"}
    ablate.append([one | old | {"seed": 0}])
    ablate.append([one | old | {"seed": 1, "recall": 2.0}, one | new | {"seed": 0}])
    lines = ablate.table().splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["c1 |", "c2 |"]
    assert " 1.5 (0.71) " in lines[0] and "(" not in lines[1]


@pytest.mark.slow
def test_rows_are_trained_scored_and_added(slices, tmp_path, monkeypatch):
    """Three kinds of rows on a tiny run; another start with the same rows does nothing."""
    done = script("driver.py", "--data", slices, "--out", "out", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "CSV", tmp_path / "ablation.csv")
    monkeypatch.setattr(ablate, "SECONDS", 1)
    monkeypatch.setitem(ablate.ALONE, "gan_kimg", 0.08)
    names = ["coordinates", "no-contrast", "pc1", "autoregressive"]
    command = ["ablate.py", "out/seed-0", "--rows", *names]
    monkeypatch.setattr(sys, "argv", command)
    for _ in range(2):
        ablate.main(ablate.parse())
        rows = ablate.read_rows()
        assert [row["row"] for row in rows] == ["coordinates", *ablate.REFERENCES, *names[1:]]
        assert all(row["fd_train"] and row["base"] for row in rows)
    assert list(tmp_path.glob("runs/ablation/*/rows.png"))


def test_the_page_shows_the_table_of_the_csv():
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    shown = page.split("<!-- ablation -->")[1].split("<!-- /ablation -->")[0]
    assert shown.strip() == ablate.table()
