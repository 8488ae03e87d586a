"""The comparison with other methods: its PixelCNN, its rows, its table."""

import argparse

import compare
import pytest
import torch
from pixelcnn import PixelCNN

import modules
from support import checkpoints


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
@pytest.mark.parametrize("name", ["ours", "own-diffusion", "autoregressive", "pixels-64"])
def test_rows_are_trained_scored_and_added(name, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CSV", tmp_path / "comparison.csv")
    monkeypatch.setattr(compare, "seconds_of", lambda run, *stages: len(stages) / 10)
    monkeypatch.chdir(finished[0])
    given = argparse.Namespace(run="out/seed-0", minutes=0.05, lr=1.0, out=tmp_path / "out")
    compare.one_row(name, given)
    compare.one_row(name, given)
    ways, rows = list(compare.ROWS[name].labels), compare.read_rows()
    assert [row["row"] for row in rows] == [
        ways[0],
        "(reconstruction)",
        "(real)",
        *ways[1:],
        *ways,
    ]
    left_out = {"memory_mb"} if compare.ROWS[name].over_maps else set()
    drawn = [row for row in rows if row["row"] in ways]
    for row in drawn:
        cells = {key: row[key] for key in (*compare.EFFORT, *compare.SCORES)}
        assert {key for key, cell in cells.items() if cell == ""} == left_out
        assert all(float(cell) >= 0 for cell in cells.values() if cell), row
        assert float(row["parameters_m"]) > 0 and row["source"] == rows[1]["source"]
    assert len(list((tmp_path / "out").glob("*/0*.png"))) == 8 * len(ways)
    table = compare.table()
    assert table.count("\n") == 3 + 2 * len(ways)
    assert all(compare.LABELS[way] in table for way in ways)


def test_the_ways_of_this_project_leave_out_a_network_each(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    run = compare.predict.load_run("out/seed-0", "cpu")
    given = argparse.Namespace(run=run)
    ways, level = compare.this_project(given), torch.tensor([0.5])
    drawn = {way: draw(level) for way, (_, draw) in ways.items()}
    assert torch.equal(drawn["ours"], run.sample(1, level=0.5)[1])
    assert all(not torch.equal(drawn["ours"], drawn[way]) for way in list(ways)[1:])
    size = {
        way: sum(p.numel() for n in networks for p in n.parameters())
        for way, (networks, _) in ways.items()
    }
    plain = modules.make_vqvae(run.config)
    plain.load_state_dict(checkpoints.load_checkpoint(run.folder / "vqvae_best.pt")["model"])
    maps = run.sample(1, level=0.5)[0]
    wanted = modules.in_full_batches(plain.eval().decode, maps)
    assert torch.equal(drawn["ours-no-decoder"], wanted)
    assert size["ours"] > max(size["ours-no-denoiser"], size["ours-no-decoder"])
