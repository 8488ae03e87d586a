"""An encoder trained on the training split: features of layout for the scores.

In: `Data`. Out: a `SliceEncoder`, trained on first use and kept in the cache.
"""

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from dataset import BrainSlices, Data
from modules import generator_of
from support import checkpoints, device, messages


class SliceEncoder(nn.Module):
    """An autoencoder's encoder: 64 features per slice, trained on the training split.

    `metrics.RandomFeatures` capture texture, wherever it lies. These capture layout, since 64
    numbers must suffice to draw the slice again. A further output is the slice level. It is
    not part of the model under test.
    """

    VERSION = 1  # raise it if the network or its training changes
    SIZE = 64
    BATCH, LR = 32, 2e-3
    IMAGES = 24_000  # seen in training; 8 passes if the split is small

    def __init__(self):
        super().__init__()

        def down(ins, outs):
            return nn.Conv2d(ins, outs, 3, 2, 1), nn.LeakyReLU(0.1)

        def up(ins, outs):
            return nn.ConvTranspose2d(ins, outs, 4, 2, 1), nn.LeakyReLU(0.1)

        self.down = nn.Sequential(
            *down(1, 16), *down(16, 32), *down(32, 64), *down(64, 64),
            nn.Flatten(), nn.Linear(64 * 8 * 8, self.SIZE),
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.Linear(self.SIZE, 64 * 8 * 8), nn.Unflatten(1, (64, 8, 8)), nn.LeakyReLU(0.1),
            *up(64, 64), *up(64, 32), *up(32, 16), nn.Conv2d(16, 1, 3, padding=1),
        )  # fmt: skip
        self.level = nn.Linear(self.SIZE, 1)
        self.to(memory_format=torch.channels_last)

    def loss(self, x: Tensor, level: Tensor) -> Tensor:
        """Squared errors () of x (B, 1, 256, 256) and of level (B,), NaN if unknown."""
        code = self.down(F.avg_pool2d(x, 2))  # (B, 64)
        drawn = F.mse_loss(self.up(code).float(), F.avg_pool2d(x, 4))
        known = level.isfinite()
        wrong = (self.level(code)[:, 0].float() - level.nan_to_num()) * known
        return drawn + 0.01 * wrong.square().mean()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, 1, 256, 256) -> (N, 65): 64 features, and the predicted slice level."""
        codes = [self.down(F.avg_pool2d(part, 2)) for part in x.split(32)]
        return torch.cat([torch.cat([code, self.level(code)], 1) for code in codes])


def slice_encoder(data: Data, cache: Path) -> SliceEncoder:
    """The encoder of this training split: trained on first use, kept in `cache`."""
    people = hashlib.sha256(data.train.rows.tobytes()).hexdigest()[:8]
    path = cache / f"encoder-{data.fingerprint}-{people}.pt"
    expected = {"stage": "encoder", "version": SliceEncoder.VERSION, "data": data.fingerprint}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SliceEncoder()
    try:
        values = checkpoints.load_checkpoint(path, **expected)
        return checkpoints.load_weights(encoder, values.get("encoder"), path).eval()
    except UserError:
        if path.exists():
            messages.warn(f"the encoder {path} cannot be used; training it again")
    train_encoder(encoder, data.train)
    device.release_memory()
    cache.mkdir(parents=True, exist_ok=True)
    checkpoints.save_checkpoint(path, expected | {"encoder": encoder.state_dict()})
    return encoder.eval()


def train_encoder(encoder: SliceEncoder, train: BrainSlices):
    steps = math.ceil(min(encoder.IMAGES, 8 * len(train)) / encoder.BATCH)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=encoder.LR, fused=True)
    rule = torch.optim.lr_scheduler.OneCycleLR(optimizer, encoder.LR, total_steps=steps)
    levels = torch.from_numpy(train.levels)
    for step in messages.progress(range(steps), total=steps, label="encoder for scores"):
        draw = generator_of(0, step)
        rows = torch.randint(len(train), (encoder.BATCH,), generator=draw)
        with device.autocast(torch.device("cpu"), "auto"):
            loss = encoder.loss(train.batch(rows), levels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rule.step()
