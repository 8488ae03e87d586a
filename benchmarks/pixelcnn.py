"""An autoregressive prior of index maps, which compare.py compares with the DCGAN.

Dimensions as in modules: B batch, h w cells, U used codes; n samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modules


class PixelCNN(nn.Module):
    """Codes one after the other, each from those above it and to its left.

    van den Oord et al. 2016 (arXiv:1606.05328), without gates. The map, shifted by one cell,
    goes through residual 3x3 convolutions with growing gaps. Only 5 taps have weights: the row
    above, the cell to the left, and the cell itself. The slice level is added at the start.
    """

    GAPS = (1, 2, 4, 8, 1, 2, 4, 8)
    TAPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0))

    def __init__(self, codes: int, width: int = 48):
        super().__init__()
        self.start = nn.Embedding(codes + 1, width)  # the last: before the first cell
        self.level = nn.Linear(modules.LEVEL_FEATURES, width, bias=False)
        self.taps = nn.ModuleList(nn.Linear(5 * width, width) for _ in self.GAPS)
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in self.GAPS)
        self.last = nn.Linear(width, codes)

    def forward(self, ranks: Tensor, level: Tensor) -> Tensor:
        """Ranks (B, h, w) int64, level (B,) -> logits (B, h, w, U) of each cell."""
        B, h, w = ranks.shape
        moved = torch.cat([torch.full_like(ranks[:, 0, :1], self.start.num_embeddings - 1),
                           ranks.flatten(1)[:, :-1]], 1)  # fmt: skip
        x = self.start(moved) + self.level(modules.level_features(level))[:, None]
        x = x.view(B, h, w, -1).permute(0, 3, 1, 2)  # (B, width, h, w)
        for gap, taps, mix in zip(self.GAPS, self.taps, self.mix, strict=True):
            kernel = x.new_zeros(*taps.weight.shape[:1], x.shape[1], 9)
            kernel[..., :5] = taps.weight.view(len(kernel), 5, -1).transpose(1, 2)
            kernel = kernel.view(*kernel.shape[:2], 3, 3)
            seen = F.conv2d(x.relu(), kernel, taps.bias, padding=gap, dilation=gap)
            x = x + F.conv2d(seen.relu(), mix.weight[..., None, None], mix.bias)
        return self.last(x.relu().permute(0, 2, 3, 1))  # (B, h, w, U)

    @torch.no_grad()
    def draw(self, level: Tensor, h: int = 64, w: int = 64) -> Tensor:
        """Ranks (n, h, w), cell by cell. Each layer keeps its earlier inputs."""
        n, width = len(level), self.start.embedding_dim
        edge = max(self.GAPS)
        kept = [level.new_zeros(h + edge, w + 2 * edge, n, width) for _ in self.GAPS]
        ranks = level.new_full((n, h * w + 1), self.start.num_embeddings - 1, dtype=torch.long)
        shift = self.level(modules.level_features(level))  # (n, width)
        for cell in range(h * w):
            row, column = cell // w + edge, cell % w + edge
            x = self.start(ranks[:, cell]) + shift
            for gap, taps, mix, before in zip(
                self.GAPS, self.taps, self.mix, kept, strict=True
            ):
                before[row, column] = x.relu()
                seen = [before[row + gap * i, column + gap * j] for i, j in self.TAPS]
                x = x + mix(taps(torch.cat(seen, 1)).relu())
            ranks[:, cell + 1] = self.choose(self.last(x.relu()))
        return ranks[:, 1:].view(n, h, w)

    @staticmethod
    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(1), 1)[:, 0]
