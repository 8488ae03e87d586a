"""The results of stages 1 and 2, as the later stages read them: VQ-VAE, index maps, code map.

In: `vqvae_best.pt`, `codes.npy`, `codes.pt` of a run's folder. Out: `RealMaps`. All files must
belong together (exit 4).
"""

import math

import numpy as np
import torch
from torch import Tensor

import modules
from modules import VQVAE, CodeMap
from stages.stage import Feed, Run, require, require_file
from support import checkpoints, files


def trained_vqvae(run: Run, stage: str = "vqvae", make=modules.make_vqvae, **link) -> VQVAE:
    """The best weights of a stage, in the network that `make` returns for a configuration.

    link: further values that the checkpoint must hold. Raises UserError (exit 4) if it is
    unusable.
    """
    require(run, stage)
    path = run.path(f"{stage}_best.pt")
    values = checkpoints.load_checkpoint(path, stage=stage, **run.fingerprint(), **link)
    model = make(run.config)
    return checkpoints.load_weights(model, values.get("model"), path).to(run.device).eval()


class RealMaps:
    """Index maps of all slices, their code map, their levels.

    Raises UserError (exit 4) unless all of it belongs together.
    """

    def __init__(self, run: Run):
        self.run, path = run, run.path("codes.pt")
        require_file(path, "codes")
        values = checkpoints.load_checkpoint(path, stage="codes", **run.fingerprint())
        with checkpoints.reading(path):
            self.code_map = CodeMap.from_saved(values, run.config).to(run.device)
            for key, name in (("vqvae", "vqvae_best.pt"), ("maps", "codes.npy")):
                if values[key] != checkpoints.checksum(run.path(name)):
                    raise ValueError(f"made with another {name}; run --stage codes again")
            self.level_table = values["levels"]
            self.counts = values["counts"]["train"]  # (K,)
        maps = files.mapped(run.path("codes.npy")).view(np.int16)  # a type of torch
        self.maps = Feed(maps, run.device)
        self.levels = self.told(run.data.train.levels)
        self.link = {"codes": checkpoints.checksum(path)}  # for later checkpoints

    def told(self, levels: np.ndarray) -> Tensor:
        """Slice levels (n,) as networks get them: NaN, unknown, in the original recipe."""
        levels = torch.from_numpy(levels)
        return torch.full_like(levels, math.nan) if self.run.config.original else levels

    def real_maps(self, rows: np.ndarray) -> Tensor:
        """Index maps (n, 64, 64) int64 of these slices, on the run's device."""
        return self.maps[rows].long() & 0xFFFF
