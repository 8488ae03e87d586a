"""The trained judge: small networks that learn to tell samples from slices of real people.

A classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv:1610.06545) with convolutional
networks. Each learns training slices against one half of the samples and is tested on unseen
people against the other half. Both sides are cropped alike, coded as JPEG and halved in size,
so that margins, file compression or noise do not decide: at full size reconstructions were told
every time. In: sets of slices. Out: the mean AUC of several networks and its standard error.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from dataset import PIXELS, Crop
from modules import generator_of
from support import device, messages

JUDGES = 5  # single ones differ by 0.05; references get fewer, which saves a minute
STEPS, BATCH, LR = 500, 32, 2e-3
PASSES = 32  # over the samples at most, so that few samples are not learned by heart
SHIFT_PX = 4
JPEG_QUALITY = 75


class Judge(nn.Module):
    """Half-size slices (B,1,h,w) -> scores (B,), high for real ones. 0.1 M weights.

    Only the last layer is normalised. With more normalised layers some judges, by chance,
    learned the compression of the original files (AUC 0.5 or 0.99 for reconstructions). With
    none, judges learned less (AUC 0.63 instead of 0.75 for samples).
    """

    def __init__(self):
        super().__init__()

        def down(ins, outs):
            return nn.Conv2d(ins, outs, 3, 2, 1), nn.LeakyReLU(0.1)

        self.layers = nn.Sequential(
            *down(1, 16), *down(16, 32), *down(32, 64),
            nn.Conv2d(64, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.score = nn.Linear(128, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.layers(x).mean((2, 3)))[:, 0]


def prepared(images: Tensor, crop: Crop) -> Tensor:
    """Crop, code as JPEG, halve: (N,1,256,256) in [0,1] -> uint8 (N,1,h,w)."""
    pixels = crop.cut(images, PIXELS).mul(255).round().to(torch.uint8)
    size = (side // 2 for side in pixels.shape[2:])
    halves = torch.empty(len(pixels), 1, *size, dtype=torch.uint8)
    for image, half in zip(pixels[:, 0].numpy(), halves, strict=True):
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        decoded = torch.from_numpy(cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE))
        half[:] = F.avg_pool2d(decoded[None].float(), 2).round()
    return halves


def judged(
    real: Tensor, samples: Tensor, unseen: dict[str, Tensor], judges: int
) -> dict[str, tuple[float, float]]:
    """Mean AUC of `judges` networks and its standard error, for each set of unseen people.

    All sets are `prepared`. 0.5: samples cannot be told from real slices; 1: always.
    """
    scores = {name: [] for name in unseen}
    for seed in range(judges):
        order = torch.randperm(len(samples), generator=generator_of(seed, 0))
        shown, hidden = samples[order].chunk(2)
        judge = trained_judge(real, shown, seed)
        of_hidden = judge_scores(judge, hidden)
        for name, people in unseen.items():
            of_people = judge_scores(judge, people)
            truth = np.repeat([0, 1], [len(of_hidden), len(of_people)])
            scores[name].append(roc_auc_score(truth, np.concatenate([of_hidden, of_people])))
    return {
        name: (float(np.mean(aucs)), float(np.std(aucs, ddof=1) / math.sqrt(judges)))
        for name, aucs in scores.items()
    }


def trained_judge(real: Tensor, fake: Tensor, seed: int) -> Judge:
    """Train one judge: each batch holds as many real slices as fakes."""
    half = BATCH // 2
    steps = min(STEPS, math.ceil(PASSES * len(fake) / half))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=0.01, fused=True)
    rule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    truth = torch.cat([torch.ones(half), torch.zeros(half)])
    for step in messages.progress(range(steps), total=steps, label=f"judge {seed}"):
        draw = generator_of(seed, 1 + step)
        drawn = [x[torch.randint(len(x), (half,), generator=draw)] for x in (real, fake)]
        batch = augmented(torch.cat(drawn).float() / 255, draw)
        with device.autocast(torch.device("cpu"), "auto"):
            scores = judge(batch)
        loss = F.binary_cross_entropy_with_logits(scores.float(), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rule.step()
    return judge.eval()


def augmented(x: Tensor, draw: torch.Generator) -> Tensor:
    """Mirror half of the slices (B,1,h,w) and shift each by at most SHIFT_PX."""
    mirror = torch.rand(len(x), generator=draw) < 0.5
    x = torch.where(mirror[:, None, None, None], x.flip(3), x)
    h, w = x.shape[2:]
    padded = F.pad(x, (SHIFT_PX,) * 4)
    shifts = torch.randint(2 * SHIFT_PX + 1, (len(x), 2), generator=draw).tolist()
    moved = [p[:, i : i + h, j : j + w] for p, (i, j) in zip(padded, shifts, strict=True)]
    return torch.stack(moved).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def judge_scores(judge: Judge, x: Tensor) -> np.ndarray:
    """Scores (N,) of prepared slices, the mean of both mirror images."""
    parts = [judge(p) + judge(p.flip(3)) for p in (part.float() / 255 for part in x.split(64))]
    return torch.cat(parts).numpy()
