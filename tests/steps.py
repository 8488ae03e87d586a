"""Training steps of all stages from fixed states, as `python` or as torchrun runs them.

    python tests/steps.py OUT.pt
    torchrun --nproc_per_node 2 tests/steps.py OUT.pt

Default networks, but a DCGAN of smooth activations; float32, few slices. How far the steps
moved everything goes to OUT.pt, and is the same from any number of processes, up to rounding.
Steps are plain gradient descent: Adam's first ones have one size, and make of a gradient that
is rounding error alone a whole step.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import evaluation
import metrics
import modules
import processes
import train
from config import Config
from dataset import BrainSlices

# A larger gamma makes plain descent so steep that it multiplies rounding, step by step.
CONFIG = Config(precision="float32", batch_size=8, gan_batch_size=8, codes=64, gamma=0.3)
SLICES = 24
DECODER_LOSSES = "loss", "g_loss", "d_loss", "r1", "r2"


def slices() -> BrainSlices:
    """Blurred noise: every slice and every cell another."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(SLICES, 1, 32, 32, generator=draw)
    images = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
    pixels = (images[:, 0] * 255).to(torch.uint8).numpy()
    levels = np.linspace(0, 1, SLICES)
    return BrainSlices(pixels, np.arange(SLICES), ["a"] * SLICES, levels)


def vqvae_steps() -> dict:
    data = slices()
    run = SimpleNamespace(config=CONFIG, seed=0, device=torch.device("cpu"))
    stage = SimpleNamespace(run=run, steps=1000, step=0)
    model = train.seeded(0, 0, lambda: modules.make_vqvae(CONFIG))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train.start_codebook(model, data, run)
    far = torch.arange(5)
    model.quantizer.replace(far, torch.full((5, CONFIG.code_dim), 100.0))  # no cell is near
    before, losses, revived = floats("vqvae", model), [], 0
    for stage.step in range(train.REVIVE_EVERY - 4, train.REVIVE_EVERY + 1):
        rows = train.order_of(0, train.ORDER, SLICES, 8 * stage.step, 8)
        images = data.batch(rows[processes.share(8)])
        corner = train.corner_of(images, train.generator_of(0, train.CROP, stage.step))
        given = model, optimizer, CONFIG, 1.0
        values, coded = train.vqvae_step(*given, images, corner, quantize=True)
        losses.append(values["loss"].item())
        revived += train.revive_codes(model, *coded, stage).item()
    moved = {k: v - before[k] for k, v in floats("vqvae", model).items()}
    return moved | {"vqvae.losses": torch.tensor(losses), "revived": torch.tensor(revived)}


def floats(name: str, module: torch.nn.Module) -> dict:
    state = module.state_dict().items()
    return {f"{name}.{k}": v.clone() for k, v in state if v.is_floating_point()}


def without_files() -> train.Gan:
    """Random maps and their code map, as if a run had made them; no networks yet."""
    gan = train.Gan.__new__(train.Gan)
    gan.run = SimpleNamespace(
        config=CONFIG, seed=0, device=torch.device("cpu"),
        data=SimpleNamespace(train=slices()),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    codebook = torch.randn(64, 64, generator=draw)
    gan.counts = torch.ones(64).long()
    gan.code_map = modules.CodeMap.fit(codebook, gan.counts, "coordinates", 4)
    maps = torch.randint(64, (SLICES, 64, 64), generator=draw).short().numpy()
    gan.maps = train.Feed(maps, gan.run.device)
    gan.levels = torch.from_numpy(gan.run.data.train.levels)
    return gan


def decoder_steps() -> dict:
    gan, model = without_files(), train.seeded(0, 0, lambda: modules.make_vqvae(CONFIG))
    decoding, losses = train.Decoding(gan.run, model), []
    decoding.optimizer = torch.optim.SGD(model.decoder.parameters(), lr=1e-2)
    decoding.D_adam = torch.optim.SGD(decoding.D.parameters(), lr=1e-2)
    images = train.Feed(gan.run.data.train.images, gan.run.device)
    before = floats("decoder", model.decoder) | floats("patches", decoding.D)
    stage = SimpleNamespace(run=gan.run, batch_size=8)
    for stage.step in range(CONFIG.penalty_every - 1, CONFIG.penalty_every + 3):
        stage.nimg = 8 * stage.step
        batch = train.decoder_batch(gan, images, stage)
        penalise = stage.step % CONFIG.penalty_every == 0
        values = train.decoder_step(decoding, CONFIG, 1.0, *batch, penalise)
        losses.append([values[k].item() if k in values else 0.0 for k in DECODER_LOSSES])
    after = floats("decoder", model.decoder) | floats("patches", decoding.D)
    moved = {k: v - before[k] for k, v in after.items()}
    return moved | {"decoder.losses": torch.tensor(losses)}


def gan_steps() -> dict:
    gan = without_files()
    gan.networks()
    for layers in (gan.G.layers, gan.D.layers, gan.average.layers):
        for i, layer in enumerate(layers):
            if isinstance(layer, torch.nn.ReLU | torch.nn.LeakyReLU):
                layers[i] = (
                    torch.nn.SiLU()
                )  # rounding carries many a one of those over its kink
    gan.G_optimizer = torch.optim.SGD(gan.G.parameters(), lr=1e-2)
    gan.D_optimizer = torch.optim.SGD(gan.D.parameters(), lr=1e-3)
    parts, losses = {"G": gan.G, "D": gan.D, "average": gan.average}, []
    before = {k: v for name, part in parts.items() for k, v in floats(name, part).items()}
    stage = SimpleNamespace(run=gan.run, batch_size=8)
    for stage.step in range(CONFIG.penalty_every - 1, CONFIG.penalty_every + 3):
        stage.nimg = 8 * stage.step
        penalise = stage.step % CONFIG.penalty_every == 0
        values = train.dcgan_step(gan, *gan.batch(stage), penalise)
        train.update_average(gan.average, gan.G, 0.05 * stage.nimg, 8)
        losses.append([values["d_loss"].item(), values["g_loss"].item()])
        losses[-1] += [values[k].item() if k in values else 0.0 for k in ("r1", "r2")]
    after = {k: v for name, part in parts.items() for k, v in floats(name, part).items()}
    moved = {k: v - before[k] for k, v in after.items()}
    return moved | {"gan.losses": torch.tensor(losses)}


def denoiser_steps() -> dict:
    gan = without_files()
    denoiser = train.seeded(0, 3, lambda: modules.make_denoiser(CONFIG))
    denoiser.fit(gan.code_map, gan.counts)
    sgd, losses, before = torch.optim.SGD(denoiser.parameters(), lr=1e-2), [], None
    stage = SimpleNamespace(run=gan.run, batch_size=8, nimg=0, step=0)
    for stage.step in range(6):
        if stage.step == 2:  # from here on, gradients reach all layers
            before = floats("denoiser", denoiser)
        stage.nimg = 8 * stage.step
        batch, start = train.denoiser_batch(denoiser, gan, stage)
        losses.append(train.denoiser_step(denoiser, sgd, CONFIG, *batch, start).item())
    moved = {k: v - before[k] for k, v in floats("denoiser", denoiser).items()}
    return moved | {"denoiser.losses": torch.tensor(losses)}


def features() -> dict:
    """Of 23 slices, 5 times as many as processes at a time: the last ones are few."""
    evaluation.LARGE, evaluation.PART = 0, 5
    data = slices()
    split = BrainSlices(data.images, np.arange(23), ["a"] * 23, data.levels[:23])
    found = evaluation.on_disk(metrics.RandomFeatures().features, split)
    return {"features": torch.tensor(found)}


@processes.joined()
def main(path: str):
    state = vqvae_steps() | decoder_steps() | gan_steps() | denoiser_steps() | features()
    if processes.is_first():
        torch.save(state, path)


if __name__ == "__main__":
    main(sys.argv[1])
