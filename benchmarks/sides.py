"""The sides of every comparison in speed.py: this project's code, plain.py, other libraries.

Each function here takes `Inputs` and returns a function and the number of items that one call
of it processes. If that function returns a float, it has measured its seconds itself. A library
is imported only by its own side, since it may not be installed.
"""

import collections
import contextlib
import functools
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import cv2
import numpy as np
import plain
import torch
import torch.nn.functional as F
from scipy.integrate import simpson

import modules
import train
from config import Config
from dataset import evenly, open_data, unit_range
from modules import generator_of
from scores import metrics
from stages.decoder import widen_decoder
from stages.denoiser import make_denoiser
from stages.losses import random_corner, structural_loss
from stages.stage import CROP, seeded
from support import device

CPU = torch.device("cpu")
PNGS, CASE = 9664, 16  # slices of the original's data set; slices per subject
TOKENS = 4096  # cells of an index map


class Inputs:
    """What the sides read: slices of the embedded set, and a folder for temporary files."""

    def __init__(self, cache: str, work: str):
        self.config, self.work = Config(cache=cache, optimizer="adam"), Path(work)

    @functools.cached_property
    def data(self):
        return quietly(open_data, self.config)

    def slices(self, n: int) -> torch.Tensor:
        """n training slices (n, 1, 256, 256), evenly spaced."""
        return self.data.train.batch(evenly(len(self.data.train), n))

    def pngs(self) -> Path:
        """A folder of 9,664 PNG slices with the names of the original's data set."""
        root = self.work / "keras_png_slices_data"
        folder = root / "keras_png_slices_train"
        if not folder.exists():
            folder.mkdir(parents=True)
            for i in range(PNGS):
                pixels = self.data.images[i % len(self.data.images)]
                name = f"case_{i // CASE:03d}_slice_{i % CASE}.nii.png"
                (folder / name).write_bytes(cv2.imencode(".png", pixels)[1])
        return root


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def seconds_of(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


# --- VQ-VAE -------------------------------------------------------------------------------


def a_run(here: Inputs, config: Config) -> SimpleNamespace:
    """The parts of `stages.stage.Run` that a training step reads."""
    return SimpleNamespace(config=config, seed=0, device=CPU, data=here.data)


def some_vqvae(here: Inputs, config: Config) -> modules.VQVAE:
    """A VQ-VAE at the start of its training, with codes from real slices."""
    model = seeded(0, 0, lambda: modules.make_vqvae(config))
    train.start_codebook(model, here.data.train, a_run(here, config))
    return model


def a_corner(images: torch.Tensor) -> torch.Tensor:
    """The corner (2,) of the loss's window."""
    return random_corner(*images.shape[2:], Config.window_px, generator_of(0, CROP, 0))


def plain_twin(model: modules.VQVAE) -> plain.VQVAE:
    """The same weights in the plain implementation."""
    twin = plain.VQVAE(*model.quantizer.codebook.shape)
    twin.load_state_dict(model.state_dict())
    return twin.to(memory_format=torch.contiguous_format)


def vqvae_here(here: Inputs, precision: str = "float32"):
    config = replace(here.config, precision=precision)
    model, images = some_vqvae(here, config), here.slices(128)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    step = functools.partial(train.vqvae_step, model, adam, config, structural_loss(config))
    return functools.partial(step, images, a_corner(images), quantize=True), len(images)


vqvae_here_bfloat16 = functools.partial(vqvae_here, precision="bfloat16")


def vqvae_plain(here: Inputs):
    model, images = plain_twin(some_vqvae(here, here.config)), here.slices(128)
    adam = torch.optim.Adam(model.parameters(), lr=here.config.lr)
    given = model, adam, images, here.config, a_corner(images)
    return functools.partial(plain.vqvae_step, *given), len(images)


def vqvae_monai(here: Inputs):
    """MONAI's VQ-VAE: equal widths, K and D, no residual layers; with this project's loss."""
    from monai.networks.nets import VQVAE

    config, images = here.config, here.slices(128)
    widths = config.widths[:2]
    model = VQVAE(
        2, 1, 1, channels=widths, num_res_layers=0, num_res_channels=widths,
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=config.codes, embedding_dim=config.code_dim,
    )  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), lr=config.lr)
    loss_of, corner = structural_loss(config), a_corner(images)

    def step():
        output, commitment = model(images)
        loss = loss_of(output, images, corner) + commitment
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step, len(images)


# --- code search and index maps -----------------------------------------------------------


def encoded(here: Inputs, dense: bool) -> tuple[modules.VQVAE, torch.Tensor]:
    """A VQ-VAE and its encoder's output for 8 slices: a (8, A, 64, 64).

    dense: random numbers instead, so that no cell is background.
    """
    model = some_vqvae(here, here.config).requires_grad_(False)
    a = model.encoder(here.slices(8))
    return model, torch.rand(a.shape) if dense else a


def search_here(here: Inputs, dense: bool = False):
    model, a = encoded(here, dense)
    rows, quantizer = modules.cells(a), model.quantizer

    def search() -> torch.Tensor:
        return F.embedding(quantizer.search(rows, model.pre_vq), quantizer.codebook)

    return search, len(rows)


def search_monai(here: Inputs, dense: bool = False):
    from monai.networks.layers.vector_quantizer import EMAQuantizer

    model, a = encoded(here, dense)
    other = EMAQuantizer(2, *model.quantizer.codebook.shape).eval()
    other.embedding.weight.data.copy_(model.quantizer.codebook)
    return functools.partial(other, model.pre_vq(a)), a[:, 0].numel()


def search_vqp(here: Inputs, dense: bool = False):
    from vector_quantize_pytorch import VectorQuantize

    model, a = encoded(here, dense)
    K, D = model.quantizer.codebook.shape
    other = VectorQuantize(dim=D, codebook_size=K).eval().requires_grad_(False)
    other.codebook = model.quantizer.codebook
    z = model.pre_vq(a).permute(0, 2, 3, 1).flatten(1, 2).contiguous()  # (8, h*w, D)
    return functools.partial(other, z), a[:, 0].numel()


dense_here = functools.partial(search_here, dense=True)
dense_monai = functools.partial(search_monai, dense=True)
dense_vqp = functools.partial(search_vqp, dense=True)


def maps_here(here: Inputs):
    model, pixels = some_vqvae(here, here.config), here.data.images

    @torch.no_grad()
    def maps():  # as `train.index_maps`
        model.encode(unit_range(torch.from_numpy(np.array(pixels[:64]))))

    return maps, 64


def maps_plain(here: Inputs):
    model, pixels = plain_twin(some_vqvae(here, here.config)), here.data.images

    @torch.no_grad()
    def maps():
        model.encode(torch.from_numpy(pixels[:64].astype(np.float32))[:, None] / 255)

    return maps, 64


# --- DCGAN and generation -----------------------------------------------------------------


class Gan(train.Gan):
    """A DCGAN at the start of its training, whose maps come from a VQ-VAE without training."""

    def __init__(self, here: Inputs, config: Config):
        self.run, self.vqvae = a_run(here, config), some_vqvae(here, config)
        self.levels = torch.from_numpy(here.data.train.levels[evenly(len(here.data.train), 32)])
        with torch.no_grad():
            maps = self.vqvae.encode(here.slices(32))
        counts = torch.bincount(maps.flatten(), minlength=config.codes)
        self.code_map = modules.CodeMap.fit(
            self.vqvae.quantizer.codebook, counts, config.order, config.map_channels,
            crop=train.crop_of(here.data.train, config),
        )  # fmt: skip
        self.make_networks()
        noise = torch.randn(32, config.noise_dim, generator=generator_of(0))
        real = self.code_map.encode(self.code_map.crop.cut(maps))
        self.ready = real, self.levels, noise  # a batch


def plain_gan(here: Inputs, config: Config) -> Gan:
    """The same with NCHW weights, a plain first layer and optimisers that are not fused."""
    gan = Gan(here, config)
    first = gan.G.layers[0]
    gan.G.layers[0] = torch.nn.ConvTranspose2d(1, 1, first.kernel_size, bias=False)
    gan.G.layers[0].weight = first.weight
    for name, network in (("G_optimizer", gan.G), ("D_optimizer", gan.D)):
        network.to(memory_format=torch.contiguous_format)
        group = getattr(gan, name).param_groups[0]
        adam = torch.optim.Adam(network.parameters(), group["lr"], group["betas"])
        setattr(gan, name, adam)
    return gan


def steps_of(step: Callable, gan: Gan):
    """The steps from one penalty to the next, and the number of maps in them."""
    config = gan.run.config

    def steps():
        for number in range(config.penalty_every):
            step(gan, *gan.ready, penalise=number == 0)

    return steps, config.penalty_every * config.gan_batch_size


def dcgan_here(here: Inputs):
    return steps_of(train.dcgan_step, Gan(here, here.config))


def dcgan_plain(here: Inputs):
    return steps_of(plain.dcgan_step, plain_gan(here, here.config))


def generate_here(here: Inputs, refined: bool = True):
    """Noise to slices, as predict.py. refined: with the denoiser and the sharper decoder."""
    config, gan = here.config, Gan(here, here.config)
    restore, vqvae = None, gan.vqvae
    if refined:
        denoiser = make_denoiser(config).eval()
        denoiser.fit(gan.code_map, torch.ones(config.codes))
        autocast = functools.partial(device.autocast, CPU, config.precision)
        restore = denoiser.restorer(gan.code_map, autocast)
        vqvae = widen_decoder(vqvae, config)
    gan.G.eval()
    noise, level = gan.ready[2].repeat(2, 1), gan.levels.repeat(2)

    def generate():
        maps = modules.draw_maps(gan.G, gan.code_map, noise, level, restore)
        modules.in_full_batches(vqvae.decode, maps)

    return generate, len(noise)


generate_here_alone = functools.partial(generate_here, refined=False)


def generate_transformer(here: Inputs):
    """MONAI's transformer, of its tutorial's size. Token t costs a pass over t tokens.

    The sum over all tokens is Simpson's, from passes of five lengths: exact if the cost is
    quadratic in the length. Decoding the finished map is left out.
    """
    from monai.networks.nets import DecoderOnlyTransformer

    model = DecoderOnlyTransformer(
        num_tokens=here.config.codes + 1, max_seq_len=TOKENS, attn_layers_dim=96,
        attn_layers_depth=12, attn_layers_heads=8, use_flash_attention=True,
    ).eval()  # fmt: skip
    lengths = np.linspace(0, TOKENS, 5).astype(int)

    @torch.no_grad()
    def measure() -> float:
        return float(simpson([seconds_of(pass_over, n) for n in lengths], x=lengths))

    def pass_over(n: int):
        model(torch.zeros(1, max(1, n), dtype=torch.long))

    return measure, 1


# --- slices from files --------------------------------------------------------------------


def open_here(here: Inputs):
    def work() -> float:
        with tempfile.TemporaryDirectory(dir=here.work) as cache:
            config = Config(data=str(here.pngs()), cache=cache)
            return seconds_of(quietly, open_data, config)

    return work, 1


def open_here_again(here: Inputs):
    config = Config(data=str(here.pngs()), cache=str(here.work / "cache"))
    quietly(open_data, config)
    return lambda: seconds_of(quietly, open_data, config), 1


class PngFiles(torch.utils.data.Dataset):
    def __init__(self, root: Path):
        self.paths = sorted(map(str, root.rglob("*.png")))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        blob = np.fromfile(self.paths[i], np.uint8)
        return torch.from_numpy(cv2.imdecode(blob, cv2.IMREAD_GRAYSCALE))[None] / 255


def open_loader(here: Inputs):
    pngs, workers = PngFiles(here.pngs()), os.cpu_count()
    loader = torch.utils.data.DataLoader(pngs, 32, shuffle=True, num_workers=workers)
    return lambda: collections.deque(loader, maxlen=0), 1


# --- SSIM ---------------------------------------------------------------------------------


def ssim_pair(here: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """64 slices and noisy copies of them."""
    x = here.slices(64)
    noise = torch.randn(x.shape, generator=generator_of(0))
    return x, (x + 0.05 * noise).clamp(0, 1)


def ssim_here(here: Inputs):
    return functools.partial(metrics.ssim, *ssim_pair(here)), 64


def ssim_msssim(here: Inputs):
    from pytorch_msssim import ssim

    given = {"data_range": 1.0, "size_average": False}
    return functools.partial(ssim, *ssim_pair(here), **given), 64
