"""The comparison with other methods: its PixelCNN, its rows, its table."""

import argparse

import compare
import pytest
import torch
from pixelcnn import PixelCNN


def test_a_map_drawn_cell_by_cell_agrees_with_the_whole_network(monkeypatch):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "ours-no-denoiser", "autoregressive", "pixels-64"])
def test_rows_are_trained_scored_and_added(name, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CSV", tmp_path / "comparison.csv")
    monkeypatch.setattr(compare, "seconds_of", lambda run, *stages: 0.5)
    monkeypatch.chdir(finished[0])
    given = argparse.Namespace(run="out/seed-0", minutes=0.05, lr=1.0, out=tmp_path / "out")
    compare.one_row(name, given)
    compare.one_row(name, given)
    rows = compare.read_rows()
    assert [row["row"] for row in rows] == [name, "(reconstruction)", "(real)", name]
    left_out = {"memory_mb"} if name in compare.OURS else set()  # trained in another process
    for row in (rows[0], rows[-1]):
        cells = {key: row[key] for key in (*compare.EFFORT, *compare.SCORES)}
        assert {key for key, cell in cells.items() if cell == ""} == left_out
        assert all(float(cell) >= 0 for cell in cells.values() if cell), row
    assert float(rows[0]["parameters_m"]) > 0 and rows[0]["source"] == rows[1]["source"]
    assert len(list((tmp_path / "out").glob("*/0*.png"))) == 8
    assert compare.table().count("\n") == 5 and compare.ROWS[name].label in compare.table()
