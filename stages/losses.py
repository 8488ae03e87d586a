"""Losses of reconstructions, and the random windows that they and the patches use.

In: images (B, 1, H, W) float32. Out: a loss, (). The choice between the two is `loss_of`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from dataset import BrainSlices, evenly
from scores import metrics
from support.device import window_at

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of output, images, the window's corner


def loss_of(train: BrainSlices, config: Config) -> Loss:
    """The reconstruction loss of this recipe."""
    if not config.original:
        return structural_loss(config)
    variance = train.batch(evenly(len(train), 512)).var().item()
    return scaled_mse(max(variance, 1e-6))


def scaled_mse(variance: float) -> Loss:
    """The original's loss: squared error over the data's variance."""
    return lambda output, images, corner: F.mse_loss(output, images) / variance


def structural_loss(config: Config) -> Loss:
    """L1, plus, in a window, 1 - SSIM and the difference in strength of detail.

    Returns a function of output and images (B, 1, H, W) and of the window's corner (2,).
    If a decoder cannot predict a detail, leaving it out costs least by error. The third term
    asks for as much detail as there was, wherever it lies.
    """

    def windows(x: Tensor, y: Tensor) -> Tensor:
        detail = metrics.detail_strength(x) - metrics.detail_strength(y)
        detail = detail.abs().flatten(1).mean(1)  # (B,)
        return 1 - metrics.ssim_core(x, y) + config.detail_weight * detail

    def loss(output: Tensor, images: Tensor, corner: Tensor) -> Tensor:
        x, y = (window_at(image, corner, config.window_px) for image in (output, images))
        return F.l1_loss(output, images) + metrics.in_micro_batches(windows, x, y).mean()

    return loss


def random_corner(height: int, width: int, side: int, draw: torch.Generator) -> Tensor:
    """Top and left of a random window of side `side`: (2,) int64, on the CPU."""
    ways = (size - side + 1 for size in (height, width))
    return torch.stack([torch.randint(n, (), generator=draw) for n in ways])
