"""Every option of a run: default, unit, range and source. Also exit codes and presets.

In: nothing. Out: one frozen `Config`, saved beside every result and in every checkpoint.
Nothing heavy is imported, so that `--help` answers at once. `support/cli.py` makes the
command line from these fields.
"""

import enum
import functools
import math
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

VERSION = "1.0"  # in --version and in every config.json; CHANGELOG.md says what changed


class Exit(enum.IntEnum):
    """Exit codes of every script."""

    DONE = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    BUSY = 5
    DIVERGED = 6
    WRITE = 7
    MEMORY = 8
    INTERRUPTED = 130
    TERMINATED = 143


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, what to do."""

    def __init__(self, code: Exit, message: str):
        super().__init__(message)
        self.code = code


def option(
    default, help, low=None, high=None, *, choices=None, identity=True, heading="", flag=True
):
    """A field of `Config`, with what argparse and the range check need.

    low, high: the range of its number or numbers.
    identity: whether another value makes another run (paths and devices do not).
    heading: of the group in --help that begins with this field.
    flag: whether the field has a flag of its own; the others are set by --set NAME=VALUE.
    """
    metadata = {
        "help": help, "low": low, "high": high, "choices": choices, "identity": identity,
        "heading": heading, "flag": flag,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


outside = functools.partial(option, identity=False)  # does not change what a run computes
detail = functools.partial(option, flag=False)  # has no flag: --set NAME=VALUE

# Differences from the defaults below. `classic` is the recipe of the original project. Its
# DCGAN of widths 128 and 64 needs a GPU (about 4 GFLOP a map). All presets but `full` keep the
# original's VQ-VAE.
PRESETS = {
    "quick": {},
    "smoke": {
        "subjects": (10, 2, 2), "vqvae_kimg": 1.0, "decoder_kimg": 0.5, "gan_kimg": 2.0,
        "denoiser_kimg": 1.0, "samples": 64,
    },
    "long": {
        "vqvae_kimg": 27.0, "decoder_kimg": 16.0, "gan_kimg": 160.0, "denoiser_kimg": 80.0,
    },
    "full": {
        "widths": (64, 32, 16, 32), "batch_size": 64, "vqvae_kimg": 193.28,
        "decoder_widths": (64, 32), "residual_blocks": 4, "decoder_kimg": 50.0,
        "gan_widths": (128, 64), "gan_kimg": 483.2, "denoiser_kimg": 400.0,
    },
    "classic": {
        "recipe": "original", "optimizer": "adam", "schedule": "constant",
        "lr": 1e-3, "batch_size": 128, "vqvae_kimg": 192.0, "decoder_kimg": 0.0,
        "order": "raw", "map_channels": 3, "gan_widths": (128, 64), "gan_beta1": 0.5,
        "gan_lr": (2e-4, 2e-4), "gan_batch_size": 256, "gan_kimg": 483.2, "ema_kimg": 0.0,
        "denoiser_kimg": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All options: default (of preset `quick`), meaning, lowest and highest value."""

    preset: str = outside("quick", "set of defaults", choices=tuple(PRESETS), heading="run")
    data: str = outside("", "folder of slices or volumes [the embedded set]")
    out: str = outside("", "folder for results [runs/<preset>]")
    cache: str = outside("runs/cache", "folder for decoded slices, shared by all runs")
    device: str = outside("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = outside(
        0, "threads on the CPU [0: as many as other programs leave idle]", 0, 1024
    )
    seed: int = outside(0, "first random seed [0, or the next unused one]", 0, 2**31 - 1)
    runs: int = outside(1, "number of seeds to train; validation chooses the best", 1, 1000)

    strict: bool = option(
        False, "stop at the first unreadable file [skip up to 1 %%]", heading="data"
    )
    subjects: tuple[int, int, int] = option(
        (160, 24, 24), "subjects of the embedded set: training, validation, test", 2, 10**6
    )
    slices: int = option(32, "axial slices per volume", 1, 1024)
    axis: int = option(
        -1, "slice axis of volumes whose header has no orientation, 0 to 2 [-1: none]", -1, 2
    )
    subject_pattern: str = option(
        "", "regular expression; its first group in the path is the subject"
    )
    allow_slice_split: bool = option(
        False, "split by slice if subjects are unknown (inflates every score)"
    )
    split_seed: int = option(0, "seed of the split by subject", 0, 2**31 - 1)

    recipe: str = detail(
        "improved",
        "original: bilinear upsampling, codebook moved by the loss, squared error, BCE with "
        "BatchNorm, whole maps, no slice level",
        choices=("improved", "original"),
    )
    optimizer: str = detail(
        "muon", "of VQ-VAE, sharper decoder and DCGAN (Muon: Jordan et al. 2024)",
        choices=("muon", "adam"),
    )  # fmt: skip
    schedule: str = detail(
        "cosine", "learning rate over a stage", choices=("cosine", "constant")
    )
    warm_up: float = detail(0.05, "share of a stage's steps with a rising rate", 0, 1)
    log_rows: int = detail(40, "rows of log.csv per stage", 1, 10_000)

    codes: int = option(
        512, "K, codebook size", 2, 65535,
        heading="VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937)",
    )  # fmt: skip
    code_dim: int = detail(64, "D, numbers per code vector", 1, 4096)
    widths: tuple[int, int, int, int] = option(
        (16, 8, 8, 16), "channels of the encoder's and of the decoder's convolutions", 1, 4096
    )
    commitment: float = detail(0.25, "beta of eq. 3", 0, 100)
    codebook_decay: float = detail(
        0.9, "EMA decay per step of codebook counts and sums (appendix A.1)", 0, 0.99999
    )
    codebook_delay: float = detail(
        0.1, "share of steps without quantisation, before the codebook starts", 0, 0.9
    )
    revive_every: int = detail(25, "steps between revivals of dead codes", 1, 10**6)
    revive_below: float = detail(0.7, "mean uses per step that make a code dead", 0, 1e6)
    detail_weight: float = detail(2.0, "weight of the strength of detail in the loss", 0, 1e3)
    window_px: int = detail(128, "side of the window that SSIM and patches use", 32, 128)
    lr: float = option(2e-3, "learning rate", 1e-8, 1)
    batch_size: int = option(8, "slices per step, over all processes", 1, 65536)
    vqvae_kimg: float = option(16.0, "training length, thousands of slices seen", 0.001, 1e7)

    decoder_widths: tuple[int, int] = detail(
        (32, 16), "sharper decoder: least channels of its two convolutions", 1, 4096
    )
    residual_blocks: int = detail(2, "sharper decoder: residual blocks, on 64x64 cells", 0, 64)
    decoder_lr: float = detail(1e-3, "learning rate of the sharper decoder", 1e-8, 1)
    decoder_ema_kimg: float = detail(
        1.5, "half-life of its weight average, thousands of slices", 0, 1e5
    )
    decoder_tolerance: float = detail(
        1.25, "factor by which 1 - SSIM may exceed the lowest so far", 1, 10
    )
    adversarial_weight: float = detail(0.1, "weight of the patch discriminator", 0, 1e3)
    patch_lr: float = detail(2e-3, "learning rate of the patch discriminator", 1e-8, 1)
    patch_gamma: float = detail(1e-4, "its weight of R1 and R2", 0, 1e4)
    patch_noise: float = detail(0.005, "sd of the noise added to its inputs", 0, 1)
    decoder_kimg: float = option(
        8.0, "training length, thousands of slices seen; 0: none", 0, 1e7,
        heading="sharper decoder (Isola et al. 2017, arXiv:1611.07004)",
    )  # fmt: skip

    order: str = option(
        "coordinates",
        "of codes in maps: principal coordinates; even bins along component 1; by number",
        choices=("coordinates", "pc1", "raw"),
        heading="DCGAN (Radford et al. 2016, arXiv:1511.06434)",
    )
    map_channels: int = option(
        4, "C, principal coordinates, or copies of the binned map", 1, 64
    )
    gan_widths: tuple[int, int] = option(
        (32, 32), "channels next to the map: generator, discriminator", 1, 1024
    )
    noise_dim: int = detail(100, "Z, noise numbers per sample", 1, 4096)
    gamma: float = option(2.0, "weight of R1 and R2 (arXiv:2501.05441)", 0, 1e4)
    penalty_every: int = detail(8, "steps between R1 and R2 penalties", 1, 1024)
    gan_lr: tuple[float, float] = option(
        (1.6e-3, 3.2e-3), "learning rates: generator, discriminator (arXiv:1706.08500)", 1e-8, 1
    )
    gan_beta1: float = detail(0.0, "Adam's beta 1", 0, 0.9999)
    gan_momentum: float = detail(0.5, "Muon's momentum", 0, 0.9999)
    ema_kimg: float = detail(
        5.0, "half-life of the generator's weight average, thousands of maps", 0, 1e5
    )
    gan_tolerance: float = detail(
        1.2, "factor by which fd_validation may exceed the lowest so far", 1, 10
    )
    monitor_samples: int = detail(256, "samples behind fd_validation in log.csv", 8, 10**5)
    gan_batch_size: int = option(32, "maps per step", 1, 65536)
    gan_kimg: float = option(63.0, "training length, thousands of maps seen", 0.001, 1e7)

    denoiser_lr: float = detail(3e-3, "learning rate of the denoiser", 1e-8, 1)
    denoiser_ema_kimg: float = detail(
        2.0, "half-life of its weight average, thousands of maps", 0, 1e5
    )
    denoiser_kimg: float = option(
        20.0, "training length, thousands of maps seen; 0: none", 0, 1e7,
        heading="denoiser (Karras et al. 2022, arXiv:2206.00364)",
    )  # fmt: skip
    denoiser_batch_size: int = option(16, "maps per step", 1, 65536)

    samples: int = outside(
        512, "N, generated and real slices compared", 8, 10**6,
        heading="evaluation and arithmetic",
    )  # fmt: skip
    precision: str = option(
        "auto", "of training and denoising; auto: bfloat16 if the hardware supports it",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip

    def __post_init__(self):
        for f in fields(self):
            check_field(f, getattr(self, f.name))

    @property
    def original(self) -> bool:
        """Whether this is the original recipe, preset `classic`."""
        return self.recipe == "original"

    @property
    def trained(self) -> dict[str, float]:
        """The stages of training -> their length, in thousands of slices or maps; not 0."""
        lengths = {stage: getattr(self, length.kimg) for stage, length in TRAINED.items()}
        return {stage: kimg for stage, kimg in lengths.items() if kimg}

    def identity(self) -> dict:
        """The plain values that make this run what it is (without paths, device and seed)."""
        values = self.to_dict()
        return {f.name: values[f.name] for f in fields(self) if f.metadata["identity"]}

    def to_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of `to_dict`. Raises ValueError for unknown fields or bad values."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}: saved by another version")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Length(NamedTuple):
    """How long a stage trains: the unit, and the fields of `Config` with the numbers."""

    seen: str
    kimg: str
    batch_size: str


TRAINED = {
    "vqvae": Length("slices", "vqvae_kimg", "batch_size"),
    "decoder": Length("slices", "decoder_kimg", "batch_size"),
    "dcgan": Length("maps", "gan_kimg", "gan_batch_size"),
    "denoiser": Length("maps", "denoiser_kimg", "denoiser_batch_size"),
}


def check_field(f, value):
    """Raise ValueError with field, value and allowed range unless `value` fits field `f`."""
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    many = isinstance(f.default, tuple)
    example = f.default[0] if many else f.default
    parts = value if many else (value,)
    if not isinstance(parts, tuple) or (many and len(parts) != len(f.default)):
        raise ValueError(f"{f.name} = {value!r}: expected {len(f.default)} numbers")
    kinds = (int, float) if isinstance(example, float) else (type(example),)
    for part in parts:
        if not isinstance(part, kinds) or isinstance(part, bool) != isinstance(example, bool):
            raise ValueError(f"{f.name} = {value!r}: expected {type(example).__name__}")
        if choices and part not in choices:
            raise ValueError(f"{f.name} = {value!r}: choose one of {', '.join(choices)}")
        if low is not None and not (math.isfinite(part) and low <= part <= high):
            raise ValueError(f"{f.name} = {value!r}: allowed are {low} to {high}")
