"""Training steps of all stages from fixed states, as `python` or as torchrun runs them.

    python tests/steps.py OUT.pt
    torchrun --nproc_per_node 2 tests/steps.py OUT.pt

OUT.pt gets the movement of every weight. Up to rounding it is the same for any number of
processes. The networks have their default sizes, in float32. Steps are plain gradient descent:
Adam's first steps have one size, also if a gradient is only rounding error. The DCGAN has
smooth activations, since rounding could move many values over a kink.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch.optim import SGD

import modules
import train
from config import PRESETS, Config
from dataset import BrainSlices
from stages.decoder import Decoding, decoder_batch, decoder_step
from stages.denoiser import denoiser_batch, denoiser_step, make_denoiser
from stages.losses import random_corner, structural_loss
from stages.stage import CROP, Feed, batch_rows, seeded, update_average
from support import distributed

# A larger gamma would make plain gradient descent so steep that it multiplies rounding errors.
CONFIG = Config(precision="float32", batch_size=8, gan_batch_size=8, codes=64, gamma=0.3)
SLICES = 24
STEPS = range(CONFIG.penalty_every - 1, CONFIG.penalty_every + 3)  # the second has penalties
CPU = torch.device("cpu")


def slices() -> BrainSlices:
    """Blurred noise, so that all slices and cells differ."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(SLICES, 1, 32, 32, generator=draw)
    images = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
    pixels = (images[:, 0] * 255).to(torch.uint8).numpy()
    levels = np.linspace(0, 1, SLICES)
    return BrainSlices(pixels, np.arange(SLICES), ["a"] * SLICES, levels)


def floats(**networks: torch.nn.Module) -> dict:
    """A copy of all weights and statistics of the networks."""
    return {
        f"{name}.{k}": v.clone()
        for name, network in networks.items()
        for k, v in network.state_dict().items()
        if v.is_floating_point()
    }


def moved(before: dict, **networks: torch.nn.Module) -> dict:
    return {k: v - before[k] for k, v in floats(**networks).items()}


def without_files(kind=train.Gan, config: Config = CONFIG) -> train.Gan:
    """Random maps and their code map, as if a run had made them; no networks yet."""
    gan = kind.__new__(kind)
    data = SimpleNamespace(train=slices())
    gan.run = SimpleNamespace(config=config, seed=0, device=CPU, data=data)
    draw = torch.Generator().manual_seed(1)
    codebook = torch.randn(64, 64, generator=draw)
    gan.counts = torch.ones(64).long()
    gan.code_map = modules.CodeMap.fit(codebook, gan.counts, config.order, config.map_channels)
    maps = torch.randint(64, (SLICES, 64, 64), generator=draw).short().numpy()
    gan.maps = Feed(maps, CPU)
    gan.levels = torch.from_numpy(data.train.levels)
    return gan


def original_gan() -> train.OriginalGan:
    """The original recipe with small networks; no networks yet."""
    small = {"gan_widths": (8, 4), "gan_batch_size": 8, "codes": 64}
    config = Config(precision="float32", **PRESETS["classic"] | small)
    return without_files(train.OriginalGan, config)


def stages(run, steps: range):
    """A stage at each of these steps."""
    for step in steps:
        yield SimpleNamespace(run=run, steps=1000, batch_size=8, step=step, nimg=8 * step)


def penalised(stage) -> bool:
    return stage.step % CONFIG.penalty_every == 0


def numbers(values: dict, *names: str) -> list[float]:
    return [values[name].item() if name in values else 0.0 for name in names]


def vqvae_steps() -> dict:
    """Five steps, with a revival of five dead codes among them."""
    run, losses, revived = without_files().run, [], 0
    model = seeded(0, 0, lambda: modules.make_vqvae(CONFIG))
    optimizer, loss = SGD(model.parameters(), lr=1e-2), structural_loss(CONFIG)
    train.start_codebook(model, run.data.train, run)
    far = torch.full((5, CONFIG.code_dim), 100.0)  # no cell is near
    model.quantizer.replace(torch.arange(5), far)
    before = floats(vqvae=model)
    for stage in stages(run, range(CONFIG.revive_every - 4, CONFIG.revive_every + 1)):
        images = run.data.train.batch(batch_rows(stage))
        draw = modules.generator_of(0, CROP, stage.step)
        corner = random_corner(256, 256, CONFIG.window_px, draw)
        values, coded = train.vqvae_step(model, optimizer, CONFIG, loss, images, corner, True)
        losses.append(values["loss"].item())
        revived += train.revive_codes(model, *coded, stage).item()
    extra = {"vqvae.losses": torch.tensor(losses), "revived": torch.tensor(revived)}
    return moved(before, vqvae=model) | extra


def decoder_steps() -> dict:
    """Four steps, of which one has penalties."""
    gan, model = without_files(), seeded(0, 0, lambda: modules.make_vqvae(CONFIG))
    decoding, losses = Decoding(gan.run, model), []
    decoding.optimizer = SGD(model.decoder.parameters(), lr=1e-2)
    decoding.D_adam = SGD(decoding.D.parameters(), lr=1e-2)
    images = Feed(gan.run.data.train.images, CPU)
    networks = {"decoder": model.decoder, "patches": decoding.D}
    before, loss = floats(**networks), structural_loss(CONFIG)
    for stage in stages(gan.run, STEPS):
        batch = decoder_batch(gan, images, stage)
        values = decoder_step(decoding, CONFIG, loss, *batch, penalised(stage))
        losses.append(numbers(values, "loss", "g_loss", "d_loss", "r1", "r2"))
    return moved(before, **networks) | {"decoder.losses": torch.tensor(losses)}


def gan_steps() -> dict:
    """Four steps, of which one has penalties."""
    gan = without_files()
    gan.make_networks()
    for layers in (gan.G.layers, gan.D.layers, gan.average.layers):
        for i, layer in enumerate(layers):
            if isinstance(layer, torch.nn.ReLU | torch.nn.LeakyReLU):
                layers[i] = torch.nn.SiLU()
    gan.G_optimizer = SGD(gan.G.parameters(), lr=1e-2)
    gan.D_optimizer = SGD(gan.D.parameters(), lr=1e-3)
    networks, losses = {"G": gan.G, "D": gan.D, "average": gan.average}, []
    before = floats(**networks)
    for stage in stages(gan.run, STEPS):
        values = train.dcgan_step(gan, *gan.batch(stage), penalised(stage))
        update_average(gan.average, gan.G, 0.05 * stage.nimg, 8)
        losses.append(numbers(values, "d_loss", "g_loss", "r1", "r2"))
    return moved(before, **networks) | {"gan.losses": torch.tensor(losses)}


def denoiser_steps() -> dict:
    """Six steps; movements are those of the last four, in which all layers have gradients."""
    gan = without_files()
    denoiser = seeded(0, 3, lambda: make_denoiser(CONFIG))
    denoiser.fit(gan.code_map, gan.counts)
    sgd, losses, before = SGD(denoiser.parameters(), lr=1e-2), [], None
    for stage in stages(gan.run, range(6)):
        if stage.step == 2:
            before = floats(denoiser=denoiser)
        batch, start = denoiser_batch(denoiser, gan, stage)
        losses.append(denoiser_step(denoiser, sgd, CONFIG, *batch, start=start).item())
    return moved(before, denoiser=denoiser) | {"denoiser.losses": torch.tensor(losses)}


@distributed.joined()
def main(path: str):
    state = vqvae_steps() | decoder_steps() | gan_steps() | denoiser_steps()
    if distributed.is_first():
        torch.save(state, path)


if __name__ == "__main__":
    main(sys.argv[1])
