"""Every score of a finished run with its references: one dict for `metrics.json`, one table.

In: a loaded run (`predict.TrainedRun`) and the data it was trained on. Out: plain values, and
the features that figures need. The measures are in `metrics`; this file says what is compared
with what.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, Exit, UserError
from dataset import BrainSlices, Data
from modules import generator_of
from scores import judge, metrics
from support import checkpoints, device, messages

PART = 128  # slices in memory at a time
JUDGED = 2048  # training slices that the judge learns
NEAREST = 128  # samples whose nearest test slices are searched


def parts_of(
    measure, split: BrainSlices, indices: np.ndarray | None = None
) -> Iterator[Tensor]:
    """`measure` of the slices of a split (or of `indices`), PART slices at a time."""
    indices = np.arange(len(split)) if indices is None else indices
    for start in range(0, len(indices), PART):
        yield measure(split.batch(indices[start : start + PART]))


def in_parts(measure, split: BrainSlices, indices=None) -> Tensor:
    """`measure` as one tensor: slices need not fit into memory, features must."""
    return torch.cat(list(parts_of(measure, split, indices)))


# --- learned features ---------------------------------------------------------------------


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
    except UserError as problem:
        if path.exists():
            messages.warn(f"{problem}; training it again")
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


# --- reconstruction -----------------------------------------------------------------------


IMAGE_MEASURES = {
    "ssim": metrics.reported_ssim,
    "ssim_in_brain": metrics.ssim_in_brain,
    "ms_ssim": metrics.reported_ms_ssim,
    "psnr_db": metrics.psnr,
    "psnr_in_brain_db": metrics.psnr_in_brain,
}


def score_reconstruction(run, test: BrainSlices) -> tuple[dict, dict]:
    """Mean and sd of each score over all test slices; and scores of the codebook."""
    used = set()

    def measure(images: Tensor) -> Tensor:
        maps, outputs = run.reconstruct(images)
        used.update(maps.unique().tolist())
        return torch.stack([f(images, outputs) for f in IMAGE_MEASURES.values()], 1)

    values = dict(zip(IMAGE_MEASURES, in_parts(measure, test).T, strict=True))  # (n,) each
    result = {
        name: {"mean": value.mean().item(), "sd": value.std(correction=0).item()}
        for name, value in values.items()
    }
    result |= {"n": len(test), "share_above_0.6": (values["ssim"] > 0.6).float().mean().item()}
    fixed, entropy = metrics.bits_per_pixel(run.counts.numpy(), run.config.codes)
    total = metrics.perplexity(run.counts)
    codebook = {
        "codes": run.config.codes,
        "used": int((run.counts > 0).sum()),
        "perplexity": total,
        "perplexity_share": total / run.config.codes,
        "used_on_test": len(used),
        "bits_per_pixel": fixed,
        "bits_per_pixel_entropy": entropy,
    }
    return result, codebook


# --- generation ---------------------------------------------------------------------------


KINDS = ("generated", "reconstruction", "real")  # what is scored, and its references


@dataclass
class Described:
    """Features of one set of n slices."""

    features: np.ndarray  # (n, 176) of random convolutions
    fine: np.ndarray  # (n, 176) of the same, of the slice minus its 5x5 mean
    learned: np.ndarray  # (n, 64) of the encoder
    level_seen: np.ndarray  # (n,) predicted slice level
    areas: np.ndarray  # (n, 3) pixels of CSF, grey and white matter
    judged: Tensor  # (n, 1, h, w) uint8, as the judge sees them
    spectrum: Tensor | None = None  # (R,) dB
    pairs: float = math.nan  # mean MS-SSIM of random pairs


def slices_compared(config: Config, data: Data) -> int:
    """n, slices of each kind: --samples, or as many as the smallest set has."""
    return min(config.samples, len(data.test), len(data.validation), len(data.train) // 2)


class Scorer:
    """Features of the sets that are compared, n slices of each kind.

    train, real: two disjoint random draws of training slices. reconstruction: of `real`.
    generated. validation, test: unseen people.
    """

    def __init__(self, run, data: Data):
        self.run, self.data = run, data
        self.n = n = slices_compared(run.config, data)
        self.random = metrics.RandomFeatures()
        cache = Path(run.config.cache)
        self.encoder = slice_encoder(data, cache)
        order = np.random.default_rng(0).permutation(len(data.train))
        self.rows = {"train": order[:n], "real": order[n : 2 * n]}
        other = np.random.default_rng(1)
        self.rows["validation"] = other.permutation(len(data.validation))[:n]
        self.rows["test"] = other.permutation(len(data.test))[:n]
        self.units = self.unit_of_each(order[: 4 * n])
        train = data.train.batch(self.rows["train"])
        self.thresholds = metrics.tissue_thresholds(train)
        self.sets = {"train": self.described(train)}
        real = data.train.batch(self.rows["real"])
        self.sets["real"] = self.with_pairs(real)
        self.sets["reconstruction"] = self.with_pairs(run.reconstruct(real)[1])
        for name, split in (("validation", data.validation), ("test", data.test)):
            self.sets[name] = self.features_of(split.batch(self.rows[name]))
        # Copies of any training slice count, not only of those in "train".
        self.all_train = {
            "features": in_parts(self.random.features, data.train).numpy(),
            "learned": in_parts(self.learned, data.train).numpy(),
        }
        self.near_training = {of: {} for of in self.all_train}
        for name in ("validation", "test", "real", "reconstruction"):
            self.measure_nearest(name)
        self.draw(run)

    def draw(self, run):
        """Set n samples of `run` as the generated set."""
        images = run.sample(self.n)[1]
        self.level_asked, self.conditional = run.noise(self.n)[1], run.conditional
        self.first = images[:NEAREST].clone()
        self.sets["generated"] = self.with_pairs(images)
        self.measure_nearest("generated")

    def measure_nearest(self, name: str):
        for of, bank in self.all_train.items():
            found = metrics.distance_to_nearest(getattr(self.sets[name], of), bank)
            self.near_training[of][name] = found

    def learned(self, images: Tensor) -> Tensor:
        return self.encoder.features(images)[:, :-1]

    def unit_of_each(self, pool: np.ndarray) -> dict[str, float]:
        """The units of relative FD: mean distance of random draws of n training slices."""
        kinds = {
            "features": self.random.features,
            "fine": self.random.fine_features,
            "learned": self.learned,
        }
        return {
            name: metrics.relative_floor(in_parts(f, self.data.train, pool), self.n)[0]
            for name, f in kinds.items()
        }

    def features_of(self, images: Tensor) -> Described:
        learned = self.encoder.features(images).numpy()
        return Described(
            features=self.random.features(images).numpy(),
            fine=self.random.fine_features(images).numpy(),
            learned=learned[:, :-1],
            level_seen=learned[:, -1],
            areas=metrics.tissue_areas(images, self.thresholds),
            judged=judge.prepared(images, self.run.code_map.crop),
        )

    def described(self, images: Tensor) -> Described:
        """`features_of`, with the spectrum."""
        found = self.features_of(images)
        found.spectrum = metrics.radial_spectrum(images)
        return found

    def with_pairs(self, images: Tensor) -> Described:
        """`described`, with the pairs, which take most of the time."""
        found = self.described(images)
        found.pairs = metrics.ms_ssim_of_pairs(images)
        return found

    # Each score is a dict: set -> number. "generated" is the result, the others are references.

    def each(self, measure, *kinds: str) -> dict[str, float]:
        return {kind: float(measure(self.sets[kind])) for kind in kinds or KINDS}

    def fd(self, of: str, against: str, unseen: bool = False) -> dict[str, float]:
        """Relative FD of each kind; unseen: also of test slices, the mark to compare with."""

        def measure(found: Described) -> float:
            target = getattr(self.sets[against], of)
            return metrics.frechet_distance(getattr(found, of), target) / self.units[of]

        result = self.each(measure)
        if unseen:
            result["unseen_people"] = measure(self.sets["test"])
        return result

    def overlap(self, of: str) -> dict[str, dict[str, float]]:
        """Precision, recall, coverage: measure -> kind -> number."""
        target = getattr(self.sets["train"], of)
        kinds = {k: metrics.prdc(target, getattr(self.sets[k], of)) for k in KINDS}
        names = ("precision", "recall", "coverage")
        return {name: {k: values[name] for k, values in kinds.items()} for name in names}

    def classifier(self) -> dict[str, float]:
        """Held-out AUC of training slices against others, folds by subject.

        Empty if all training slices are of one subject, or no fold has both sides.
        """
        subjects = {k: self.data.train.subjects[self.rows[k]] for k in ("train", "real")}
        groups = {"generated": None, "reconstruction": subjects["real"]}
        groups["real"] = subjects["real"]
        if min(len(set(names.tolist())) for names in subjects.values()) < 2:
            return {}
        train = self.sets["train"].features
        scores = {
            kind: metrics.c2st_auc(train, self.sets[kind].features, subjects["train"], group)
            for kind, group in groups.items()
        }
        return {kind: score for kind, score in scores.items() if not math.isnan(score)}

    def memorised(self, of: str) -> dict[str, float]:
        """Share nearer to a training slice than 95 % of unseen people's slices are.

        Controls: "planted_copies" are training slices (distance 0); "reconstruction"s of
        training slices are the best copies that the decoder can draw.
        """
        near = self.near_training[of]
        kinds = {"generated": "generated", "reconstruction": "reconstruction"}
        kinds |= {"unseen_people": "validation", "planted_copies": "real"}
        return {
            name: metrics.memorised_share(near[kind], near["test"])
            for name, kind in kinds.items()
        }

    def judge_auc(self) -> dict[str, dict[str, float]]:
        """AUC of trained judges on unseen people, by the split of these people.

        Each judge learns training slices that are in no other set.
        """
        rows = np.setdiff1d(np.arange(len(self.data.train)), self.rows["real"])
        rows = np.random.default_rng(2).permutation(rows)[:JUDGED]
        crop = self.run.code_map.crop
        real = in_parts(lambda x: judge.prepared(x, crop), self.data.train, rows)
        unseen = {name: self.sets[name].judged for name in ("validation", "test")}
        judges = {"generated": judge.JUDGES, "reconstruction": 2, "real": 2}
        found = {
            k: judge.judged(real, self.sets[k].judged, unseen, n) for k, n in judges.items()
        }
        aucs = {
            f"judge_auc_{name}": {kind: values[name][0] for kind, values in found.items()}
            for name in unseen
        }
        for name in unseen:
            aucs[f"judge_auc_{name}"]["standard_error"] = found["generated"][name][1]
        return aucs

    def morphometry(self) -> dict[str, float]:
        """Distance of tissue areas from training slices, over that of two halves of people."""
        levels, subjects = self.data.train.levels, self.data.train.subjects
        areas = in_parts(
            lambda x: torch.from_numpy(metrics.tissue_areas(x, self.thresholds)),
            self.data.train,
        ).numpy()
        draw, halves = np.random.default_rng(3), []
        for _ in range(10):
            people = draw.permutation(np.unique(subjects))
            first = np.isin(subjects, people[: len(people) // 2])
            a, b = (draw.permutation(np.flatnonzero(s))[: self.n] for s in (first, ~first))
            halves.append(metrics.area_distance(areas[a], areas[b], levels[a], levels[b]))
        unit, asked = float(np.mean(halves)), self.asked_levels()
        train, of_train = self.sets["train"].areas, asked["train"]
        kinds = {kind: kind for kind in KINDS} | {"unseen_people": "test"}
        return {
            name: metrics.area_distance(self.sets[kind].areas, train, asked[kind], of_train)
            / unit
            for name, kind in kinds.items()
        }

    def asked_levels(self) -> dict[str, np.ndarray]:
        """The slice level of each slice of every set; NaN if it is unknown."""
        data = {"validation": self.data.validation, "test": self.data.test}
        asked = {name: split.levels[self.rows[name]] for name, split in data.items()}
        asked |= {name: self.data.train.levels[self.rows[name]] for name in ("train", "real")}
        asked["reconstruction"] = asked["real"]
        asked["generated"] = self.level_asked.numpy()
        return asked

    def spectrum(self) -> dict[str, float]:
        """Mean difference of power spectra from training slices, up to their noise floor."""
        train = self.sets["train"].spectrum
        end = max(9, metrics.noise_floor(train))
        return self.each(lambda s: metrics.spectrum_difference(train, s.spectrum, end))

    def level_error(self) -> dict[str, float]:
        """Mean error of the predicted slice level, over slices of known level.

        A generator without levels is not scored.
        """
        asked = self.asked_levels()
        kinds = {kind: kind for kind in KINDS} | {"unseen_people": "test"}
        result = {}
        for name, kind in kinds.items():
            known = np.isfinite(asked[kind])
            if known.any() and (name != "generated" or self.conditional):
                errors = np.abs(self.sets[kind].level_seen - asked[kind])
                result[name] = float(errors[known].mean())
        return result

    def near_test(self) -> dict[str, float]:
        """Mean of the highest SSIM among the 8 nearest test slices, over 128 slices."""
        real = self.data.validation.batch(self.rows["validation"][:NEAREST])
        kinds = {"generated": self.first, "real": real}
        return {
            kind: metrics.ssim_to_nearest(
                images, parts_of(metrics.thumbnails, self.data.test), self.data.test.batch
            )
            for kind, images in kinds.items()
        }

    def as_the_seed_counts_it(self) -> dict[str, float]:
        one = self.first[:1]
        scores = in_parts(lambda x: metrics.ssim(one.expand_as(x), x), self.data.test)
        return {
            "mean": scores.mean().item(),
            "share_above": (scores > 0.6).float().mean().item(),
        }


def score_generation(scorer: Scorer) -> dict:
    """Each measure for generated slices, for reconstructions, and for real slices."""
    s = scorer
    result = {
        "n": s.n,
        "fd_train": s.fd("features", "train", unseen=True),
        "fd_validation": s.fd("features", "validation"),
        "fd_test": s.fd("features", "test"),
        "learned_fd_train": s.fd("learned", "train", unseen=True),
        "learned_fd_validation": s.fd("learned", "validation"),
        "learned_fd_test": s.fd("learned", "test"),
        "fine_fd_train": s.fd("fine", "train", unseen=True),
        "fine_fd_reconstruction": {"generated": s.fd("fine", "reconstruction")["generated"]},
        **s.overlap("features"),
        **{f"learned_{name}": row for name, row in s.overlap("learned").items()},
    }
    train = s.sets["train"].features
    result["kid_train"] = s.each(lambda x: metrics.kid(x.features, train))
    if classifier := s.classifier():
        result["c2st_auc"] = classifier
    result |= s.judge_auc()
    result["morphometry"] = s.morphometry()
    result["spectrum_db"] = s.spectrum()
    result["ms_ssim_of_pairs"] = s.each(lambda x: x.pairs)
    if level := s.level_error():
        result["level_error"] = level
    result["memorised_share"] = s.memorised("features")
    result["learned_memorised_share"] = s.memorised("learned")
    result["ssim_to_nearest_test_slice"] = s.near_test()
    result["as_the_seed_counts_it"] = s.as_the_seed_counts_it()
    return result


def evaluate(run, data: Data) -> tuple[dict, Scorer]:
    """Every score of a run as plain values (docs/quality.md), and the sets behind them."""
    if data.fingerprint != run.fingerprint:
        raise UserError(
            Exit.CHECKPOINT, f"{run.folder} was trained on other data; give its --data"
        )
    reconstruction, codebook = score_reconstruction(run, data.test)
    scorer = Scorer(run, data)
    device.release_memory()
    result = {
        "seed": run.seed,
        "stamp": run.stamp,
        "reconstruction": reconstruction,
        "codebook": codebook,
        "generation": score_generation(scorer),
    }
    result["peak_memory_mb"] = round(device.peak_memory_mb())
    return result, scorer


# --- the table ----------------------------------------------------------------------------


IMAGE_LABELS = {
    "ssim": "SSIM",
    "ssim_in_brain": "SSIM inside the brain",
    "ms_ssim": "MS-SSIM",
    "psnr_db": "PSNR, dB",
    "psnr_in_brain_db": "PSNR inside the brain, dB",
}
LABELS = {
    "fd_train": "relative FD to training slices",
    "fd_validation": "relative FD to validation slices",
    "fd_test": "relative FD to test slices",
    "learned_fd_train": "relative FD to training slices, encoder",
    "learned_fd_validation": "relative FD to validation slices, encoder",
    "learned_fd_test": "relative FD to test slices, encoder",
    "fine_fd_train": "fine-scale relative FD to training slices",
    "fine_fd_reconstruction": "fine-scale relative FD to reconstructions",
    "precision": "precision, k = 5",
    "recall": "recall, k = 5",
    "coverage": "coverage, k = 5",
    "learned_precision": "precision, k = 5, encoder",
    "learned_recall": "recall, k = 5, encoder",
    "learned_coverage": "coverage, k = 5, encoder",
    "kid_train": "KID to training slices",
    "judge_auc_test": "trained judge's AUC, test people",
    "judge_auc_validation": "trained judge's AUC, validation people",
    "c2st_auc": "classifier's AUC, real against this",
    "morphometry": "tissue areas, relative distance",
    "spectrum_db": "power spectrum, mean difference in dB",
    "ms_ssim_of_pairs": "MS-SSIM of 1,000 random pairs",
    "level_error": "slice level, mean error",
    "memorised_share": "memorised share (0.05 is chance)",
    "learned_memorised_share": "memorised share, encoder",
    "ssim_to_nearest_test_slice": "SSIM to nearest test slice",
}
# How to read each score. "learned_..." is read like the same score without that prefix.
READING = {
    "ssim": "1 is the original. Two unrelated brains reach 0.70, so small differences count.",
    "ssim_in_brain": "Without the black background, which is easy to draw.",
    "ms_ssim": "SSIM at five scales: layout weighs more than grain.",
    "psnr_db": "Higher is better; 6 dB more is half the error.",
    "psnr_in_brain_db": "PSNR without the black background.",
    "fd_train": "1 is another draw of real training slices. Compare with unseen people.",
    "fd_validation": "Lower is better; 1 is the least to expect. This score chooses the run.",
    "fd_test": "Against people who were not used in training or selection.",
    "fine_fd_train": "Grain, edges, blur. Samples cannot have what reconstructions lack.",
    "fine_fd_reconstruction": "The generator's own share of it: 1 means none.",
    "precision": "Share of samples that lie among real slices; compare with real.",
    "recall": "Share of real slices that lie among samples; low means little variety.",
    "coverage": "Share of real slices with a sample nearby; compare with real.",
    "kid_train": "0 is no difference. It may be slightly negative by chance.",
    "c2st_auc": "0.5: a classifier cannot tell them from real slices; 1: it always can.",
    "judge_auc_test": "0.5: networks trained for it cannot tell samples from unseen people.",
    "judge_auc_validation": "The same on the people who choose the run.",
    "morphometry": "Areas of CSF, grey and white matter; 1 is two halves of the real people.",
    "spectrum_db": "0 is equal detail at every scale. Blur and grain both raise it.",
    "ms_ssim_of_pairs": "Should equal that of real slices; higher means samples are alike.",
    "level_error": "Error of the slice level, on a scale from 0 (lowest) to 1 (highest).",
    "memorised_share": "0.05 is chance. Far more means copies of training slices.",
    "ssim_to_nearest_test_slice": "Should equal that of unseen real slices; higher: copies.",
}


def generation_rows(generation: dict) -> list[tuple[str, list[str]]]:
    """Name and four cells (generated, reconstruction, real, unseen people) of every score.

    A cell is "" if there is no such reference.
    """
    kinds, rows = (*KINDS, "unseen_people"), []
    for name in LABELS:
        if name in generation:
            values, digits = generation[name], 5 if "kid" in name else 3
            cells = [f"{values[k]:.{digits}f}" if k in values else "" for k in kinds]
            rows.append((name, cells))
    return rows


def table(result: dict) -> str:
    """The scores as text, each beside its references."""
    r, c, g = result["reconstruction"], result["codebook"], result["generation"]
    lines = [f"reconstruction, {r['n']} test slices, mean (sd):"]
    for name, label in IMAGE_LABELS.items():
        lines.append(f"  {label:<26} {r[name]['mean']:8.4f} ({r[name]['sd']:.4f})")
    lines += [
        f"codebook: {c['used']} of {c['codes']} used, perplexity {c['perplexity']:.1f}, "
        f"{c['bits_per_pixel']:.3f} bits per pixel",
        f"generation, {g['n']} slices of each kind:",
        f"  {'':<46}{'generated':>12}{'reconstr.':>12}{'real':>10}{'unseen people':>15}",
    ]
    for name, cells in generation_rows(g):
        lines.append(
            f"  {LABELS[name]:<46}{cells[0]:>12}{cells[1]:>12}{cells[2]:>10}{cells[3]:>15}"
        )
    s, copies = g["as_the_seed_counts_it"], g["memorised_share"]["planted_copies"]
    lines.append(f"  memorised share of planted training slices, a control: {copies:.3f}")
    lines.append(
        f"  one sample against every test slice, as the original project counts it: mean SSIM "
        f"{s['mean']:.3f}, {100 * s['share_above']:.0f} % above 0.6"
    )
    return "\n".join(lines)
