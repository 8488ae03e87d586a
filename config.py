"""What a run is: its options, presets, and the ways in which it can end.

In: command-line arguments. Out: one frozen `Config`, saved beside every result and inside every
checkpoint. Each default has its only home here, and every command line is derived from it.
Nothing heavy is imported, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import enum
import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace


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
    """Something that the reader can mend; its message says what, where and what to do."""

    def __init__(self, code: Exit, message: str):
        super().__init__(message)
        self.code = code


def option(default, help, *, low=None, high=None, choices=None, identity=True):
    """A field of `Config` with what argparse and the range check need to know about it.

    identity: whether a different value makes a different run (a path or a device does not).
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "high": high,
            "choices": choices,
            "identity": identity,
        },
    )


@dataclass(frozen=True)
class Config:
    """Every option, with its default (preset `quick`), unit, range and source."""

    preset: str = option("quick", "the set of defaults", choices=(), identity=False)

    # Where
    data: str = option("", "folder of slices or volumes [the embedded set]", identity=False)
    out: str = option("", "folder of results [runs/<time>-<preset>]", identity=False)
    cache: str = option(
        "runs/cache", "folder of decoded slices, shared by all runs", identity=False
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", identity=False)
    seed: int = option(
        0,
        "random seed of the first run [0, or the next unused one]",
        low=0,
        high=2**31 - 1,
        identity=False,
    )
    runs: int = option(
        1,
        "how many seeds to train; validation chooses the best",
        low=1,
        high=1000,
        identity=False,
    )

    # Data
    strict: bool = option(
        False, "one unreadable file ends the run (else up to 1 %% may be skipped)"
    )
    subjects: tuple[int, int, int] = option(
        (160, 24, 24),
        "subjects of the embedded set: training, validation, test",
        low=2,
        high=10**6,
    )
    slices: int = option(32, "axial slices taken from each volume", low=1, high=1024)
    axis: int = option(
        -1,
        "axis of the slices, 0 to 2, where the header does not tell [-1: as it says]",
        low=-1,
        high=2,
    )
    subject_pattern: str = option(
        "", "regular expression whose first group in the path is the subject"
    )
    allow_slice_split: bool = option(
        False, "split by slice when no subject is known (inflates every score)"
    )
    split_seed: int = option(
        0, "seed of the split by subject, the same for all runs", low=0, high=2**31 - 1
    )

    # VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937)
    codes: int = option(512, "K, codebook size", low=2, high=65535)
    code_dim: int = option(64, "D, numbers per code vector", low=1, high=4096)
    widths: tuple[int, int, int, int] = option(
        (16, 8, 8, 16),
        "channels of the encoder's two convolutions, and of the decoder's",
        low=1,
        high=4096,
    )
    upsampling: str = option("nearest", "of the decoder", choices=("nearest", "bilinear"))
    codebook: str = option(
        "ema",
        "how codes learn: moving averages (appendix A.1) or the loss (eq. 3)",
        choices=("ema", "loss"),
    )
    commitment: float = option(0.25, "beta of eq. 3", low=0, high=100)
    codebook_decay: float = option(
        0.9, "EMA decay per step of codebook sums", low=0, high=0.99999
    )
    reconstruction: str = option(
        "ssim",
        "loss: L1 + 1 - SSIM + strength of detail, or squared error over data variance",
        choices=("ssim", "mse"),
    )
    optimizer: str = option(
        "muon",
        "of VQ-VAE, its sharper decoder and DCGAN: Adam, or that with orthogonal steps of "
        "kernels (Jordan 2024)",
        choices=("muon", "adam"),
    )
    lr: float = option(2e-3, "learning rate, VQ-VAE", low=1e-8, high=1)
    schedule: str = option(
        "cosine", "learning rate of each stage over time", choices=("cosine", "constant")
    )
    batch_size: int = option(8, "slices per step", low=1, high=65536)
    vqvae_kimg: float = option(
        14.0, "training length in thousands of slices seen", low=0.001, high=1e7
    )

    # Sharper decoder (Isola et al. 2017, arXiv:1611.07004)
    decoder_widths: tuple[int, int] = option(
        (32, 16), "channels of its two convolutions, at least", low=1, high=4096
    )
    residual_blocks: int = option(
        2, "residual blocks of it, on the 64x64 cells", low=0, high=64
    )
    decoder_kimg: float = option(
        4.0,
        "training length beside a discriminator of patches, in thousands of slices; 0: none",
        low=0,
        high=1e7,
    )

    # DCGAN (Radford et al. 2016, arXiv:1511.06434)
    order: str = option(
        "coordinates",
        "codes in GAN space: principal coordinates; even bins by component 1; by number",
        choices=("coordinates", "pc1", "raw"),
    )
    gan_loss: str = option(
        "relativistic",
        "relativistic pairing with R1 and R2 (arXiv:2501.05441), or the original BCE",
        choices=("relativistic", "bce"),
    )
    gan_widths: tuple[int, int] = option(
        (32, 32), "channels next to the map: generator, discriminator", low=1, high=1024
    )
    map_channels: int = option(
        4, "C, principal coordinates, or copies of the binned map", low=1, high=64
    )
    noise_dim: int = option(100, "Z, numbers of noise per sample", low=1, high=4096)
    gamma: float = option(2.0, "weight of R1 and of R2", low=0, high=1e4)
    penalty_every: int = option(8, "steps between R1 and R2 penalties", low=1, high=1024)
    gan_lr: tuple[float, float] = option(
        (1.6e-3, 3.2e-3),
        "learning rates: generator, discriminator (two as in arXiv:1706.08500)",
        low=1e-8,
        high=1,
    )
    gan_beta1: float = option(0.0, "Adam's beta 1, DCGAN", low=0, high=0.9999)
    ema_kimg: float = option(
        5.0, "half-life of the generator's weight average, thousands of maps", low=0, high=1e5
    )
    gan_batch_size: int = option(
        32, "maps per step, and crops of the denoiser's", low=1, high=65536
    )
    gan_kimg: float = option(
        63.0, "training length in thousands of maps seen", low=0.001, high=1e7
    )

    stop_collapsed: bool = option(
        False,
        "end a run whose samples have become nearly alike; it counts as diverged",
        identity=False,
    )

    # Denoiser (Karras et al. 2022, arXiv:2206.00364)
    denoiser_kimg: float = option(
        60.0,
        "training length in thousands of crops of 32x32 cells seen; 0: none",
        low=0,
        high=1e7,
    )

    # Evaluation
    samples: int = option(
        512, "N, generated and real slices compared", low=8, high=10**6, identity=False
    )
    precision: str = option(
        "auto",
        "of training and denoising; auto: bfloat16 where the hardware has it",
        choices=("auto", "float32", "bfloat16"),
    )

    def __post_init__(self):
        for f in fields(self):
            check_field(f, getattr(self, f.name))

    def identity(self) -> dict:
        """The plain values that make this run what it is (paths, device and seed do not)."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in fields(self)
            if f.metadata["identity"]
        }

    def to_dict(self) -> dict:
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of `to_dict`. Raises ValueError for unknown fields or bad values."""
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}: written by another version?")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# What the lengths of training count.
SEEN = {"vqvae": "slices", "decoder": "slices", "dcgan": "maps", "denoiser": "crops"}

# Differences from the defaults above. `classic` is the recipe of the original project; its
# DCGAN of widths 128 and 64 needs a GPU (about 4 GFLOP a map). All but `full` keep its VQ-VAE,
# whose channels limit reconstructions; they draw with a larger decoder, widened from it.
PRESETS = {
    "quick": {},
    "smoke": {
        "subjects": (10, 2, 2), "vqvae_kimg": 1.0, "decoder_kimg": 0.5, "gan_kimg": 2.0,
        "denoiser_kimg": 1.0, "samples": 64,
    },
    "long": {
        "vqvae_kimg": 27.0, "decoder_kimg": 8.0, "gan_kimg": 210.0, "denoiser_kimg": 190.0,
    },
    "full": {
        "widths": (64, 32, 16, 32), "batch_size": 64, "vqvae_kimg": 193.28,
        "decoder_widths": (64, 32), "residual_blocks": 4, "decoder_kimg": 50.0,
        "gan_widths": (128, 64), "gan_kimg": 483.2, "denoiser_kimg": 400.0,
    },
    "classic": {
        "upsampling": "bilinear", "codebook": "loss", "reconstruction": "mse",
        "optimizer": "adam", "lr": 1e-3, "schedule": "constant", "batch_size": 128,
        "vqvae_kimg": 192.0, "decoder_kimg": 0.0, "order": "raw",
        "gan_loss": "bce", "gan_widths": (128, 64), "map_channels": 3, "gan_beta1": 0.5,
        "gan_lr": (2e-4, 2e-4), "gan_batch_size": 256, "gan_kimg": 483.2, "ema_kimg": 0.0,
        "denoiser_kimg": 0.0,
    },
}  # fmt: skip


def check_field(f, value):
    """Raise ValueError that says field, value and allowed range unless `value` fits `f`."""
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if f.name == "preset":
        choices = tuple(PRESETS)
    example = f.default[0] if isinstance(f.default, tuple) else f.default
    parts = value if isinstance(f.default, tuple) else (value,)
    if not isinstance(parts, tuple) or (
        isinstance(f.default, tuple) and len(parts) != len(f.default)
    ):
        raise ValueError(f"{f.name} = {value!r}: expected {len(f.default)} numbers")
    for part in parts:
        kinds = (int, float) if isinstance(example, float) else (type(example),)
        if not isinstance(part, kinds) or isinstance(part, bool) != isinstance(example, bool):
            raise ValueError(f"{f.name} = {value!r}: expected {type(example).__name__}")
        if choices and part not in choices:
            raise ValueError(f"{f.name} = {value!r}: choose one of {', '.join(choices)}")
        if low is not None and not (math.isfinite(part) and low <= part <= high):
            raise ValueError(f"{f.name} = {value!r}: allowed are {low} to {high}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose abbreviations are off."""

    def __init__(self, description: str, **keywords):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=30, width=96
            ),
            **keywords,
        )

    def error(self, message):
        print(f"error: {message}; see --help", file=sys.stderr)
        raise SystemExit(int(Exit.USAGE))


# Headings of --help: the first field under each.
SECTIONS = {
    "preset": "where",
    "strict": "data",
    "codes": "VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937)",
    "decoder_widths": "sharper decoder (Isola et al. 2017, arXiv:1611.07004)",
    "order": "DCGAN (Radford et al. 2016, arXiv:1511.06434)",
    "denoiser_kimg": "denoiser (Karras et al. 2022, arXiv:2206.00364)",
    "samples": "evaluation and arithmetic",
}


def add_options(parser: argparse.ArgumentParser, names=None, **shown):
    """Add one flag per field of `Config`, or for `names`; absent flags stay absent.

    shown: what --help calls a field's default, where that is not the default itself.
    """
    group = parser
    for f in fields(Config):
        if names is None and f.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[f.name])
        if names is None or f.name in names:
            _add_option(group, f, shown.get(f.name, _show(f.default)))


def _add_option(group, f, default: str):
    note = f" [{default}]" if default and "[" not in f.metadata["help"] else ""
    keywords = {"help": f.metadata["help"] + note, "default": argparse.SUPPRESS}
    if isinstance(f.default, bool):
        group.add_argument(_flag(f), action="store_true", **keywords)
        return
    many = isinstance(f.default, tuple)
    kind = type(f.default[0] if many else f.default)
    choices = tuple(PRESETS) if f.name == "preset" else f.metadata["choices"]
    metavar = (
        "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
    )
    if many:
        keywords["nargs"] = len(f.default)
    group.add_argument(_flag(f), type=_reader(f, kind), metavar=metavar, **keywords)


def flags(config: Config) -> list[str]:
    """The words of a command line that makes `config`: its preset, and what differs from it."""
    words = [] if config.preset == Config.preset else ["--preset", config.preset]
    preset = replace(Config(preset=config.preset), **PRESETS[config.preset])
    for f in fields(Config):
        value = getattr(config, f.name)
        if value != getattr(preset, f.name):
            values = value if isinstance(value, tuple) else (value,)
            words += [_flag(f)] if value is True else [_flag(f), *map(str, values)]
    return words


def _flag(f) -> str:
    return "--" + f.name.replace("_", "-")


def _show(value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is False else f"{value:g}" if isinstance(value, float) else str(value)


def _reader(f, kind):
    """A function from an argument's text to its value, with the field's range in its error."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__}") from None
        try:
            check_field(
                f, tuple([value] * len(f.default)) if isinstance(f.default, tuple) else value
            )
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None
        return value

    return read


def config_from(arguments: argparse.Namespace) -> Config:
    """Defaults, then the preset, then the flags that were given."""
    known = {f.name for f in fields(Config)}
    given = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in vars(arguments).items()
        if k in known
    }
    return replace(Config(), **PRESETS[given.get("preset", "quick")] | given)
