"""Draw the pages' diagrams: pipeline.png, vqvae.png and generator.png, beside this file.

    python images/draw.py
    python images/draw.py --table      # print the table of the VQ-VAE's layers

The drawings need matplotlib only and no data: the brain in them is made of ellipses, with noise
for the folds. One unit is one pixel of a README that is 900 pixels wide.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from torch import Tensor, nn

import modules
from config import Config

INK, FAINT = "#333333", "#8a8a8a"
ENCODER, CODES, DECODER, GAN = "#cfe0f3", "#e8dcf5", "#d5ecd4", "#fbe0c3"
CONV, POOL, POINT, GROW, LOSS = "#d97706", "#2563a8", "#7c3aad", "#2f8f46", "#c0392b"
MAPS = "viridis"
TALL = {256: 104, 128: 72, 64: 48}  # units, of feature maps by their pixels
THICK = {8: 10, 16: 15, 64: 30}  # units, by their channels


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="print the table and end")
    if parser.parse_args().table:
        print(architecture_table(modules.make_vqvae(Config())))
        return
    for draw in (pipeline, vqvae, generator):
        path = Path(__file__).parent / f"{draw.__name__}.png"
        draw().savefig(path, pil_kwargs={"optimize": True})
        print(f"{path}  {path.stat().st_size // 1000} kB")


# The table of layers


def architecture_rows(model: modules.VQVAE) -> list[tuple[str, ...]]:
    """One row per layer of the table in docs/networks.md, from a forward pass on a black slice.

    The code has the original's layers in another order: pooling stands before ReLU, upsampling
    is part of a convolution, and the 1x1 convolution is part of the quantiser.
    """
    rows = []

    def record(module, inputs, output):
        x = inputs[0]
        if isinstance(module, nn.ReLU):
            last = max(i for i, row in enumerate(rows) if row[0] == "Conv2d")
            rows[last] = (rows[last][0] + " + ReLU", *rows[last][1:])
        elif isinstance(module, nn.MaxPool2d):
            rows.append(("Max2D Pool", "-", "2", "-", "-", shape_of(x), shape_of(output)))
        elif isinstance(module, modules.Quantizer):
            z, indices = shape_of(output.embedding), shape_of(output.indices[:, None])
            rows.append(("Vector Quantized", *"----", z, indices))
        elif isinstance(module, nn.Conv2d):
            if isinstance(module, modules.UpsampleConv):
                up = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                rows.append(("Upsampling", "-", "2", "-", "-", shape_of(x), shape_of(up)))
                x = up
            numbers = (module.out_channels, module.kernel_size[0], module.stride[0])
            numbers = map(str, (*numbers, module.padding[0]))
            name = "Pre_VQ Conv2d" if module is model.pre_vq else "Conv2d"
            rows.append((name, *numbers, shape_of(x), shape_of(output)))

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    with torch.no_grad():
        model(torch.zeros(1, 1, 256, 256))
    for hook in hooks:
        hook.remove()
    rows[-1] = ("Final Conv2d", *rows[-1][1:])
    return rows


def shape_of(x: Tensor) -> str:
    return "(" + " x ".join(str(n) for n in x.shape[1:]) + ")"


def architecture_table(model: modules.VQVAE) -> str:
    """The rows as a Markdown table."""
    head = ("Layer", "Filters", "Kernel", "Stride", "Padding", "Input Shape", "Output Shape")
    lines = [head, (":---:",) * len(head), *architecture_rows(model)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# The three drawings


def pipeline() -> Figure:
    """The flow of data: training above, generation below, the discriminator between them."""
    fig, ax = canvas(900, 520)
    top, middle, bottom = 410, 246, 96
    reconstructing(ax, top, drawn_brain(seed=5))
    generating(ax, bottom, drawn_brain(seed=3))

    box(ax, 278, middle, 108, 50, "discriminator", GAN)
    arrow(ax, (278, bottom + 48), (278, middle - 27))
    elbow(ax, (478, top - 86), (478, middle), (335, middle))
    arrow(ax, (222, middle), (196, middle))
    write(ax, 470, middle + 12, "real coordinates", ha="right", color=FAINT)
    write(ax, 288, middle - 44, "generated maps", ha="left", color=FAINT)
    write(ax, 190, middle, "real or\ngenerated?", ha="right")

    strip(ax, (546, 722), (middle - 9, middle + 9), np.linspace(0, 1, 24)[None])
    text = "codebook: the codes by\ntheir place along\nprincipal component 1"
    write(ax, 732, middle, text, ha="left")
    arrow(ax, (634, middle + 14), (634, top - 30))
    arrow(ax, (634, middle - 14), (634, bottom + 30))
    return fig


def reconstructing(ax, y: float, brain: np.ndarray):
    heading(ax, 20, y + 90, "1  VQ-VAE: slices into index maps and back")
    picture(ax, 66, y, 92, brain, "slice\n256 × 256")
    box(ax, 172, y, 84, 56, "encoder", ENCODER)
    cuboid(ax, 236, y - 27, 30, 54, 12, ENCODER)
    write(ax, 258, y - 42, "64 × 64\nvectors of 64", va="top")
    box(ax, 360, y, 84, 56, "nearest\ncode", CODES)
    picture(ax, 478, y, 92, quarter(brain), "index map\n64 × 64", MAPS)
    box(ax, 634, y, 120, 56, "look up codes,\ndecode", DECODER)
    picture(ax, 804, y, 92, soften(brain), "reconstruction")
    for x0, x1 in [(114, 128), (216, 232), (282, 316), (404, 430), (526, 572), (696, 756)]:
        arrow(ax, (x0, y), (x1, y))


def generating(ax, y: float, brain: np.ndarray):
    heading(ax, 20, y + 94, "2  DCGAN: new maps")
    picture(ax, 66, y, 92, noise_picture(), "100 numbers of\nnoise, slice level", "Greys")
    box(ax, 172, y, 84, 56, "generator", GAN)
    picture(ax, 278, y, 92, quarter(brain), "coordinates\n64 × 64 × 4")
    box(ax, 378, y + 24, 72, 40, "denoiser", GAN)
    box(ax, 378, y - 24, 72, 40, "likeliest\ncode", CODES)
    arrow(ax, (378, y + 4), (378, y - 4))
    picture(ax, 478, y, 92, quarter(brain), "new index map", MAPS)
    box(ax, 634, y, 120, 56, "look up codes,\ndecode", DECODER)
    picture(ax, 804, y, 92, soften(brain), "new brain")
    for x0, x1 in [(114, 128), (216, 230), (526, 572), (696, 756)]:
        arrow(ax, (x0, y), (x1, y))
    arrow(ax, (326, y + 24), (340, y + 24))
    arrow(ax, (416, y - 24), (430, y - 24))


def vqvae() -> Figure:
    """The VQ-VAE, layer by layer."""
    fig, ax = canvas(900, 430)
    brain, y = drawn_brain(seed=5), 268
    picture(ax, 66, y, TALL[256], brain, "slice")
    picture(ax, 834, y, TALL[256], soften(brain), "reconstruction")
    encoder = [(16, 256, 142), (16, 128, 190), (8, 128, 236), (8, 64, 276), (64, 64, 314)]
    for channels, size, x in encoder:
        feature(ax, x, y, channels, size, ENCODER)
        feature(ax, 900 - x - THICK[channels] - 8, y, channels, size, DECODER)
    steps = [(119, 140, CONV), (168, 188, POOL), (216, 234, CONV), (257, 274, POOL)]
    steps += [(297, 312, POINT), (588, 603, CONV), (626, 643, GROW), (666, 684, CONV)]
    steps += [(712, 732, GROW), (760, 781, CONV)]
    for x0, x1, colour in steps:
        arrow(ax, (x0, y), (x1, y), colour)
    quantiser(ax, y, quarter(brain))
    ax.plot([66, 66, 834, 834], [188, 60, 60, 188], color=LOSS, linewidth=1.2, linestyle="--")
    text = "reconstruction loss: L1 + (1 - SSIM) + 2 detail; squared error in the original"
    write(ax, 450, 60, text, color=LOSS, backgroundcolor="white")
    legend = [(CONV, "conv 3 × 3 and ReLU (none after the last)"), (POOL, "max pool 2")]
    legend += [(POINT, "conv 1 × 1"), (GROW, "upsample × 2")]
    for x, (colour, text) in zip((85, 400, 545, 690), legend, strict=True):
        arrow(ax, (x, 20), (x + 22, 20), colour)
        write(ax, x + 30, 20, text, ha="left")
    text = "above each block: its channels\nbelow: its height and width in pixels"
    write(ax, 14, 408, text, ha="left", color=FAINT)
    return fig


def quantiser(ax, y: float, codes: np.ndarray):
    """Middle of the VQ-VAE: vectors to indices to codes, the codebook, the gradient's way."""
    picture(ax, 450, y, 68, codes, "index map\n64 × 64", MAPS)
    arrow(ax, (356, y), (414, y))
    arrow(ax, (486, y), (546, y))
    write(ax, 385, y + 16, "nearest")
    write(ax, 516, y + 16, "look up")
    noise = 0.12 * np.random.default_rng(0).normal(size=(6, 48))
    book = np.clip(np.linspace(0, 1, 48) + noise, 0, 1)
    strip(ax, (340, 560), (112, 148), book)
    arrow(ax, (385, 150), (385, y - 4))
    arrow(ax, (516, 150), (516, y - 4))
    write(ax, 450, 98, "codebook: K = 512 vectors of 64 numbers")
    curve = {"connectionstyle": "arc3,rad=0.38", "linestyle": "--"}
    arrow(ax, (568, y + 54), (336, y + 54), LOSS, **curve)
    write(ax, 450, y + 116, "gradient, straight through", color=LOSS)
    write(
        ax, 326, 168, "commitment loss draws\nvectors to their codes", ha="right", color=FAINT
    )
    write(
        ax,
        574,
        168,
        "codes follow the mean of\ntheir vectors (or a loss)",
        ha="left",
        color=FAINT,
    )


def generator() -> Figure:
    """From noise to a map; w is the number of channels next to the map."""
    fig, ax = canvas(900, 378)
    y, noise = 274, noise_picture().reshape(-1, 1)[:20]
    strip(ax, (56, 68), (y - 75, y + 75), noise, "Greys")
    blocks = [(112, 100, 26, 4), (266, 72, 42, 8), (396, 48, 66, 16), (504, 32, 96, 32)]
    blocks.append((604, 18, 126, 64))
    for x, width, height, _ in blocks:
        cuboid(ax, x, y - height / 2, width, height, 0.3 * height, GAN)
    picture(ax, 812, y, 134, quarter(drawn_brain(seed=3)))
    gaps = [(72, 106), (224, 260), (355, 390), (468, 498), (569, 598)]
    for (x0, x1), stride in zip(gaps, (1, 2, 2, 2, 2), strict=True):
        arrow(ax, (x0, y), (x1, y), CONV)
        write(ax, (x0 + x1) / 2, y + 12, f"stride {stride}", size=7.5, color=CONV)
    arrow(ax, (668, y), (738, y), POINT)
    write(ax, 703, y + 12, "3 × 3", size=7.5, color=POINT)
    table(ax, [62, 166, 308, 426, 528, 628, 812])
    text = "transposed convolution, kernel 4 × 4; then BatchNorm and ReLU"
    arrow(ax, (60, 22), (82, 22), CONV)
    write(ax, 90, 22, text, ha="left")
    arrow(ax, (484, 22), (506, 22), POINT)
    text = "convolution (the original has no such layer, but tanh)"
    write(ax, 514, 22, text, ha="left")
    return fig


def table(ax, columns: list[float]):
    """Under the blocks: their sizes and channels, as formulas and for two widths w."""
    sizes = ("4 × 4", "8 × 8", "16 × 16", "32 × 32", "64 × 64", "coordinates, 64 × 64")
    rows = {
        168: ("100 numbers", *sizes),
        144: ("and slice level", "8 w channels", "4 w", "2 w", "w", "w / 2", "C"),
        100: ("default, w = 32", "256", "128", "64", "32", "16", "4"),
        76: ("original, w = 128", "1024", "512", "256", "128", "-", "3 (copies)"),
    }
    for y, cells in rows.items():
        for x, cell in zip(columns, cells, strict=True):
            write(ax, x, y, cell, size=9.5, va="baseline")


# Drawn brains and noise


def band_noise(rng: np.random.Generator, low: float, high: float, side: int = 256):
    """Smooth noise of unit variance, whose waves are `low` to `high` per picture."""
    waves = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) * side
    spectrum = np.fft.fft2(rng.normal(size=(side, side))) * ((waves >= low) & (waves <= high))
    noise = np.fft.ifft2(spectrum).real
    return noise / noise.std()


def drawn_brain(seed: int) -> np.ndarray:
    """Something like an axial slice, (256, 256) in [0, 1]: cortex, white matter, ventricles."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1.12:1.12:256j, -1.12:1.12:256j]
    x, y = x + 0.014 * band_noise(rng, 1, 5), y + 0.014 * band_noise(rng, 1, 5)
    radius = np.hypot(x / 0.84, y) + 0.05 * y * (1 - np.abs(y))
    inward = np.clip((1 - radius) / 0.40, 0, 1)  # 0 at the surface, 1 where no fold reaches
    folds = np.abs(band_noise(rng, 7, 12))  # 0 along winding lines: the sulci
    sulci = step(0.22 - 0.32 * inward - folds, 0.035)
    grey = step(1.10 - 1.25 * inward - folds, 0.10)
    midline = step(0.012 - np.abs(x), 0.006) * step(np.abs(y) - 0.40, 0.03)
    image = 0.82 - 0.27 * grey - 0.30 * sulci - 0.35 * midline
    for mirrored in (x, -x):
        nucleus = np.hypot((mirrored - 0.27) / 0.10, (y + 0.02) / 0.22)
        bend = mirrored - 0.075 - 0.35 * np.abs(y + 0.03) ** 1.6
        ventricle = np.hypot(bend / 0.06, (y + 0.03) / 0.36)
        image -= 0.17 * step(1 - nucleus, 0.08) + 0.55 * step(1 - ventricle, 0.12)
    return np.clip(image, 0.14, 1) * step(1 - radius - 0.05 * sulci, 0.012)


def step(x: np.ndarray, width: float) -> np.ndarray:
    """0 below zero, 1 above, with a soft edge."""
    return 1 / (1 + np.exp(-np.clip(x / width, -50, 50)))


def quarter(image: np.ndarray) -> np.ndarray:
    """Means of 4 x 4 pixels: 256 -> 64."""
    return image.reshape(64, 4, 64, 4).mean((1, 3))


def soften(image: np.ndarray) -> np.ndarray:
    """A slight blur, as reconstructions have."""
    for axis in (0, 1):
        image = (np.roll(image, 1, axis) + 2 * image + np.roll(image, -1, axis)) / 4
    return image


def noise_picture() -> np.ndarray:
    return np.clip(0.55 + 0.2 * np.random.default_rng(0).normal(size=(10, 10)), 0.15, 1)


# Pieces


def canvas(width: int, height: int):
    fig = Figure((width / 100, height / 100), dpi=150, facecolor="white")
    FigureCanvasAgg(fig)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height), autoscale_on=False)
    ax.set_axis_off()
    return fig, ax


def write(ax, x, y, text, size=8.5, color=INK, ha="center", va="center", **more):
    ax.text(x, y, text, fontsize=size, color=color, ha=ha, va=va, linespacing=1.25, **more)


def heading(ax, x, y, text):
    write(ax, x, y, text, size=11, ha="left", weight="bold")


def picture(ax, x, y, size, image, label="", cmap="gray"):
    """An image centred at (x, y), its label below."""
    h = size / 2
    strip(ax, (x - h, x + h), (y - h, y + h), image, cmap)
    write(ax, x, y - h - 5, label, va="top")


def box(ax, x, y, width, height, text, colour):
    corner = (x - width / 2 + 4, y - height / 2 + 4)
    style = {
        "boxstyle": "round,pad=4,rounding_size=8",
        "facecolor": colour,
        "edgecolor": "none",
    }
    ax.add_patch(FancyBboxPatch(corner, width - 8, height - 8, **style))
    write(ax, x, y, text, size=9.5)


def arrow(ax, start, end, color=INK, **more):
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.3, "shrinkA": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=color, shrinkB=0, **style | more))


def elbow(ax, start, corner, end):
    ax.plot(*zip(start, corner, strict=True), color=INK, linewidth=1.3)
    arrow(ax, corner, end)


def cuboid(ax, x, y, width, height, depth, colour):
    """A box seen from the right and above; (x, y) is the lower left corner of its front."""
    d, light, dark = depth, shade(colour, 1.04), shade(colour, 0.82)
    right, top = x + width, y + height
    faces = [
        (colour, [(x, y), (right, y), (right, top), (x, top)]),
        (light, [(x, top), (right, top), (right + d, top + d), (x + d, top + d)]),
        (dark, [(right, y), (right + d, y + d), (right + d, top + d), (right, top)]),
    ]
    for face, corners in faces:
        ax.add_patch(Polygon(corners, facecolor=face, edgecolor="white", linewidth=0.8))


def shade(colour: str, factor: float) -> tuple:
    return tuple(np.clip(np.array(to_rgb(colour)) * factor, 0, 1))


def feature(ax, x, y, channels, size, colour):
    """A stack of feature maps at height y, its channels above and its pixels below."""
    h = TALL[size] / 2
    cuboid(ax, x, y - h, THICK[channels], 2 * h, 8, colour)
    write(ax, x + THICK[channels] / 2 + 5, y + h + 18, str(channels), size=9.5)
    write(ax, x + THICK[channels] / 2, y - h - 11, f"{size}²", size=8)


def strip(ax, x, y, image, cmap=MAPS):
    """An image stretched over the spans x and y."""
    ax.imshow(image, cmap=cmap, extent=(*x, *y), vmin=0, vmax=1, interpolation="nearest")


if __name__ == "__main__":
    main()
