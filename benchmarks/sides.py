"""The sides of every comparison in speed.py: this project's own, the plain one, the libraries'.

A maker takes `Inputs` and returns a function, and how many items one call of it works on. What
the function returns is ignored unless it is a float: seconds that it has measured itself. A
library is imported by its own maker only, since it need not be installed.
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
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import cv2
import numpy as np
import plain
import torch
import torch.nn.functional as F
from scipy.integrate import simpson

import metrics
import modules
import runtime
import train
from config import Config
from dataset import evenly, open_data

CPU = torch.device("cpu")
PNGS, CASE = 9664, 16  # slices of the original's data set; how many to a subject
TOKENS = 4096  # cells of an index map
COPIED, SIDE = 2**28, 4096  # numbers of the large copy; rows of the large product


class Inputs:
    """What every side reads: the embedded slices, and a folder for temporary files."""

    def __init__(self, cache: str, work: str):
        self.config, self.work = Config(cache=cache), Path(work)

    @functools.cached_property
    def data(self):
        return quietly(open_data, self.config)

    def slices(self, n: int) -> torch.Tensor:
        """n training slices (n, 1, 256, 256), evenly spaced."""
        return self.data.train.batch(evenly(len(self.data.train), n))

    def pngs(self) -> Path:
        """A folder of 9,664 PNG slices as the original's data set has them."""
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


def a_run(config: Config) -> SimpleNamespace:
    """What a training step asks of `train.Run`."""
    return SimpleNamespace(config=config, seed=0, device=CPU)


def some_vqvae(here: Inputs, config: Config) -> modules.VQVAE:
    """At the start of its training, with codes from real slices."""
    model = train.seeded(0, 0, lambda: modules.make_vqvae(config))
    train.start_codebook(model, here.data.train, a_run(config))
    return model


def a_corner(images: torch.Tensor) -> torch.Tensor:
    return train.corner_of(images, modules.generator_of(0, train.CROP, 0))


def plain_twin(model: modules.VQVAE) -> plain.VQVAE:
    twin = plain.VQVAE(*model.quantizer.codebook.shape)
    twin.load_state_dict(model.state_dict())
    return twin.to(memory_format=torch.contiguous_format)


def vqvae_here(precision: str, here: Inputs):
    config = Config(precision=precision, batch_size=128)
    model, images = some_vqvae(here, config), here.slices(128)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    corner = a_corner(images)
    return lambda: train.vqvae_step(model, adam, config, 1.0, images, corner, True), len(images)


def vqvae_plain(here: Inputs):
    config = here.config
    model, images = plain_twin(some_vqvae(here, config)), here.slices(128)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr)
    corner = a_corner(images)
    return lambda: plain.vqvae_step(model, adam, images, config, corner), len(images)


def vqvae_monai(here: Inputs):
    """Equal widths, K and D, and no residual layers; its loss here is this project's own."""
    from monai.networks.nets import VQVAE

    config, images = here.config, here.slices(128)
    widths = config.widths[:2]
    model = VQVAE(
        2, 1, 1, channels=widths, num_res_layers=0, num_res_channels=widths,
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=config.codes, embedding_dim=config.code_dim,
    )  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), lr=config.lr)
    corner = a_corner(images)

    def step():
        output, commitment = model(images)
        loss = train.reconstruction_loss(output, images, config, 1.0, corner) + commitment
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step, len(images)


def cells(here: Inputs, dense: bool) -> tuple[modules.VQVAE, torch.Tensor]:
    """A VQ-VAE, and what its quantiser sees of 8 slices: a (8, 8, 64, 64).

    dense: random numbers instead, so that no cell is background.
    """
    model = some_vqvae(here, here.config).requires_grad_(False)
    a = model.encoder(here.slices(8))
    return model, torch.rand(a.shape) if dense else a


def search_here(dense: bool, here: Inputs):
    model, a = cells(here, dense)
    flat = a.permute(0, 2, 3, 1).flatten(0, 2)  # (N, A)
    weight, bias = model.pre_vq.weight.flatten(1), model.pre_vq.bias
    quantizer = model.quantizer

    def search() -> torch.Tensor:
        return F.embedding(quantizer.search(flat, weight, bias), quantizer.codebook)

    return search, len(flat)


def search_monai(dense: bool, here: Inputs):
    from monai.networks.layers.vector_quantizer import EMAQuantizer

    model, a = cells(here, dense)
    K, D = model.quantizer.codebook.shape
    other = EMAQuantizer(2, K, D).eval()
    other.embedding.weight.data.copy_(model.quantizer.codebook)
    return functools.partial(other, model.pre_vq(a)), a[:, 0].numel()


def search_vqp(dense: bool, here: Inputs):
    from vector_quantize_pytorch import VectorQuantize

    model, a = cells(here, dense)
    K, D = model.quantizer.codebook.shape
    other = VectorQuantize(dim=D, codebook_size=K).eval().requires_grad_(False)
    other.codebook = model.quantizer.codebook
    z = model.pre_vq(a).permute(0, 2, 3, 1).flatten(1, 2).contiguous()  # (8, h*w, D)
    return functools.partial(other, z), a[:, 0].numel()


def extract_here(here: Inputs):
    model, pixels = some_vqvae(here, here.config), here.data.images
    return lambda: train.encode_slices(model, pixels[:64]), 64


def extract_plain(here: Inputs):
    model, pixels = plain_twin(some_vqvae(here, here.config)), here.data.images

    @torch.no_grad()
    def extract():
        model.encode(torch.from_numpy(pixels[:64].astype(np.float32))[:, None] / 255)

    return extract, 64


def a_gan(here: Inputs, config: Config, fused: bool) -> SimpleNamespace:
    """What a DCGAN step asks of `train.Gan`: networks, optimisers, real maps, noise.

    As in training, the networks draw the box in which maps differ, here of 512 slices.
    """
    model = some_vqvae(here, config)
    levels = torch.from_numpy(here.data.train.levels[evenly(len(here.data.train), 32)])
    with torch.no_grad():
        maps = model.encode(here.slices(32))
    counts = torch.bincount(maps.flatten(), minlength=config.codes)
    codebook, channels = model.quantizer.codebook, config.map_channels
    code_map = modules.CodeMap.fit(codebook, counts, config.order, channels)
    with torch.no_grad():
        many = model.encode(here.slices(512))
    same = (many == many[0]).all(0)  # (64, 64)
    box = code_map.box = modules.Box(torch.where(same, many[0], -1))
    G = train.seeded(0, 1, lambda: modules.make_generator(config, box.size))
    D = train.seeded(0, 2, lambda: modules.make_discriminator(config, box.size))
    noise = torch.randn(32, config.noise_dim, generator=modules.generator_of(0))
    adam = {"betas": (config.gan_beta1, 0.99), "fused": fused}
    return SimpleNamespace(
        run=a_run(config), vqvae=model, code_map=code_map, G=G, D=D, levels=levels,
        G_optimizer=torch.optim.Adam(G.parameters(), config.gan_lr[0], **adam),
        D_optimizer=torch.optim.Adam(D.parameters(), config.gan_lr[1], **adam),
        ready=(code_map.encode(box.inside(maps)), levels, noise),
    )  # fmt: skip


def round_of(step: Callable, gan):
    """As many steps as lie between two penalties, and how many maps they see."""
    config = gan.run.config

    def steps():
        for number in range(config.penalty_every):
            step(gan, *gan.ready, penalise=number == 0)

    return steps, config.penalty_every * config.gan_batch_size


def dcgan_here(here: Inputs):
    return round_of(train.dcgan_step, a_gan(here, here.config, fused=True))


def dcgan_plain(here: Inputs):
    gan = a_gan(here, here.config, fused=False)
    for network in (gan.G, gan.D):
        network.to(memory_format=torch.contiguous_format)
    gan.G.layers[0].__class__ = torch.nn.ConvTranspose2d
    return round_of(plain.dcgan_step, gan)


def generate_here(refined: bool, here: Inputs):
    """refined: through the denoiser and the sharper decoder, or the DCGAN and VQ-VAE alone."""
    gan = a_gan(here, here.config, fused=True)
    denoiser, vqvae = None, gan.vqvae
    if refined:
        denoiser = modules.make_denoiser(here.config)
        denoiser.fit(gan.code_map, torch.ones(here.config.codes))
        vqvae = modules.widen_decoder(gan.vqvae, here.config)
    gan.G.eval()
    noise, level = gan.ready[2].repeat(2, 1), gan.levels.repeat(2)
    networks = gan.G, gan.code_map, vqvae

    def generate():  # as predict.py does
        autocast = runtime.autocast(noise.device, here.config.precision)
        modules.draw(*networks, noise, level, denoiser=denoiser, autocast=autocast)

    return generate, len(noise)


def transformer_monai(here: Inputs):
    """Of the size in MONAI's tutorial. It has no cache: token t is a pass over t tokens.

    The sum over all tokens is Simpson's, from passes of five lengths: exact for a cost that is
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


def open_first(here: Inputs):
    def work() -> float:
        with tempfile.TemporaryDirectory(dir=here.work) as cache:
            config = Config(data=str(here.pngs()), cache=cache)
            return seconds_of(quietly, open_data, config)

    return work, 1


def open_again(here: Inputs):
    config = Config(data=str(here.pngs()), cache=str(here.work / "cache"))
    quietly(open_data, config)
    return lambda: seconds_of(quietly, open_data, config), 1


def read_here(here: Inputs):
    train_split = here.data.train
    order = np.random.default_rng(0).integers(len(train_split), size=(PNGS // 32, 32))

    def epoch():
        for rows in order:
            train_split.batch(rows)

    return epoch, 1


class PngFiles(torch.utils.data.Dataset):
    def __init__(self, root: Path):
        self.paths = sorted(map(str, root.rglob("*.png")))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        blob = np.fromfile(self.paths[i], np.uint8)
        return torch.from_numpy(cv2.imdecode(blob, cv2.IMREAD_GRAYSCALE))[None] / 255


def read_loader(here: Inputs):
    files, workers = PngFiles(here.pngs()), os.cpu_count()
    loader = torch.utils.data.DataLoader(files, 32, shuffle=True, num_workers=workers)
    return lambda: collections.deque(loader, maxlen=0), 1


def ssim_work(similarity: Callable, x: torch.Tensor, y: torch.Tensor, loss: bool):
    def step():
        given = x.detach().requires_grad_(loss)
        value = similarity(given, y).mean()
        if loss:
            value.backward()

    return step, len(x)


def ssim_pair(here: Inputs, loss: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices and noisy copies: whole ones for the metric, a batch of windows for the loss."""
    x = here.slices(32)[..., 64:192, 64:192] if loss else here.slices(64)
    noise = torch.randn(x.shape, generator=modules.generator_of(0))
    return x.contiguous(), (x + 0.05 * noise).clamp(0, 1)


def ssim_here(loss: bool, here: Inputs):
    function = metrics.ssim_core if loss else metrics.ssim
    return ssim_work(function, *ssim_pair(here, loss), loss)


def ssim_msssim(loss: bool, here: Inputs):
    from pytorch_msssim import ssim

    function = functools.partial(ssim, data_range=1.0, size_average=False)
    return ssim_work(function, *ssim_pair(here, loss), loss)


def machine_copy(here: Inputs):
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    return lambda: target.copy_(source), 2 * COPIED * 4  # bytes: read, written


def machine_product(dtype: torch.dtype, here: Inputs):
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    return lambda: a @ b, 2 * SIDE**3  # operations
