"""Memory hardly grows with the data: the whole driver, on ten times as many slices."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, SMALL

from config import Config
from loading import embedded
from loading.decoding import SIDE
from loading.sources import stable_hash
from support.files import write_npy_header

# Of the smaller set, 32 slices each: enough that every score uses as many slices in both.
SUBJECTS, TIMES = (40, 8, 8), 10
OPTIONS = [
    *SMALL, "--gan-widths", "8", "8", "--vqvae-kimg", "0.4", "--gan-kimg", "0.2",
    "--decoder-kimg", "0.2", "--denoiser-kimg", "0.2", "--samples", "64",
]  # fmt: skip
# Runs the driver. Freed memory goes back to the kernel at once: holes in the heap would differ.
DRIVER = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from support import endings
endings.tame_malloc = lambda: None
runpy.run_path({str(ROOT / "driver.py")!r}, run_name="__main__")
"""


def sparse_cache(folder: Path, subjects: tuple[int, int, int]):
    """The embedded set's cache with an ellipse in every tenth slice and holes between them."""
    config = Config(subjects=subjects)
    settings = [embedded.VERSION, config.split_seed, config.slices, list(subjects)]
    name, people = stable_hash("embedded", settings), sum(subjects)
    draw, n = np.random.default_rng(0), people * config.slices
    folder.mkdir()
    with open(folder / f"{name}.npy", "wb") as file:
        write_npy_header(file, np.uint8, (n, SIDE, SIDE))
        start = file.tell()
        for row in range(0, n, 10):
            image = np.zeros((SIDE, SIDE), np.uint8)
            axes, grey = draw.integers(40, 100, 2).tolist(), int(draw.integers(80, 250))
            cv2.ellipse(image, (128, 128), axes, 0, 0, 360, grey, -1)
            image += (draw.integers(0, 6, image.shape) * (image > 0)).astype(np.uint8)
            file.seek(start + row * image.size)
            file.write(image.tobytes())
        file.truncate(start + n * SIDE * SIDE)
    values = {"fingerprint": name, "table": [config.slices] * people}
    (folder / f"{name}.json").write_text(json.dumps(values))


def peak_anonymous_mb(folder: Path, subjects: tuple[int, int, int]) -> float:
    """Largest RssAnon of a `driver.py` from start to end: mapped pages are not in it."""
    sparse_cache(folder, subjects)
    command = [sys.executable, "-c", DRIVER, *OPTIONS, "--cache", folder]
    command += ["--out", folder / "out", "--subjects", *map(str, subjects)]
    env, peak = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}, 0
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | env)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *map(int, re.findall(r"^RssAnon:\s+(\d+)", status, re.M))])
            time.sleep(0.01)
    assert process.returncode == 0, (folder / "log").read_text()
    return peak / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_ten_times_the_slices_take_no_more_memory(tmp_path):
    small = peak_anonymous_mb(tmp_path / "small", SUBJECTS)
    large = peak_anonymous_mb(tmp_path / "large", tuple(TIMES * n for n in SUBJECTS))
    print(f"anonymous, at most: {small:.0f} MB, of {TIMES} times the slices {large:.0f} MB")
    assert large < 1.05 * small
