"""All figures: arrays in, matplotlib `Figure` (or contact sheet) out.

In: slices (N, 256, 256) float in [0, 1]; index maps (N, 64, 64) int, as ranks of the U used
codes, so that similar colours are similar codes. Out: a `Figure` on its own Agg canvas, without
pyplot: it needs no display and no closing. The caller saves it. One image pixel is one figure
pixel (a cell of a map is 4x4), so nothing is resampled. A `stamp`, such as "contains training
data, do not publish", is printed small below the figure.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

# A notebook's commands inherit its backend, which another environment may lack.
backend = os.environ.get("MPLBACKEND", "")
if backend.startswith("module://") and not importlib.util.find_spec(backend[9:].split(".")[0]):
    del os.environ["MPLBACKEND"]
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torchvision.utils import make_grid

from config import TRAINED

Array = np.ndarray
DPI = 100
CELL_PX = 256  # one slice, or one index map
GAP_PX = 6  # between neighbouring cells
TEXT_PX = 44  # a line of text above the cells, or a rotated one on their left
BAR_PX = 116  # a colour bar and its labels, right of the cells
STAMP_PX = 34
CODES = "viridis"  # perceptually uniform
DIFFERENCES = "magma"
DIFFERENCE_SHOWN = 0.2  # full scale of differences; fixed, so that runs can be compared
COLOURS = ("#1f77b4", "#e07b1a", "#3a923a")
INK = "0.25"


@dataclass(frozen=True)
class Panel:
    title: str
    columns: dict[str, str]  # column of log.csv -> label
    log: bool = False
    ideal: float | None = None  # drawn as a dashed line


PANELS = {
    "vqvae": (
        Panel("loss", {"loss": "total", "reconstruction": "reconstruction",
                       "commitment": "commitment"}, log=True),
        Panel("SSIM of validation slices", {"ssim_validation": ""}),
        Panel("codes", {"used_codes": "used", "perplexity": "perplexity"}),
        Panel("learning rate", {"lr": ""}),
    ),
    "decoder": (
        Panel("loss", {"loss": "total", "reconstruction": "reconstruction"}, log=True),
        Panel("patch discriminator", {"g_loss": "decoder", "d_loss": "discriminator"}),
        Panel("gradient penalties", {"r1": "R1, real", "r2": "R2, decoded"}, log=True),
        Panel("SSIM of validation slices", {"ssim_validation": ""}),
    ),
    "dcgan": (
        Panel("loss", {"g_loss": "generator", "d_loss": "discriminator"}),
        Panel("gradient penalties", {"r1": "R1, real", "r2": "R2, generated"},
              log=True),
        Panel("relative FD without denoiser (dashed: best)", {"fd_validation": ""},
              log=True, ideal=1),
        Panel("diversity (dashed: real maps)", {"diversity": ""}, ideal=1),
    ),
    "denoiser": (
        Panel("loss, training maps", {"loss": ""}, log=True),
        Panel("loss, validation maps", {"loss_validation": ""}, log=True),
        Panel("learning rate", {"lr": ""}),
    ),
}  # fmt: skip


def curves(rows: list[dict], stage: str, stamp: str = "") -> Figure:
    """What training measured, by log.csv; stage: a key of PANELS, other rows are ignored."""
    rows = [row for row in rows if row.get("stage", stage) == stage]
    panels, lines = PANELS[stage], len(PANELS[stage]) // 2
    fig = _figure(11, 3.4 * lines, stamp, layout="constrained")
    axes = fig.subplots(lines, len(panels) // lines, squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=True):
        _style(ax, panel.title, f"thousands of {TRAINED[stage].seen} seen")
        for (column, label), colour in zip(panel.columns.items(), COLOURS, strict=False):
            measured = [row for row in rows if row.get(column) is not None]
            x, y = ([row[name] for row in measured] for name in ("nimg", column))
            style = {"linewidth": 1.8, "marker": "o" if len(y) <= 30 else "", "markersize": 4}
            ax.plot(np.divide(x, 1000), y, color=colour, label=label, **style)
        _finish(ax, panel)
    return fig


def _finish(ax: Axes, panel: Panel):
    """Scale, ideal line and legend of a panel, once its curves are drawn."""
    drawn = np.concatenate([line.get_ydata() for line in ax.lines])
    if not len(drawn):
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.6")
        ax.set(xticks=[], yticks=[])
        return
    if panel.log and (drawn > 0).any():
        _log_scale(ax, drawn[drawn > 0])
    if panel.ideal is not None:
        ax.axhline(panel.ideal, color="0.5", linestyle="--", linewidth=1, zorder=1)
    if len(panel.columns) > 1:
        _legend(ax)


def _log_scale(ax: Axes, drawn: Array):
    """A logarithmic axis with plain numbers: 0.1, 1, 10, with 2 and 5 if there is room."""
    steps = (1, 2, 5) if drawn.max() < 100 * drawn.min() else (1,)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=steps))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def code_histogram(counts: Array, perplexity: float, total: int, stamp: str = "") -> Figure:
    """How often each used code occurs. counts: (U,) by rank; total: K, used or not."""
    share = 100 * np.asarray(counts, dtype=float) / np.sum(counts)
    used = len(share)
    fig = _figure(11, 4, stamp, layout="constrained")
    ax = fig.subplots()
    ax.bar(range(used), share, width=1, color=colormaps[CODES](np.linspace(0, 1, used)))
    ax.axhline(100 / used, color="0.3", linestyle="--", linewidth=1, label="if used equally")
    _log_scale(ax, share[share > 0])
    ax.set_xlim(-0.5, used - 0.5)
    ax.set_ylabel("share of map cells (%)", color=INK)
    title = f"{used} of {total} codes used, perplexity {perplexity:.0f}"
    _style(ax, title, "rank of the code (the colours are those of the index maps)")
    _legend(ax)
    return fig


@dataclass(frozen=True)
class Layer:
    """One image per slice, drawn alike. bar: label of the colour bar."""

    label: str
    images: Array
    cmap: str = "gray"
    high: float = 1
    bar: str = ""


def reconstructions(
    originals: Array,
    index_maps: Array,
    reconstructed: Array,
    ssim_values: Sequence[float],
    used: int,
    stamp: str = "",
) -> Figure:
    """One slice per column: original, index map, reconstruction, absolute difference."""
    difference = np.abs(np.asarray(originals) - np.asarray(reconstructed))
    layers = [
        Layer("original", originals),
        Layer("index map", index_maps, CODES, used - 1, "rank of code"),
        Layer("reconstruction", reconstructed),
        Layer("difference", difference, DIFFERENCES, DIFFERENCE_SHOWN, "|difference|"),
    ]
    return _stacks(layers, stamp, [f"SSIM {value:.3f}" for value in ssim_values])


def generated(
    index_maps: Array, brains: Array, used: int, columns: int = 8, stamp: str = ""
) -> Figure:
    """Generated index maps, each above its decoded brain."""
    maps = Layer("index map", index_maps, CODES, used - 1, "rank of code")
    return _stacks([maps, Layer("brain", brains)], stamp, columns=columns)


def nearest(
    samples: Array, neighbours: Array, distances: list[float], columns: int = 8, stamp: str = ""
) -> Figure:
    """Generated slices, each above its nearest training slice, with the distance."""
    layers = [Layer("generated", samples), Layer("nearest training", neighbours)]
    titles = [f"distance {distance:#.3g}".rstrip(".") for distance in distances]
    return _stacks(layers, stamp, titles, columns)


def strip(images: Array, labels: Sequence[str] = (), stamp: str = "") -> Figure:
    """A sweep over levels or an interpolation, in equal rows of at most 8."""
    rows = math.ceil(len(images) / 8)
    columns = math.ceil(len(images) / rows)
    return _stacks([Layer("", images)], stamp, labels, columns)


def real_beside_generated(
    real: Array, reconstructed: Array, generated: Array, stamp: str = ""
) -> Figure:
    """Real slices, their reconstructions and generated slices of the same levels."""
    sets = {"real": real, "reconstruction": reconstructed, "generated": generated}
    return _stacks([Layer(*row) for row in sets.items()], stamp, columns=9)


def grid(images: Array, columns: int) -> Array:
    """Contact sheet (H, W) uint8: slices row by row, with 2 black pixels between them."""
    pixels = torch.from_numpy(as_bytes(images))[:, None]
    return make_grid(pixels, nrow=columns, padding=2)[0].numpy()


def _stacks(
    layers: list[Layer], stamp: str, titles: Sequence[str] = (), columns: int = 8
) -> Figure:
    """Slice i in column i, its layers one below the other; long sets wrap."""
    count = len(layers[0].images)
    assert all(len(layer.images) == count for layer in layers)
    columns = min(columns, count)
    left = TEXT_PX if layers[0].label else GAP_PX
    top = TEXT_PX if len(titles) else GAP_PX
    right = BAR_PX if any(layer.bar for layer in layers) else GAP_PX
    step = CELL_PX + GAP_PX
    band = top + len(layers) * step + GAP_PX
    width = left + columns * step - GAP_PX + right
    height = math.ceil(count / columns) * band + (STAMP_PX if stamp else 0)
    fig = _figure(width / DPI, height / DPI, stamp)
    for i in range(count):
        row, column = divmod(i, columns)
        x, y = left + column * step, row * band + top
        if len(titles):
            _write(fig, x + CELL_PX / 2, y - TEXT_PX / 2, titles[i])
        for j, layer in enumerate(layers):
            shown = _image(fig, x, y + j * step, layer.images[i], layer)
            if column == 0:
                _write(fig, x / 2, y + j * step + CELL_PX / 2, layer.label, rotation=90)
            if layer.bar and column == columns - 1:
                _bar(fig, x + step + GAP_PX, y + j * step, shown, layer)
    return fig


def png(image: Array) -> bytes:
    """(H, W) float [0,1] or uint8, or colours (H, W, 3) uint8 -> an 8-bit PNG."""
    pixels = as_bytes(image)
    pixels = pixels if pixels.ndim == 2 else pixels[..., ::-1]  # OpenCV writes BGR
    return cv2.imencode(".png", pixels)[1].tobytes()


def coloured_map(index_map: Array, used: int) -> Array:
    """An index map of ranks (h, w) in the colours of the figures: uint8 (h, w, 3)."""
    return colormaps[CODES](index_map / max(used - 1, 1), bytes=True)[..., :3]


def _figure(width_in: float, height_in: float, stamp: str, layout: str | None = None) -> Figure:
    fig = Figure((width_in, height_in), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(fig)
    if stamp:
        fig.supxlabel(stamp, fontsize=11, color="0.4")
    return fig


def _axes(fig: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at pixels that count from the top left, as in an image."""
    w, h = fig.get_size_inches() * DPI
    return fig.add_axes((x / w, 1 - (y + height) / h, width / w, height / h))


def _image(fig: Figure, x: float, y: float, image: Array, layer: Layer):
    ax = _axes(fig, x, y, CELL_PX, CELL_PX)
    ax.set_axis_off()
    if layer.cmap == "gray":  # as bytes: matplotlib's grey map is one level off here and there
        image = np.repeat(as_bytes(image)[..., None], 3, axis=-1)
    limits = {"vmin": 0, "vmax": max(layer.high, 1e-6)}
    return ax.imshow(image, cmap=layer.cmap, interpolation="nearest", aspect="auto", **limits)


def as_bytes(images: Array) -> Array:
    """[0, 1] -> 0..255, rounded to the nearest level; what is uint8 stays."""
    if images.dtype == np.uint8:
        return images
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)


def _write(fig: Figure, x: float, y: float, text: str, size: float = 16, rotation: float = 0):
    w, h = fig.get_size_inches() * DPI
    place = {"ha": "center", "va": "center", "rotation": rotation}
    fig.text(x / w, 1 - y / h, text, fontsize=size, color=INK, **place)


def _bar(fig: Figure, x: float, y: float, shown, layer: Layer):
    bar = fig.colorbar(shown, cax=_axes(fig, x, y + 8, 16, CELL_PX - 16), ticks=[0, layer.high])
    bar.ax.tick_params(labelsize=14, labelcolor=INK, length=0)
    bar.outline.set_visible(False)
    _write(fig, x + 36, y + CELL_PX / 2, layer.bar, size=14, rotation=90)


def _style(ax: Axes, title: str, x_label: str):
    ax.set_title(title, loc="left", fontsize=12, color=INK)
    ax.set_xlabel(x_label, color=INK)
    ax.tick_params(color="0.7", labelcolor=INK)
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.7")


def _legend(ax: Axes):
    """On the title's line, right: there it can hide no curve."""
    place = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.98)}
    ax.legend(**place, ncols=3, frameon=False, handlelength=1.2, labelcolor=INK)
