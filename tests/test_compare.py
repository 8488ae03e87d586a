"""The comparison with other methods: its PixelCNN, its rows, its table."""

import argparse
import csv

import compare
import pytest
import torch
from pixelcnn import PixelCNN

import modules
from config import PRESETS, Config, UserError
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


OF_MONAI = "diffusion", "latent-diffusion", "transformer"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ours", "own-diffusion", "autoregressive", "pixels-64", *OF_MONAI]
)
def test_rows_are_trained_scored_and_added(name, finished, tmp_path, monkeypatch):
    if name in OF_MONAI:
        pytest.importorskip("monai", reason="benchmarks/requirements.txt is not installed")
    monkeypatch.setattr(compare, "CSV", tmp_path / "comparison.csv")
    monkeypatch.setattr(compare, "seconds_of", lambda run, *stages: len(stages) / 10)
    monkeypatch.chdir(finished[0])
    given = argparse.Namespace(run="out/seed-0", minutes=0.05, lr=1.0, out=tmp_path / "out")
    for _ in range(2):
        compare.one_row(name, compare.predict.load_run(given.run, "cpu"), given)
    ways, rows = list(compare.ROWS[name].labels), compare.read_rows()
    if name == "ours":  # a run of the original recipe has that one way instead
        ways.remove("original")
    assert [row["row"] for row in rows] == [
        ways[0],
        "(reconstruction)",
        "(real)",
        *ways[1:],
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
    assert table.count("\n") == 3 + len(ways)
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


def written(path, ways):
    lines = [f"{way},embedded,quick,0,1.0" + "," * (len(compare.COLUMNS) - 5) for way in ways]
    path.write_text("\n".join([",".join(compare.COLUMNS), *lines]) + "\n")


def test_the_table_gives_mean_and_sd_of_several_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CSV", tmp_path / "comparison.csv")
    written(tmp_path / "comparison.csv", ["ours", "transformer"])
    with open(tmp_path / "comparison.csv", "a", encoding="utf-8") as file:
        for length, seed, lr, minutes in (
            ("quick", 1, 1.0, 99), ("quick", 1, 1.0, 9), ("quick", 2, 1.0, 12),
            ("long", 1, 1.0, 30), ("quick", 1, 0.3, 8),
        ):  # fmt: skip
            rest = "," * (len(compare.COLUMNS) - 6)
            file.write(f"ours,embedded,{length},{seed},{lr},{minutes}{rest}\n")
    lines = compare.table().splitlines()[2:]
    assert lines[0].startswith("| this project | embedded | quick | 0, 1, 2 | 10.5 (2.1) | - |")
    assert lines[1].startswith("| this project | embedded | long | 1 | 30 | - |")
    other = "| this project, learning rates x 0.3 | embedded | quick | 1 | 8 | - |"
    assert lines[2].startswith(other)
    assert len(lines) == 4 and "| quick | 0 | - | - |" in lines[3]


def test_the_plot_shows_each_seed_and_joins_the_means_of_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CSV", tmp_path / "comparison.csv")
    rows = [("(real)", "quick", 0, ""), ("ours", "long", 0, 500)]  # 500: run again
    rows += [("ours", "long", 0, 27), ("ours", "quick", 0, 10), ("ours", "quick", 1, 12)]
    rows += [
        ("original", "classic, 24 + 120 kimg", 0, 9),
        ("ours", "quick", 0, 999),
    ]  # not shown
    rows += [(way, "12 min", 0, 12) for way in list(compare.PLOTTED)[1:]]
    with open(compare.CSV, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, compare.COLUMNS, restval=1)
        writer.writeheader()
        for way, length, seed, minutes in rows:
            source = "embedded" if minutes == 999 else "oasis"
            given = {"row": way, "length": length, "seed": seed, "minutes": minutes}
            writer.writerow(given | {"source": source})
    means, points = compare.over_time().axes[0].lines[:2]
    assert means.get_xdata().tolist() == [11, 27]
    assert sorted(points.get_xdata()) == [10, 12, 27]


def test_a_run_of_another_length_than_its_preset_is_named_by_its_lengths():
    given = argparse.Namespace(minutes=12)
    for config, name in (
        (Config(), "quick"),
        (Config(vqvae_kimg=8.0), "quick, 8 + 8 + 63 + 20 kimg"),
    ):
        run = argparse.Namespace(config=config)
        assert compare.length_of(run, "ours", given) == name
        assert compare.length_of(run, "transformer", given) == "12 min"


def test_a_run_has_the_ways_of_its_recipe_and_stages():
    both = ["ours-no-denoiser", "ours-no-decoder"]
    assert compare.own_ways(Config()) == ["ours", *both]
    assert compare.own_ways(Config(decoder_kimg=0.0)) == ["ours", both[0]]
    assert compare.own_ways(Config(**PRESETS["classic"])) == ["original"]


def test_whole_rows_of_the_csv_are_skipped_and_half_ones_run_again(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(finished[0])
    monkeypatch.setattr(compare, "CSV", tmp_path / "comparison.csv")
    monkeypatch.setattr(compare, "source_of", lambda config: "embedded")
    monkeypatch.setattr(compare, "length_of", lambda *given: "quick")
    ran = []
    monkeypatch.setattr(
        compare.subprocess,
        "run",
        lambda words: ran.append(words[-1]) or argparse.Namespace(returncode=0),
    )
    written(tmp_path / "comparison.csv", [*compare.OURS, "diffusion-10"])
    names = ["ours", "diffusion", "transformer"]
    given = argparse.Namespace(
        run="out/seed-0", rows=names, table=False, plot=None, figure=None, lr=1.0
    )
    compare.main(given)
    assert ran == ["diffusion", "transformer"]
    with pytest.raises(UserError, match="mistake: choose from"):
        compare.main(argparse.Namespace(**vars(given) | {"rows": ["mistake"]}))


def test_the_figure_shows_samples_of_each_way_that_was_drawn(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished[0])
    run = compare.predict.load_run("out/seed-0", "cpu")
    given = argparse.Namespace(out=tmp_path, lr=0.3, minutes=12)
    with pytest.raises(UserError, match="no samples"):
        compare.figure(run, given)
    images = run.sample(8)[1]
    for way in ("ours", "transformer"):
        compare.predict.write_slices(compare.folder_of(run, way, given), iter([images]))
    axes = compare.figure(run, given).axes
    assert [ax.get_title("left") for ax in axes] == [
        compare.LABELS[w] for w in ("ours", "transformer")
    ]
    shown = axes[0].images[0].get_array()
    mean = torch.nn.functional.avg_pool2d(255 * images[7], 2)[0]
    assert abs(torch.from_numpy(shown[:, -128:].astype(float)) - mean).max() < 2


def test_a_source_is_named_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.source_of(Config()) == "embedded"
    assert compare.source_of(Config(data=".")) == tmp_path.name
