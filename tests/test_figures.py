"""figures.py: every figure needs no display, shows what it got, and resamples nothing."""

import functools
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from scores import figures

STAMP = "from private data, do not publish"


def slices(count: int, seed: int = 0) -> np.ndarray:
    """Noise, so that any resampling changes it; on the 256 levels of a PNG."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 256, 256)).astype(np.float32) / 255


def maps(count: int, used: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(0, used, (count, 64, 64))


SETS = slices(3, 0), slices(3, 1), slices(3, 2)


def log_rows(stage: str, count: int) -> list[dict]:
    names = [name for panel in figures.PANELS[stage] for name in panel.columns]
    return [{"nimg": 32.0 * i} | dict.fromkeys(names, 1 / i) for i in range(1, count + 1)]


@functools.cache
def every_figure(stamp: str = "") -> dict[str, Figure]:
    (x, y, z), m = SETS, maps(3)
    curves = {
        stage: figures.curves(log_rows(stage, 100), stage, stamp) for stage in figures.PANELS
    }
    return curves | {
        "reconstructions": figures.reconstructions(x, m, y, [0.9, 0.8, 0.7], 40, stamp),
        "code_histogram": figures.code_histogram(np.arange(1, 41), 30.5, 512, stamp),
        "generated": figures.generated(m, x, 40, columns=2, stamp=stamp),
        "nearest": figures.nearest(x, y, [0.01, 2.5, 100.0], columns=2, stamp=stamp),
        "real_beside_generated": figures.real_beside_generated(x, y, z, stamp),
        "strip": figures.strip(x, ["0.0", "0.5", "1.0"], stamp),
    }


def pixels(fig: Figure) -> np.ndarray:
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3]


def contains(sheet: np.ndarray, image: np.ndarray) -> bool:
    """Whether the uint8 image stands somewhere in the grey sheet, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, image.shape)
    alike = (windows[:, :, 0, :9] == image[0, :9]).all(2)  # the first pixels leave few places
    return any(np.array_equal(window, image) for window in windows[alike])


def texts(fig: Figure) -> list[str]:
    return [text.get_text() for text in fig.findobj(lambda a: hasattr(a, "get_text"))]


@pytest.mark.parametrize("name", every_figure())
def test_saves_as_png_with_its_stamp(name):
    plain, stamped = every_figure()[name], every_figure(STAMP)[name]
    for fig in (plain, stamped):
        assert isinstance(fig.canvas, FigureCanvasAgg)
        file = io.BytesIO()
        fig.savefig(file, format="png")
        assert file.getvalue().startswith(b"\x89PNG")
    assert STAMP in texts(stamped) and STAMP not in texts(plain)


def test_curves_show_nothing_that_differs_between_equal_runs():
    panels = [panel for stage in figures.PANELS.values() for panel in stage]
    shown = {column for panel in panels for column in panel.columns}
    assert not shown & {"seconds", "images_per_s"}


@pytest.mark.parametrize(
    "stage, column",
    [
        ("vqvae", "ssim_validation"), ("decoder", "ssim_validation"),
        ("dcgan", "fd_validation"), ("denoiser", "loss_validation"),
    ],
)  # fmt: skip
def test_curves_leave_out_cells_not_measured_and_take_a_single_row(stage, column):
    rows = log_rows(stage, 9)
    for row in rows[:7]:
        row[column] = None
    fig = figures.curves(rows, stage)
    pixels(fig)
    drawn = [list(line.get_ydata()) for ax in fig.axes for line in ax.lines]
    assert drawn.count([1 / 8, 1 / 9]) == 1
    single = figures.curves(rows[-1:], stage)
    pixels(single)
    assert "not measured" not in texts(single)


def test_curves_of_nothing_say_so():
    fig = figures.curves([], "dcgan")
    pixels(fig)
    assert texts(fig).count("not measured") == 4


def test_curves_leave_out_rows_of_the_other_stage():
    rows = [{"stage": stage, "nimg": 32.0, "lr": 2e-3} for stage in ("vqvae", "dcgan")]
    assert list(figures.curves(rows, "vqvae").axes[3].lines[0].get_xdata()) == [0.032]


def test_penalties_of_zero_do_not_break_the_log_scale():
    rows = [row | {"r1": 0.0, "r2": 0.0} for row in log_rows("dcgan", 5)]
    pixels(figures.curves(rows, "dcgan"))


@pytest.mark.parametrize(
    "name, sets",
    [
        ("reconstructions", 2), ("generated", 1), ("nearest", 2), ("real_beside_generated", 3),
        ("strip", 1),
    ],
)  # fmt: skip
def test_sheets_show_every_pixel_of_all_sets(name, sets):
    shown = pixels(every_figure(STAMP)[name])[..., 0]
    for image in np.concatenate(SETS[:sets]):
        assert contains(shown, np.rint(255 * image).astype(np.uint8))


def test_index_maps_are_shown_in_cells_of_4_by_4_pixels():
    shown = pixels(figures.generated(maps(1), slices(1), used=40))
    colours = figures.colormaps["viridis"](maps(1)[0] / 39, bytes=True)[..., 0]
    assert contains(shown[..., 0], np.kron(colours, np.ones((4, 4), np.uint8)))


def test_histogram_bars_wear_the_colours_of_the_maps():
    fig = figures.code_histogram(np.array([900, 90, 10]), 1.4, 512)
    bars = fig.axes[0].patches
    assert [round(bar.get_height(), 6) for bar in bars] == [90, 9, 1]
    last = np.rint(255 * np.array(to_rgba(bars[-1].get_facecolor())))[:3]
    assert (pixels(fig) == last).all(-1).sum() > 1000  # seen, not clipped away
    assert "3 of 512 codes used, perplexity 1" in texts(fig)


def test_one_used_code_is_enough():
    pixels(figures.code_histogram(np.array([7]), 1.0, 512))
    pixels(figures.generated(np.zeros((1, 64, 64), int), slices(1), used=1))


def test_titles_and_distances():
    assert "SSIM 0.900" in texts(every_figure()["reconstructions"])
    shown = texts(every_figure()["nearest"])
    assert {"distance 0.0100", "distance 2.50", "distance 100"} <= set(shown)


def test_grid_places_slices_row_by_row():
    x = slices(5)
    sheet = figures.grid(x, columns=3)
    assert sheet.shape == (2 * 258 + 2, 3 * 258 + 2) and sheet.dtype == np.uint8
    for i, image in enumerate(x):
        top, left = 2 + 258 * (i // 3), 2 + 258 * (i % 3)
        cell = sheet[top : top + 256, left : left + 256]
        np.testing.assert_array_equal(cell, np.rint(255 * image))
    assert not sheet[260:, 2 * 258 + 2 :].any()


def test_drawings_are_small_enough_for_a_readme(tmp_path):
    """Made afresh in an empty folder."""
    script = tmp_path / "draw.py"
    script.write_bytes((ROOT / "images/draw.py").read_bytes())
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script], check=True, stdout=subprocess.DEVNULL, env=env)
    for name in ("pipeline.png", "vqvae.png", "generator.png"):
        assert 1000 < (tmp_path / name).stat().st_size < 200_000
        assert (ROOT / "images" / name).exists()
    done = subprocess.run([sys.executable, script, "--table"], stdout=-1, text=True, env=env)
    assert "Quantized" in done.stdout
    assert done.stdout in (ROOT / "docs/networks.md").read_text(encoding="utf-8")
