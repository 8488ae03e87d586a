"""Which way to show codebook indices to a GAN works, and is a GAN right there at all?

    python benchmarks/ablate.py RUN                  # every row that the CSV does not have
    python benchmarks/ablate.py RUN --rows pc1 raw   # these
    python benchmarks/ablate.py --table              # the table, from the CSV

RUN is the folder of a finished seed of preset `quick`: its VQ-VAE and index maps are shared by
all rows. A row is a whole training of about 3 minutes on two cores (40,000 maps of the DCGAN;
no denoiser, which would hide what a GAN draws, but in the row that says so), scored as
`predict.py evaluate` does. Rows go to `ablation.csv` beside this file, their networks
to `--out`, where a stopped row continues.
"""

import argparse
import contextlib
import csv
import functools
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a finished seed")
    parser.add_argument("--rows", metavar="ROW", nargs="+", help="[all]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the DCGANs [0]")
    parser.add_argument("--out", default="runs/ablation", help="[runs/ablation]")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    return parser.parse_args()


if __name__ == "__main__":  # a question for help must not wait for torch
    ARGUMENTS = parse()

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import Tensor, nn

import modules
import predict
import train
from config import Config, Exit, UserError
from dataset import Data, open_data
from scores import evaluation, figures
from stages.denoiser import train_denoiser
from stages.stage import Run, open_seed, order_of
from support import checkpoints, device, endings, messages

KIMG = 40.0  # maps seen per row, thousands
# By Adam, as the original's loss and networks were made for: one optimiser for all DCGANs.
ALONE = {"gan_kimg": KIMG, "denoiser_kimg": 0.0, "optimizer": "adam"}
ALONE |= {"gan_lr": (8e-4, 8e-4), "gamma": 0.3}
SECONDS = 180  # of training for the row whose maps are not counted

SCORES = {
    "fd_train": "relative FD",
    "learned_fd_train": "relative FD, encoder",
    "fine_fd_reconstruction": "fine FD to reconstructions",
    "recall": "recall",
    "coverage": "coverage",
    "ms_ssim_of_pairs": "MS-SSIM of pairs",
    "code_tv": "codes, TV",
    "code_pairs_tv_horizontal": "pairs, TV",
}
OF_CODES = ("fine_fd_reconstruction", "code_tv", "code_pairs_tv_horizontal")
EFFORT = {"seconds": "training, s", "kimg": "1,000 maps", "ms_per_sample": "ms a sample"}
REFERENCES = {"real": "(real slices)", "reconstruction": "(their reconstructions)"}
COLUMNS = ("row", "seed", "base", *EFFORT, *SCORES)
CSV = HERE / "ablation.csv"


# --- other orders of the codes, in even bins of one channel ---------------------------------
#
# Each takes the fitted PC-1 code map, the codebook (K, D) and the training split's counts (K,)
# and returns used codes (U,) in a new order, and their places (U, 1) in (-1, 1).


def salesman_order(fitted: modules.CodeMap, codebook: Tensor, counts: Tensor):
    """A short path through all used codes: nearest neighbour, then 2-opt."""
    vectors = codebook[fitted.used].double().numpy()
    far = cdist(vectors, vectors)
    path = [0]  # an end of the PC-1 order
    left = set(range(1, len(vectors)))
    while left:
        path.append(min(left, key=far[path[-1]].__getitem__))
        left.remove(path[-1])
    path, better = np.array(path), True
    while better:
        better = False
        for i in range(1, len(path) - 2):
            # Turning path[i..j] round exchanges two steps for two others.
            j = np.arange(i + 1, len(path) - 1)
            before = far[path[i - 1], path[i]] + far[path[j], path[j + 1]]
            after = far[path[i - 1], path[j]] + far[path[i], path[j + 1]]
            best = int((before - after).argmax())
            if before[best] - after[best] > 1e-9:
                path[i : j[best] + 1] = path[i : j[best] + 1][::-1].copy()
                better = True
    return fitted.used[torch.from_numpy(path)], fitted.points


def kohonen_order(fitted: modules.CodeMap, codebook: Tensor, counts: Tensor):
    """Along a chain of as many nodes as codes, fitted by Kohonen's batch rule (1990).

    The chain starts on the PC-1 order; its neighbourhood shrinks from a quarter of it to half
    a node. A code's place is that of its nearest node.
    """
    vectors = codebook[fitted.used].double()  # (U, D)
    U = len(vectors)
    nodes, place = vectors.clone(), torch.arange(U, dtype=torch.float64)
    for sigma in np.geomspace(U / 4, 0.5, 100):
        nearest = torch.cdist(vectors, nodes).argmin(1)  # (U,)
        pull = torch.exp(-((place[:, None] - place[nearest]) ** 2) / (2 * sigma**2))
        total = pull.sum(1, keepdim=True)  # (nodes, 1)
        nodes = torch.where(total > 1e-9, pull @ vectors / total.clamp_min(1e-9), nodes)
    order = torch.cdist(vectors, nodes).argmin(1).argsort(stable=True)
    return fitted.used[order], fitted.points


def quantile_places(fitted: modules.CodeMap, codebook: Tensor, counts: Tensor):
    """PC-1 order, each code in the middle of its share of all cells: rare codes lie close."""
    share = counts[fitted.used].double() / counts.sum()
    return fitted.used, ((share.cumsum(0) - share / 2) * 2 - 1).float()[:, None]


def without_jitter(fitted: modules.CodeMap, codebook: Tensor, counts: Tensor):
    """A hair beside the middles of even bins: the same bins, but maps are not jittered."""
    return fitted.used, fitted.points * (1 - 1e-6)


# --- other networks -------------------------------------------------------------------------
#
# Each takes a run and returns what takes the place of what: (owner, name, replacement).


class SoftGenerator(modules.Generator):
    """Logits over the used codes; D sees the expected code, samples are the likeliest one.

    The last layer is 1x1: a 3x3 one to 512 channels would be eight times the whole rest.
    """

    def __init__(self, config: Config, points: Tensor, size=modules.MAP):
        width, channels = config.gan_widths[0], len(points)
        super().__init__(config.noise_dim, width, channels, False, False, size)
        last = self.layers[-1]
        self.layers[-1] = nn.Conv2d(last.in_channels, len(points), 1)
        self.layers[-1].apply(modules.start_at_he)
        self.register_buffer("points", points, persistent=False)  # (U, C)
        self.to(memory_format=torch.channels_last)

    def forward(self, noise: Tensor, level: Tensor) -> Tensor:
        logits = super().forward(noise, level).permute(0, 2, 3, 1)  # (B, h, w, U)
        if self.training:
            u = logits.softmax(-1) @ self.points.to(logits.dtype)  # (B, h, w, C)
        else:
            u = F.embedding(logits.argmax(-1), self.points)
        return u.permute(0, 3, 1, 2)  # (B, C, h, w)


def logits(run: Run):
    points = checkpoints.load_checkpoint(run.path("codes.pt"))["points"]

    def make(config: Config, size) -> SoftGenerator:
        return SoftGenerator(config, points, size)

    return [(modules, "make_generator", make)]


class AugmentedDiscriminator(modules.Discriminator):
    """Sees each map moved by up to 8 cells and with a quarter of it cut out.

    Zhao et al. 2020 (DiffAugment, arXiv:2006.10738): translation and cutout, on real and
    generated maps alike. Cut cells take the box's corner, which is background.
    """

    def forward(self, u: Tensor, level: Tensor) -> Tensor:
        B, moved, cut = len(u), [], []
        for side in u.shape[2:]:
            x = torch.arange(side, device=u.device)
            by = torch.randint(-8, 9, (B, 1), device=u.device)
            moved.append((x + by).clamp(0, side - 1))  # (B, side)
            start = torch.randint(0, side // 2 + 1, (B, 1), device=u.device)
            cut.append((x >= start) & (x < start + side // 2))  # (B, side)
        first = torch.arange(B, device=u.device)[:, None, None]
        u = u.permute(0, 2, 3, 1)[first, moved[0][:, :, None], moved[1][:, None]]
        cut = (cut[0][:, :, None] & cut[1][:, None])[..., None]  # (B, h, w, 1)
        u = torch.where(cut, u[:, :1, :1], u)  # (B, h, w, C)
        return super().forward(u.permute(0, 3, 1, 2), level)


def augmented(run: Run):
    return [(modules, "Discriminator", AugmentedDiscriminator)]


# --- control: a DCGAN of pixels ---------------------------------------------------------------


def write_pixels(run: Run) -> dict:
    """In place of index maps: slices at 64x64, grey level 0..255 being the "index"."""
    maps = np.empty((len(run.data.images), 64, 64), np.uint16)
    for start in range(0, len(maps), 256):
        part = run.data.images[start : start + 256].astype(np.float32)
        maps[start : start + 256] = part.reshape(-1, 64, 4, 64, 4).mean((2, 4)).round()
    np.save(run.path("codes.npy"), maps)
    counts = train.histogram(maps, run.data.train.rows, run.config.codes)
    return {
        "used": torch.arange(256), "points": modules.even_middles(256),
        "counts": {"train": counts}, "maps": checkpoints.checksum(run.path("codes.npy")),
    }  # fmt: skip


def enlarge(vqvae: nn.Module, indices: Tensor) -> Tensor:
    """In place of the decoder: (B, 64, 64) grey levels -> (B, 1, 256, 256), bicubic."""
    small = indices[:, None].float() / 255
    return F.interpolate(small, scale_factor=4, mode="bicubic").clamp(0, 1)


def pixels(run: Run):
    return [(modules.VQVAE, "decode", enlarge)]


# --- control: an autoregressive prior ---------------------------------------------------------


class PixelCNN(nn.Module):
    """Codes one after the other, each from those above and to the left.

    van den Oord et al. 2016 (arXiv:1606.05328), without gates: the map, moved on by one cell,
    goes through residual 3x3 convolutions of which only the 5 taps above and to the left
    count, with growing gaps. The slice level is added at the start.
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
        """Ranks (B, h, w) int64, level (B,) -> logits (B, h, w, U) of every cell."""
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
        """Ranks (n, h, w), cell by cell; each layer keeps what it has put out before."""
        n, width = len(level), self.start.embedding_dim
        edge = max(self.GAPS)
        kept = [torch.zeros(h + edge, w + 2 * edge, n, width) for _ in self.GAPS]
        ranks = torch.full((n, h * w + 1), self.start.num_embeddings - 1)
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


@dataclass
class Autoregressive:
    """A trained prior, to be scored like a run."""

    prior: PixelCNN
    base: predict.TrainedRun
    conditional: bool = True

    def noise(self, n: int):
        return self.base.noise(n)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ranks = torch.cat([self.prior.draw(part) for part in self.noise(n)[1].split(128)])
        maps = self.base.code_map.used[ranks]
        with torch.no_grad():
            return maps, self.base.vqvae.decode(maps)


def train_autoregressive(run: Run, base: predict.TrainedRun):
    """Cross-entropy for SECONDS -> the prior, its seconds, thousands of maps seen."""
    torch.manual_seed(run.seed)
    prior, gan = PixelCNN(len(base.code_map.used)), train.Gan(run)
    adam = torch.optim.Adam(prior.parameters(), lr=2e-3)
    begun, nimg, B = time.monotonic(), 0, 16
    while (passed := time.monotonic() - begun) < SECONDS:
        for group in adam.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * passed / SECONDS))
        rows = order_of(run.seed, train.ORDER, len(gan.levels), nimg, B)
        ranks = gan.code_map.rank[gan.real_maps(run.data.train.rows[rows])]
        with device.autocast(run.device, run.config.precision):
            scores = prior(ranks, gan.levels[rows])
        loss = F.cross_entropy(scores.float().flatten(0, 2), ranks.flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        nimg += B
    messages.say(f"autoregressive: {loss.item() / math.log(2):.2f} bits a cell at the end")
    return Autoregressive(prior.eval(), base), passed, nimg / 1000


# --- the rows -------------------------------------------------------------------------------


def train_gan(run: Run, base: predict.TrainedRun):
    """The DCGAN as `train.py` trains it -> the run, seconds, thousands of maps seen.

    And the denoiser, where the row has one.
    """
    with run.signals:
        train.train_dcgan(run)
        train_denoiser(run)
    trained = predict.load_run(run.folder)
    stages = (stage for stage in ("dcgan", "denoiser") if stage in trained.trained)
    paths = (run.path(f"{stage}_last.pt") for stage in stages)
    seconds = sum(checkpoints.load_checkpoint(path)["seconds"] for path in paths)
    return trained, seconds, run.config.gan_kimg


def without_contrast(run: Run, base: predict.TrainedRun):
    """The first row's network, its samples left as they are."""
    folder = run.folder.parents[1] / "coordinates" / run.folder.name
    trained = predict.load_run(folder)
    trained.generator.contrast.zero_()
    seconds = checkpoints.load_checkpoint(folder / "dcgan_last.pt")["seconds"]
    return trained, seconds, trained.config.gan_kimg


@dataclass(frozen=True)
class Row:
    """What the GAN draws and how it learns, as what differs from the default."""

    label: str
    config: dict = field(default_factory=dict)
    order: Callable | None = None  # (fitted, codebook, counts) -> used, points
    maps: Callable | None = None  # run -> what else codes.pt holds, codes.npy being written
    instead: Callable = lambda run: []  # run -> [(owner, name, replacement)]
    train: Callable = train_gan
    meaningless: tuple = ()  # scores that compare codes, where there are none


ONE = {"map_channels": 1}
PC1 = {"order": "pc1", **ONE}
# BCE, BatchNorm in both networks, no slice level, no averaging, the original's learning rate
BCE = {"gan_loss": "bce", "gan_beta1": 0.5, "gan_lr": (2e-4, 2e-4), "ema_kimg": 0.0}

ROWS = {
    "coordinates": Row("4 principal coordinates, nearest code"),
    "coordinates-denoised": Row(
        "the same, then the denoiser", {"denoiser_kimg": Config.denoiser_kimg}
    ),
    "pc1": Row("one channel, PC-1 order, even bins", PC1),
    "quantiles": Row("one channel, PC-1 order, quantile bins", PC1, quantile_places),
    "kohonen": Row("one channel, Kohonen chain, even bins", PC1, kohonen_order),
    "salesman": Row("one channel, travelling-salesman order, even bins", PC1, salesman_order),
    "raw": Row("one channel, raw index order, even bins", {"order": "raw", **ONE}),
    "logits": Row(
        "logits over the codes, soft coordinates", {"gan_kimg": 6.0}, instead=logits
    ),
    "coordinates-bce": Row("coordinates, the original's loss and networks", BCE),
    "original": Row(
        "three copies, raw order, even bins, the original's loss and networks",
        {"order": "raw", "map_channels": 3, **BCE},
    ),
    "no-contrast": Row("coordinates, contrast not adjusted", train=without_contrast),
    "no-average": Row("coordinates, generator not averaged", {"ema_kimg": 0.0}),
    "augmented": Row("coordinates, translation and cutout before D", instead=augmented),
    "no-jitter": Row("PC-1 order, real maps not jittered in their bins", PC1, without_jitter),
    "pixels": Row(
        "control: pixels at 64x64, enlarged", {"order": "raw", **ONE}, maps=write_pixels,
        instead=pixels, meaningless=OF_CODES,
    ),
    "autoregressive": Row(
        "control: autoregressive prior (PixelCNN)", train=train_autoregressive
    ),
}  # fmt: skip


def prepare(name: str, base: predict.TrainedRun, folder: Path, data: Data, seed: int):
    """A run of the VQ-VAE, index maps and decoder of `base`, whose prior is not trained."""
    row = ROWS[name]
    config = replace(base.config, **ALONE | row.config)
    run = open_seed(folder, config, seed, data)
    mine = run.fingerprint()

    def adopt(stage: str, **link):
        for file in (f"{stage}_best.pt", f"{stage}_last.pt"):
            values = checkpoints.load_checkpoint(base.folder / file) | mine | link
            checkpoints.save_checkpoint(run.path(file), values)

    adopt("vqvae")
    shutil.copyfile(base.folder / "codes.npy", run.path("codes.npy"))
    codebook = base.vqvae.quantizer.codebook.cpu()
    fitted = modules.CodeMap.fit(codebook, base.counts, config.order, config.map_channels)
    used, points = fitted.used, fitted.points
    if row.order:
        used, points = row.order(fitted, codebook, base.counts)
    values = checkpoints.load_checkpoint(base.folder / "codes.pt") | mine
    values |= {"used": used, "points": points}
    values["vqvae"] = checkpoints.checksum(run.path("vqvae_best.pt"))
    values |= row.maps(run) if row.maps else {}
    maps = np.load(run.path("codes.npy"), mmap_mode="r")
    values["common"] = train.common_codes(maps, run)
    checkpoints.save_checkpoint(run.path("codes.pt"), values)
    adopt("decoder", codes=checkpoints.checksum(run.path("codes.pt")))
    return run


def measure(name: str, run: Run, base: predict.TrainedRun, scorer) -> list[dict]:
    """Train and score one row; with the first come the references."""
    row = ROWS[name]
    with contextlib.ExitStack() as stack:
        for owner, attribute, new in row.instead(run):
            stack.enter_context(mock.patch.object(owner, attribute, new))
        trained, seconds, kimg = row.train(run, base)
        begun = time.monotonic()
        pictures = trained.sample(64)[1]
        took = (time.monotonic() - begun) / 64
        scorer.draw(trained)
    np.save(run.path("four.npy"), pictures[:4, 0].numpy())
    scores = evaluation.score_generation(scorer)
    found = {key: round(scores[key]["generated"], 4) for key in SCORES}
    found = {key: value for key, value in found.items() if key not in row.meaningless}
    effort = {"seconds": round(seconds), "kimg": round(kimg, 1)}
    effort["ms_per_sample"] = round(took * 1000, 1)
    rows = [{"row": name, "seed": run.seed} | effort | found]
    if not read_rows():
        for kind in REFERENCES:
            found = {k: round(scores[k][kind], 4) for k in SCORES if kind in scores[k]}
            rows.append({"row": kind} | found)
    return rows


# --- the table --------------------------------------------------------------------------------


def read_rows() -> list[dict]:
    if not CSV.exists():
        return []
    with open(CSV, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(rows: list[dict]):
    new = not CSV.exists()
    with open(CSV, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table() -> str:
    """EXPERIMENTS.md's: mean (sd) over seeds; a row that was not measured says so."""
    found, shown = read_rows(), SCORES | EFFORT
    lines = ["| what the GAN draws, and how it learns | " + " | ".join(shown.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(shown))
    labels = {name: row.label for name, row in ROWS.items()} | REFERENCES
    for name, label in labels.items():
        mine = [row for row in found if row["row"] == name]
        columns = {k: [float(row[k]) for row in mine if row[k]] for k in shown}
        cells = [_shown(values) for values in columns.values()]
        lines.append(f"| {label} | " + " | ".join(cells if mine else ["not measured"]) + " |")
    return "\n".join(lines)


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    text = f"{mean:.0f}" if abs(mean) >= 100 else f"{mean:.3g}"
    return text if len(set(values)) == 1 else f"{text} ({statistics.stdev(values):.2g})"


def draw(folder: Path, seed: int):
    """images/mappings.png and variants.png: every row's first samples, of the same noise."""
    names = list(ROWS)
    others = names.index("logits") + 1
    for picture, part in {"mappings": names[:others], "variants": names[others:]}.items():
        files = {name: folder / name / f"seed-{seed}" / "four.npy" for name in part}
        rows = {name: np.load(file) for name, file in files.items() if file.exists()}
        if rows:
            path = HERE.parent / f"images/{picture}.png"
            files.save_figure(path, lambda rows=rows: figures.side_by_side(rows))


def main(arguments: argparse.Namespace):
    if unknown := sorted(set(arguments.rows or ()) - set(ROWS)):
        raise UserError(Exit.USAGE, f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if arguments.table or not arguments.run:
        print(table())
        return
    base = predict.load_run(arguments.run)
    data = open_data(base.config)
    if data.fingerprint != base.fingerprint:
        raise UserError(Exit.CHECKPOINT, f"{base.folder} was trained on other data")
    if replace(base.config, **ALONE).identity() != Config(**ALONE).identity():
        raise UserError(Exit.CHECKPOINT, f"{base.folder} is not of preset quick")
    mark = f"{checkpoints.checksum(base.folder / 'codes.npy'):08x}"
    if {row["base"] for row in read_rows()} - {mark}:
        raise UserError(Exit.BUSY, f"{CSV} holds rows of another VQ-VAE: move it away")
    done = {(row["row"], row["seed"]) for row in read_rows()}
    scorer = functools.cache(lambda: evaluation.Scorer(base, data))  # made when first needed
    folder = Path(arguments.out) / mark
    for name in arguments.rows or ROWS:
        if (name, str(arguments.seed)) in done:
            continue
        run = prepare(name, base, folder / name, data, arguments.seed)
        rows = [row | {"base": mark} for row in measure(name, run, base, scorer())]
        append(rows)
        messages.say(", ".join(f"{key} {value}" for key, value in rows[0].items()))
    draw(folder, arguments.seed)


if __name__ == "__main__":
    endings.run_script(lambda: main(ARGUMENTS))
