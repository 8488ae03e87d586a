"""Every score of a set of slices with its references: one dict for JSON, one table.

In: a loaded run (`predict.TrainedRun`) and its data, or two folders of slices. Out: plain
values. The measures are in `metrics` and `judge`; this file says what is compared with what.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from config import Config, Exit, UserError
from dataset import BrainSlices, Crop, Data
from scores import judge, metrics
from support import device

PART = 128  # slices in memory at a time
JUDGED = 2048  # training slices that the judge learns
NEAREST = 128  # samples whose nearest test slices are searched
LEAST = 12  # slices in a set: a judge learns half, and recall needs 5 neighbours


def parts_of(measure, split: BrainSlices, indices=None) -> Iterator[Tensor]:
    """`measure` of the slices of a split (or of `indices`), PART slices at a time."""
    indices = np.arange(len(split)) if indices is None else indices
    for start in range(0, len(indices), PART):
        yield measure(split.batch(indices[start : start + PART]))


def layout(images: Tensor) -> Tensor:
    """Means (n, 256) over 16x16 pixels. A near-copy stays near its original.

    A slice that was turned by 2 degrees, moved by a pixel and coded as JPEG is nearer to its
    original than slices of other people are. With features of random convolutions, it mostly
    is not.
    """
    return metrics.thumbnails(images, 16).flatten(1)


def in_parts(measure, split: BrainSlices, indices=None) -> Tensor:
    """`measure` as one tensor: slices need not fit into memory, features must.

    Results go into one array at once. Small ones that stay would lie between the large blocks
    that are freed, and the heap would grow by gigabytes.
    """
    n, start, found = len(split) if indices is None else len(indices), 0, None
    for part in parts_of(measure, split, indices):
        if found is None:
            found = part.new_empty(n, *part.shape[1:])
        found[start : start + len(part)] = part
        start += len(part)
    return found


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

    def measure(images: Tensor) -> Tensor:
        outputs = run.reconstruct(images)[1]
        return torch.stack([f(images, outputs) for f in IMAGE_MEASURES.values()], 1)

    values = dict(zip(IMAGE_MEASURES, in_parts(measure, test).T, strict=True))  # (n,) each
    result = {
        name: {"mean": value.mean().item(), "sd": value.std(correction=0).item()}
        for name, value in values.items()
    }
    result |= {"n": len(test), "share_above_0.6": (values["ssim"] > 0.6).float().mean().item()}
    total = metrics.perplexity(run.counts)
    codebook = {
        "codes": run.config.codes,
        "used": int((run.counts > 0).sum()),
        "perplexity": total,
        "perplexity_share": total / run.config.codes,
        "bits_per_pixel": math.log2(run.config.codes) / 16,  # a cell is 4x4 pixels
        "bits_per_pixel_entropy": math.log2(total) / 16,
    }
    return result, codebook


# --- generation ---------------------------------------------------------------------------


KINDS = ("generated", "reconstruction", "real")  # what is scored, and its references
UNSEEN = ("validation", "test")  # people that no network has learned


@dataclass
class Described:
    """Features of one set of n slices."""

    levels: np.ndarray  # (n,) slice levels, NaN if unknown
    spaces: dict[str, np.ndarray]  # (n, F) features by space
    areas: np.ndarray  # (n, 3) pixels of CSF, grey and white matter
    judged: Tensor  # (n, 1, h, w) uint8, prepared for the judge
    spectrum: Tensor  # (R,) dB
    near: np.ndarray  # (n,) distances of `layout` to the nearest reference slice
    level_seen: np.ndarray  # (n,) slice level of that reference slice
    pairs: float  # mean MS-SSIM of random pairs; NaN unless the set is one of KINDS


class Scorer:
    """Sets of n slices, described by features, and the scores that compare them.

    source: the reference slices, such as the training split. "train" and "real" are disjoint
    random draws of them. `add` brings the other sets: "generated", "reconstruction" (of
    "real"), and "validation" and "test" (unseen people).
    Spaces of features: "texture", of random convolutions; "fine", the same of the slice minus
    its 5x5 mean; "layout", means over 16x16 pixels.
    A score is a dict, kind -> number: "generated" is the result, the others are references.
    """

    def __init__(self, source: BrainSlices, n: int, crop: Crop):
        self.source, self.n, self.crop = source, n, crop
        network = metrics.RandomFeatures()
        self.spaces = {
            "texture": network.features, "fine": network.fine_features, "layout": layout,
        }  # fmt: skip
        order = np.random.default_rng(0).permutation(len(source))
        self.rows = {"train": order[:n], "real": order[n : 2 * n]}
        # The units of relative FD: mean distance of random draws of n reference slices.
        self.units = {
            space: metrics.relative_floor(in_parts(f, source, order[: 4 * n]), n)
            for space, f in self.spaces.items()
        }
        # Copies of any reference slice count, not only of those in "train".
        self.bank = in_parts(layout, source).numpy()
        self.thresholds = metrics.tissue_thresholds(source.batch(self.rows["train"]))
        self.sets: dict[str, Described] = {}
        for name, rows in self.rows.items():
            self.add(name, source.batch(rows), source.levels[rows])

    def add(self, name: str, images: Tensor, levels: np.ndarray):
        """Describe a set of slices (n, 1, 256, 256). levels (n,): NaN if unknown."""
        spaces = {space: f(images).numpy() for space, f in self.spaces.items()}
        near, rows = metrics.nearest_features(spaces["layout"], self.bank)
        self.sets[name] = Described(
            levels=np.asarray(levels),
            spaces=spaces,
            near=near,
            level_seen=self.source.levels[rows],
            areas=metrics.tissue_areas(images, self.thresholds),
            judged=judge.prepared(images, self.crop),
            spectrum=metrics.radial_spectrum(images),
            pairs=metrics.ms_ssim_of_pairs(images) if name in KINDS else math.nan,
        )

    def each(self, measure: Callable[[Described], Any], unseen: str = "") -> dict[str, Any]:
        """`measure` of every kind that was added; unseen: also of this set of other people."""
        kinds = dict(zip(KINDS, KINDS, strict=True)) | {"unseen_people": unseen}
        return {k: measure(self.sets[s]) for k, s in kinds.items() if s in self.sets}

    def fd(self, space: str, against: str) -> dict[str, float]:
        """Relative FD in a space of features; empty if the set `against` was not added."""
        if against not in self.sets:
            return {}
        target, unit = self.sets[against].spaces[space], self.units[space]
        return self.each(
            lambda s: metrics.frechet_distance(s.spaces[space], target) / unit,
            unseen="test" if against == "train" else "",
        )

    def compared(self, space: str, prefix: str) -> dict[str, dict[str, float]]:
        """FD to each set of real people; precision, recall, coverage. Names get the prefix."""
        scores = {f"fd_{against}": self.fd(space, against) for against in ("train", *UNSEEN)}
        target = self.sets["train"].spaces[space]
        found = self.each(lambda s: metrics.prdc(target, s.spaces[space]))
        for name in ("precision", "recall", "coverage"):
            scores[name] = {kind: values[name] for kind, values in found.items()}
        return {prefix + name: values for name, values in scores.items()}

    def classifier(self) -> dict[str, float]:
        """Held-out AUC of reference slices against others, folds by subject.

        Empty if all reference slices are of one subject, or no fold has both sides.
        """
        train, real = (self.source.subjects[self.rows[name]] for name in ("train", "real"))
        if min(len(np.unique(train)), len(np.unique(real))) < 2:
            return {}
        features = {name: found.spaces["texture"] for name, found in self.sets.items()}
        groups = {"generated": None, "reconstruction": real, "real": real}
        scores = {
            kind: metrics.c2st_auc(features["train"], features[kind], train, of_kind)
            for kind, of_kind in groups.items()
            if kind in features
        }
        return {kind: score for kind, score in scores.items() if not math.isnan(score)}

    def memorised(self) -> dict[str, float]:
        """Share nearer to a reference slice than 99 % of unseen people's slices are.

        Controls: "planted_copies" are reference slices (distance 0); "reconstruction"s of
        them are the best copies that the decoder can draw.
        """
        limit = self.sets["test"].near
        found = self.each(lambda s: metrics.memorised_share(s.near, limit), "validation")
        found["planted_copies"] = found.pop("real")  # "real" are reference slices
        return found

    def judge_auc(self) -> dict[str, dict[str, float]]:
        """AUC of trained judges on unseen people, by the set of these people.

        Each judge learns reference slices that are not in "real".
        """
        rows = np.setdiff1d(np.arange(len(self.source)), self.rows["real"])
        rows = np.random.default_rng(2).permutation(rows)[:JUDGED]
        real = in_parts(lambda x: judge.prepared(x, self.crop), self.source, rows)
        unseen = {
            f"judge_auc_{name}": self.sets[name].judged for name in UNSEEN if name in self.sets
        }
        aucs = {name: {} for name in unseen}
        for kind in KINDS:
            if kind in self.sets:
                judges = judge.JUDGES if kind == "generated" else 2
                found = judge.judged(real, self.sets[kind].judged, unseen, judges)
                for name, (auc, error) in found.items():
                    aucs[name][kind] = auc
                    if kind == "generated":
                        aucs[name]["standard_error"] = error
        return aucs

    def morphometry(self) -> dict[str, float]:
        """Distance of tissue areas from reference slices, divided by that of halves of people.

        At equal slice levels, if all are known. Empty if all reference slices are of one
        subject.
        """
        subjects = self.source.subjects
        if len(people := np.unique(subjects)) < 2:
            return {}
        levels = self.source.levels
        all_levels = np.concatenate([levels, *(s.levels for s in self.sets.values())])
        known = np.isfinite(all_levels).all()
        # One bin: slices of all levels are compared together.
        distance = metrics.area_distance if known else partial(metrics.area_distance, bins=1)
        areas = in_parts(
            lambda x: torch.from_numpy(metrics.tissue_areas(x, self.thresholds)), self.source
        ).numpy()
        draw, halves = np.random.default_rng(3), []
        for _ in range(10):
            order = draw.permutation(people)
            first = np.isin(subjects, order[: len(order) // 2])
            a, b = (draw.permutation(np.flatnonzero(s))[: self.n] for s in (first, ~first))
            halves.append(distance(areas[a], areas[b], levels[a], levels[b]))
        train, unit = self.sets["train"], float(np.mean(halves))
        return self.each(
            lambda s: distance(s.areas, train.areas, s.levels, train.levels) / unit, "test"
        )

    def spectrum(self) -> dict[str, float]:
        """Mean difference of power spectra from reference slices, up to their noise floor."""
        train = self.sets["train"].spectrum
        end = metrics.noise_floor(train)
        return self.each(lambda s: metrics.spectrum_difference(train, s.spectrum, end))

    def level_error(self) -> dict[str, float]:
        """Mean difference between a slice's level and that of its nearest reference slice.

        Slices without a known level are left out. Reconstructions and "real" are no references:
        each is nearest to its original.
        """

        def error(found: Described) -> float:
            errors = np.abs(found.level_seen - found.levels)
            known = np.isfinite(errors)
            return float(errors[known].mean()) if known.any() else math.nan

        found = self.each(error, "test")
        if math.isnan(found.get("generated", math.nan)):
            return {}
        return {k: v for k, v in found.items() if k in ("generated", "unseen_people")}

    def all(self) -> dict:
        """Every score that these sets allow."""
        result = {"n": self.n} | self.compared("texture", prefix="")
        result["fine_fd_train"] = self.fd("fine", "train")
        result |= self.compared("layout", prefix="layout_")
        if "reconstruction" in self.sets:
            own = self.fd("fine", "reconstruction")["generated"]
            result["fine_fd_reconstruction"] = {"generated": own}
        train = self.sets["train"].spaces["texture"]
        standard = StandardScaler().fit(train).transform
        result["kid_train"] = self.each(
            lambda s: metrics.kid(standard(s.spaces["texture"]), standard(train))
        )
        result["c2st_auc"] = self.classifier()
        if "test" in self.sets:
            result |= self.judge_auc() | {"memorised_share": self.memorised()}
        result["morphometry"] = self.morphometry()
        result["spectrum_db"] = self.spectrum()
        result["ms_ssim_of_pairs"] = self.each(lambda s: s.pairs)
        result["level_error"] = self.level_error()
        return {name: values for name, values in result.items() if values != {}}


# --- a run --------------------------------------------------------------------------------


def slices_compared(config: Config, data: Data) -> int:
    """n, slices of each kind: --samples, or as many as the smallest set has."""
    return min(config.samples, len(data.test), len(data.validation), len(data.train) // 2)


def check_data(run, data: Data):
    """Raise UserError (exit 4) if the run was trained on other data."""
    if data.fingerprint != run.fingerprint:
        raise UserError(
            Exit.CHECKPOINT, f"{run.folder} was trained on other data; give its --data"
        )


def references(run, data: Data) -> Scorer:
    """The sets that samples of a run are compared with; `add` brings the samples.

    Raises UserError (exit 4) if the run was trained on other data.
    """
    check_data(run, data)
    n = slices_compared(run.config, data)
    scorer = Scorer(data.train, n, run.code_map.crop)
    real = scorer.rows["real"]
    outputs = run.reconstruct(data.train.batch(real))[1]
    scorer.add("reconstruction", outputs, data.train.levels[real])
    draw = np.random.default_rng(1)
    for name in UNSEEN:
        split = getattr(data, name)
        scorer.rows[name] = rows = draw.permutation(len(split))[:n]
        scorer.add(name, split.batch(rows), split.levels[rows])
    return scorer


def evaluate(run, data: Data) -> dict:
    """Every score of a run as plain values (docs/quality.md)."""
    scorer = references(run, data)
    reconstruction, codebook = score_reconstruction(run, data.test)
    images = run.sample(scorer.n)[1]
    levels = run.noise(scorer.n)[1].numpy()
    if not run.conditional:
        levels = np.full(scorer.n, math.nan)
    scorer.add("generated", images, levels)
    shown = {
        "generated": images[:NEAREST].clone(),
        "real": data.validation.batch(scorer.rows["validation"][:NEAREST]),
    }
    del images
    device.release_memory()
    generation = scorer.all()
    generation["ssim_to_nearest_test_slice"] = {
        kind: metrics.ssim_to_nearest(
            some, parts_of(metrics.thumbnails, data.test), data.test.batch
        )
        for kind, some in shown.items()
    }
    one = shown["generated"][:1]  # the original project compares one sample
    ssims = in_parts(lambda x: metrics.ssim(one.expand_as(x), x), data.test)
    mean, above = ssims.mean().item(), (ssims > 0.6).float().mean().item()
    generation["as_the_original_counts_it"] = {"mean": mean, "share_above": above}
    return {
        "seed": run.seed,
        "stamp": run.stamp,
        "reconstruction": reconstruction,
        "codebook": codebook,
        "generation": generation,
        "peak_memory_mb": round(device.peak_memory_mb()),
    }


# --- two folders --------------------------------------------------------------------------


def score_folders(
    real: BrainSlices, fake: BrainSlices, unseen: BrainSlices | None, config: Config
) -> dict:
    """Every score of the slices `fake` beside `real` ones, by `Scorer.all`.

    n is `samples`, or the number of fakes, of unseen slices, or half of the real ones if that
    is less. unseen: slices of other people; without them, scores that need them are left out.
    Raises UserError (exit 3) if there are too few slices.
    """
    sets = {"generated": fake} | ({"test": unseen} if unseen else {})
    n = min(config.samples, len(real) // 2, *map(len, sets.values()))
    if n < LEAST:
        raise UserError(
            Exit.DATA,
            f"too few slices: {len(real)} real, {len(fake)} generated"
            + (f", {len(unseen)} of unseen people" if unseen else "")
            + f"; needed are {2 * LEAST}, {LEAST} and {LEAST}, and --samples {LEAST}",
        )
    heads = np.maximum(real.brightest(), fake.brightest())
    scorer = Scorer(real, n, Crop.around_heads(heads))
    draw = np.random.default_rng(1)
    for name, split in sets.items():
        rows = draw.permutation(len(split))[:n]
        scorer.add(name, split.batch(rows), split.levels[rows])
    return scorer.all()


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
    "layout_fd_train": "relative FD to training slices, layout",
    "layout_fd_validation": "relative FD to validation slices, layout",
    "layout_fd_test": "relative FD to test slices, layout",
    "fine_fd_train": "fine-scale relative FD to training slices",
    "fine_fd_reconstruction": "fine-scale relative FD to reconstructions",
    "precision": "precision, k = 5",
    "recall": "recall, k = 5",
    "coverage": "coverage, k = 5",
    "layout_precision": "precision, k = 5, layout",
    "layout_recall": "recall, k = 5, layout",
    "layout_coverage": "coverage, k = 5, layout",
    "kid_train": "KID to training slices",
    "judge_auc_test": "trained judge's AUC, test people",
    "judge_auc_validation": "trained judge's AUC, validation people",
    "c2st_auc": "classifier's AUC, real against this",
    "morphometry": "tissue areas, relative distance",
    "spectrum_db": "power spectrum, mean difference in dB",
    "ms_ssim_of_pairs": "MS-SSIM of 1,000 random pairs",
    "level_error": "slice level, mean error",
    "memorised_share": "memorised share (0.01 is chance)",
    "ssim_to_nearest_test_slice": "SSIM to nearest test slice",
}
# How to read each score. "layout_..." is read like the same score without that prefix.
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
    "fine_fd_reconstruction": "Fine-scale error added by the generator: 1 means none.",
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
    "memorised_share": "0.01 is chance, more with few unseen slices. Far more means copies.",
    "ssim_to_nearest_test_slice": "Should equal that of real slices. Smooth slices are higher.",
}


def generation_rows(generation: dict) -> Iterator[tuple[str, list[str]]]:
    """Name and four cells (generated, reconstruction, real, unseen people) of every score.

    A cell is "" if there is no such reference.
    """
    kinds = (*KINDS, "unseen_people")
    for name in LABELS:
        if name in generation:
            values = generation[name]
            yield name, [f"{values[k]:.3f}" if k in values else "" for k in kinds]


def generation_table(generation: dict) -> str:
    """The scores of generated slices as text."""
    rows = [("", ["generated", "reconstr.", "real", "unseen people"])]
    rows += [(LABELS[name], cells) for name, cells in generation_rows(generation)]
    lines = [f"  {label:<46}{a:>12}{b:>12}{c:>10}{d:>15}" for label, (a, b, c, d) in rows]
    return "\n".join([f"generation, {generation['n']} slices of each kind:", *lines])


def table(result: dict) -> str:
    """The scores of a run as text, each beside its references."""
    r, c, g = result["reconstruction"], result["codebook"], result["generation"]
    lines = [f"reconstruction, {r['n']} test slices, mean (sd):"]
    for name, label in IMAGE_LABELS.items():
        lines.append(f"  {label:<26} {r[name]['mean']:8.4f} ({r[name]['sd']:.4f})")
    s, copies = g["as_the_original_counts_it"], g["memorised_share"]["planted_copies"]
    lines += [
        f"codebook: {c['used']} of {c['codes']} used, perplexity {c['perplexity']:.1f}, "
        f"{c['bits_per_pixel']:.3f} bits per pixel",
        generation_table(g),
        f"  memorised share of planted training slices, a control: {copies:.3f}",
        "  one sample against every test slice, as the original project counts it: mean SSIM "
        f"{s['mean']:.3f}, {100 * s['share_above']:.0f} % above 0.6",
    ]
    return "\n".join(lines)
