"""Export a finished run as a folder to share, or a level sweep as a volume.

In: a loaded run (`predict.TrainedRun`). Out: a folder that `predict.load_run` can load:
`model.safetensors` (networks and code map), `config.json`, a model card `README.md`,
`example.png`. Or slices as a NIfTI file for any viewer.
"""

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from config import VERSION, Config, Exit, UserError
from scores import figures
from scores.evaluation import IMAGE_LABELS, LABELS, generation_rows
from support import checkpoints, files

WEIGHTS, EXAMPLE = "model.safetensors", "example.png"
FILES = {WEIGHTS, "config.json", "README.md", EXAMPLE}
CODES = {"used", "points", "crop", "background", "levels", "counts"}
HEIGHT_MM = 112  # between a head's lowest and highest slice: the mean of embedded subjects

# --- a folder to share --------------------------------------------------------------------


def export(run, folder: Path):
    """Write `run` to `folder`. config.json comes last: without it, nothing loads.

    Rounds the run's generator and denoiser to float16: it then draws what the export draws.
    Raises UserError: exit 5 if the folder holds something else, 4 if the run has no scores yet.
    """
    check_free(folder)
    card = model_card(run)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": tensor.contiguous().cpu()
        for part, state in states_of(run).items()
        for name, tensor in state.items()
    }
    with files.replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors))
    files.write_text(folder / "README.md", card)
    with files.replacing(folder / EXAMPLE) as temporary:
        sheet = figures.grid(run.sample(8, seed=1)[1][:, 0].numpy(), columns=4)
        temporary.write_bytes(figures.png(sheet))
    here = Config()  # paths of this machine are private
    config = replace(run.config, data=here.data, out=here.out, cache=here.cache, seed=run.seed)
    values = {"config": config.to_dict(), "data": run.fingerprint, "stamp": run.stamp}
    values["version"] = VERSION
    values["checksum"] = checkpoints.checksum(folder / WEIGHTS)
    files.write_json(folder / "config.json", values)


def states_of(run) -> dict[str, dict[str, Tensor]]:
    """Part of a run -> its tensors. Rounds its largest networks to float16: half the size."""
    states = {"codes": {**run.code_map.saved(), "levels": run.levels, "counts": run.counts}}
    states["vqvae"] = run.vqvae.state_dict()
    for part, network in {"generator": run.generator, "denoiser": run.denoiser}.items():
        if network is not None:
            rounded = {name: weight.half() for name, weight in network.named_parameters()}
            network.load_state_dict(rounded, strict=False)
            states[part] = network.state_dict() | rounded
    return states


def load(folder: Path) -> dict[str, dict]:
    """The inverse: {"vqvae", "generator", "denoiser", "codes"} -> name -> tensor.

    Raises UserError (exit 4) unless the file is whole and belongs to config.json.
    """
    path = folder / WEIGHTS
    if files.read_json(folder / "config.json").get("checksum") != checkpoints.checksum(path):
        raise UserError(Exit.CHECKPOINT, f"{path} is damaged, or of another config.json")
    parts = {"vqvae": {}, "generator": {}, "denoiser": {}, "codes": {}}
    try:
        for name, tensor in safetensors.torch.load_file(path).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor.float() if tensor.dtype == torch.half else tensor
    except (SafetensorError, KeyError) as problem:
        raise UserError(Exit.CHECKPOINT, f"{path}: not an export: {problem}") from None
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    if set(parts["codes"]) != CODES or not all(t.isfinite().all() for t in tensors):
        raise UserError(Exit.CHECKPOINT, f"{path}: not an export, or it holds infinite numbers")
    parts["codes"]["counts"] = {"train": parts["codes"]["counts"]}  # as codes.pt has it
    return parts


def check_free(folder: Path):
    """Raise UserError (exit 5) if `folder` holds anything but an earlier export."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not (WEIGHTS in names and names <= FILES):
        raise UserError(Exit.BUSY, f"{folder} holds other files; choose another --out")


# --- its card -----------------------------------------------------------------------------


EMBEDDED_LICENCE = """\
The training data are derived from the ICBM 2009a nonlinear symmetric template (Copyright (C)
1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University; free to use and distribute with this notice)."""
PRIVATE_LICENCE = """\
The networks were trained on a user's own scans. Their data-use agreement also covers these
files. That of OASIS: publish no image, slice, table or trained network made from it, and cite
Marcus et al. 2007 for OASIS-1, LaMontagne et al. 2019 for OASIS-3."""


CARD = """\
# Brain MRI slices from a codebook: VQ-VAE and DCGAN

{stamp}![Samples 0 to 7 of seed 1]({example})

A VQ-VAE with {codes} codes, a DCGAN that draws its index maps{and_denoiser}:
axial slices of 256x256 of people who do not exist. Preset `{preset}`, seed
{seed}; every setting is in `config.json`.
`{weights}` holds only numbers: loading it runs no code.

```python
from predict import load_run

run = load_run("this folder")
maps, brains = run.sample(8, seed=1)  # {example}: (8, 1, 256, 256) in [0, 1]
```

Not for medical use: samples show nobody.{made_up}

## Data

Source: {source}; split {split}; {skipped} files skipped.

| part | subjects | slices |
| --- | --- | --- |
{counts}

## Scores

{n} slices of each kind; unseen people are real slices of other subjects.

| generation | generated | reconstructions | real | unseen people |
| --- | --- | --- | --- | --- |
{generation}

| reconstruction of {n_test} test slices | mean | sd |
| --- | --- | --- |
{reconstruction}

## Memorisation

The distance of each slice to its nearest training slice was measured. For {share} of the
samples it is smaller than for 99 % of unseen people's slices. Chance is 1 %; copies of training
slices: {copies}.

## Licence

{licence}
"""


def model_card(run) -> str:
    """README.md of an export: model, data, scores, memorisation, licence."""
    result = files.read_json(run.folder / "metrics.json")
    data = files.read_json(run.folder.resolve().parent / "data_report.json")
    g, r, c = (result[part] for part in ("generation", "reconstruction", "codebook"))
    near = g["memorised_share"]
    share, copies = (f"{100 * near[k]:.1f} %" for k in ("generated", "planted_copies"))
    counts = [(p, data["subjects"][p], data["slices"][p]) for p in data["subjects"]]
    generation = [(LABELS[name], *cells) for name, cells in generation_rows(g)]
    reconstruction = [
        (label, f"{r[name]['mean']:.3f}", f"{r[name]['sd']:.3f}")
        for name, label in IMAGE_LABELS.items()
    ]
    made_up = (
        "\nFine texture is typical, not true, in reconstructions too: the decoder learned it"
        "\nfrom a discriminator, and no index map holds it."
    ) * (run.config.decoder_kimg > 0)
    return CARD.format(
        stamp=f"**{run.stamp}**\n\n" if run.stamp else "", example=EXAMPLE, weights=WEIGHTS,
        and_denoiser=", and a denoiser that corrects neighbouring cells" * bool(run.denoiser),
        codes=c["codes"], preset=run.config.preset, seed=run.seed, made_up=made_up,
        source=data["source"], split=data["split"], skipped=len(data["skipped"]),
        counts=rows(counts), n=g["n"], n_test=r["n"], generation=rows(generation),
        reconstruction=rows(reconstruction), share=share, copies=copies,
        licence=PRIVATE_LICENCE if run.stamp else EMBEDDED_LICENCE,
    )  # fmt: skip


def rows(table: list[tuple]) -> str:
    """Rows of a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)


# --- a volume -----------------------------------------------------------------------------


def write_volume(path: Path, slices: Tensor, note: str):
    """A sweep of axial slices (n, 1, 256, 256), lowest first, as NIfTI: uint8 (256, 256, n).

    RAS, origin in the middle. A slice begins at the front and at the patient's right, so both
    axes are flipped. A pixel is 1 mm, as in decoded volumes. The n levels are spread over the
    height of a head.
    """
    pixels = figures.as_bytes(slices[:, 0].numpy())  # (n, rows, columns)
    voxels = pixels[:, ::-1, ::-1].transpose(2, 1, 0)  # (right, anterior, superior)
    sizes_mm = np.array([1, 1, HEIGHT_MM / (len(slices) - 1)])
    affine = np.diag([*sizes_mm, 1])
    affine[:3, 3] = -sizes_mm * (np.array(voxels.shape) - 1) / 2
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = note.encode("ascii", "replace")[:79]
    with files.replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
