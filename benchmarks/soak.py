"""Is anything lost when a run is killed again and again?

    python benchmarks/soak.py                     # 50 cycles of preset smoke
    python benchmarks/soak.py --cycles 5 --subjects 4 2 2 --vqvae-kimg 0.2 --gan-kimg 0.2

A cycle starts or resumes `driver.py` (with any of its options; a checkpoint every second) and
ends it at a random moment by SIGKILL, one time in four by SIGTERM. Then each checkpoint must be
readable and no older than before. A finished run must equal an uninterrupted one bit for bit.
Then a new run starts. The last line counts cycles, kills and losses; a loss is exit 1.
"""

import argparse
import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=50, help="number of starts [50]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments [0]")
    parser.add_argument("--out", default="runs/soak", help="a new folder [runs/soak]")
    arguments, options = parser.parse_known_args()
    return arguments, options or ["--preset", "smoke"]


if __name__ == "__main__":  # --help must not wait for the import of torch
    ARGUMENTS, OPTIONS = parse()

from config import Exit, UserError
from support import checkpoints, endings, messages

# driver.py with more checkpoints, so that some kills hit the saving of one
DRIVER = (
    "import runpy, sys; sys.path.insert(0, {0!r}); from stages import stage; "
    "stage.CHECKPOINT_EVERY_S = 1; sys.argv[0] = 'driver.py'; "
    "runpy.run_path({0!r} + '/driver.py', run_name='__main__')"
)
SAME = ("*_best.pt", "codes.npy", "codes.pt", "figures/*.png")


def start(folder: Path, options: list[str]) -> subprocess.Popen:
    code = DRIVER.format(str(HERE.parent.resolve()))
    command = [sys.executable, "-c", code, "--cache", str(folder.parent / "cache")]
    command += [*options, "--out", str(folder)]
    with open(folder.parent / "output.log", "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def result(folder: Path) -> dict:
    """The files of a finished run, without times and memory."""
    seed = folder / "seed-0"
    found = {p.name: p.read_bytes() for name in SAME for p in sorted(seed.glob(name))}
    metrics = json.loads((seed / "metrics.json").read_text(encoding="utf-8"))
    del metrics["peak_memory_mb"]
    with open(seed / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["images_per_s"]
    return found | {"metrics.json": metrics, "log.csv": rows}


def seen(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Images seen by each stage's newest checkpoint, and messages about unreadable files."""
    newest, problems = {}, []
    for path in sorted(folder.glob("seed-*/*.pt")):
        try:
            values = checkpoints.load_checkpoint(path)
        except UserError as problem:
            problems.append(str(problem))
            continue
        if path.stem.endswith(("_last", "_prev")):
            stage = values["stage"]
            newest[stage] = max(newest.get(stage, 0), values["nimg"])
    return newest, problems


class Soak:
    """Kills and resumes one run after the other; counts ends and losses."""

    def __init__(self, folder: Path, options: list[str], seed: int):
        self.run, self.options, self.random = folder / "killed", options, random.Random(seed)
        self.ends = dict.fromkeys(("SIGKILL", "SIGTERM", "finished"), 0)
        self.losses: list[str] = []
        self.before: dict[str, int] = {}
        reference, begin = folder / "whole", time.monotonic()
        if code := start(reference, options).wait():
            raise UserError(Exit.BUG, f"the uninterrupted run ended with {code}: see {folder}")
        self.seconds, self.wanted = time.monotonic() - begin, result(reference)

    def cycle(self):
        """Start or resume the run, end it, and check what it left."""
        fresh, begin = not self.run.exists(), time.monotonic()
        process = start(self.run, self.options)
        signum = signal.SIGTERM if self.random.random() < 0.25 else signal.SIGKILL
        try:
            code = process.wait(timeout=self.random.uniform(0.05, 1) * self.seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signum)
            code = process.wait()
        if code == 0:
            if fresh:  # the first run may have made the data, so it took longer
                self.seconds = min(self.seconds, time.monotonic() - begin)
            self.finished()
        elif code in (-signum, Exit.TERMINATED):
            self.ends[signum.name] += 1
            self.look()
        else:
            self.losses.append(f"exit code {code}")

    def look(self):
        """After a kill: every checkpoint is readable, and none is older than before."""
        newest, problems = seen(self.run)
        self.losses += problems
        for stage, nimg in self.before.items():
            if newest.get(stage, 0) < nimg:
                self.losses.append(
                    f"{stage}: {newest.get(stage, 0)} images seen, {nimg} before"
                )
        self.before = newest

    def finished(self):
        """Compare with the uninterrupted run, and remove the folder."""
        self.ends["finished"] += 1
        found = result(self.run)
        names = [k for k in {**self.wanted, **found} if found.get(k) != self.wanted.get(k)]
        self.losses += [f"{name} differs from the uninterrupted run's" for name in names]
        self.losses += [f"{p} remains" for p in self.run.rglob("*") if "tmp" in p.name]
        self.losses += [f"{p} was damaged" for p in self.run.rglob("*.damaged-*")]
        if not names:
            shutil.rmtree(self.run)
        else:  # keep it for inspection
            self.run.rename(self.run.with_name(f"differs-{self.ends['finished']}"))
        self.before = {}


def main():
    folder = Path(ARGUMENTS.out)
    if folder.exists():
        raise UserError(Exit.BUSY, f"{folder} exists; remove it or choose another --out")
    folder.mkdir(parents=True)
    soak = Soak(folder, OPTIONS, ARGUMENTS.seed)
    messages.say(f"an uninterrupted run takes {soak.seconds:.0f} s")
    for _ in messages.progress(range(ARGUMENTS.cycles), total=ARGUMENTS.cycles, label="cycles"):
        soak.cycle()
    if code := start(soak.run, OPTIONS).wait():  # finish the last run
        soak.losses.append(f"exit code {code}")
    else:
        soak.finished()
    for loss in soak.losses:
        messages.say(f"lost: {loss}")
    messages.say(
        f"{ARGUMENTS.cycles} cycles: {soak.ends['SIGKILL']} killed, {soak.ends['SIGTERM']} "
        f"terminated; {soak.ends['finished']} results compared; {len(soak.losses)} losses"
    )
    if soak.losses:
        raise UserError(Exit.BUG, f"something was lost: see {folder}")


if __name__ == "__main__":
    endings.run_script(main)
