"""Training stops anywhere and resumes to the same bits; its checkpoints survive damage."""

import contextlib
import math
import multiprocessing
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import steps
import torch

import dataset
import modules
import train
from config import PRESETS, Config, Exit, UserError
from dataset import BrainSlices, Data
from modules import CodeMap, Crop
from scores import metrics
from stages import decoder as decoder_stage
from stages import denoiser as denoiser_stage
from stages import stage as stage_module
from stages.decoder import Decoding, decoder_batch, decoder_step, judge_patches
from stages.denoiser import Denoiser, denoiser_batch, denoiser_step, make_denoiser
from stages.index_maps import RealMaps, trained_vqvae
from stages.losses import structural_loss
from stages.stage import ORDER, Feed, Run, Stage, open_seed, order_of
from support import checkpoints, device, endings, runs
from support.files import Log
from support.muon import Muon

TINY = Config(
    codes=16, code_dim=8, widths=(4, 4, 4, 4), batch_size=4, vqvae_kimg=0.052, revive_every=3,
    revive_below=99.0, window_px=64, decoder_widths=(6, 5), decoder_kimg=0.052,
    gan_widths=(16, 4), gan_batch_size=4, gan_kimg=0.052, penalty_every=4, monitor_samples=16,
    ema_kimg=0.02, denoiser_kimg=0.052, denoiser_batch_size=4, samples=8, device="cpu",
    threads=1,  # another number rounds otherwise
)  # fmt: skip
STEPS = 13  # of each training stage
TRAINED = "vqvae", "decoder", "dcgan", "denoiser"
SLOW = pytest.mark.slow


def some_data(n: int = 48) -> Data:
    """Ellipses of random size: n slices of n / 4 subjects, split in half, quarter, quarter."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    a, b, grey = draw.uniform(0.4, 0.8, (3, n, 1, 1))
    inside = (x / a) ** 2 + (y / b) ** 2 < 1
    images = (255 * grey * inside * (0.8 + 0.2 * np.cos(9 * x * a))).astype(np.uint8)
    subjects = np.repeat([f"s{i}" for i in range(n // 4)], 4)
    levels = np.tile(np.linspace(0, 1, 4, dtype=np.float32), n // 4)
    parts = [
        BrainSlices(images, rows, subjects[rows], levels[rows])
        for rows in np.split(np.arange(n), [n // 2, 3 * n // 4])
    ]
    return Data(*parts, images, "fingerprint", "stamp", {})


class StopAfter:
    """In place of `endings.Signals`: a signal arrives after so many steps."""

    def __init__(self, steps: float = math.inf):
        self.steps = steps

    def check(self, save):
        self.steps -= 1
        if self.steps <= 0:
            save()
            raise endings.Interrupted(15)


def a_run(folder, data, stop=math.inf, config=TINY, seed=0) -> Run:
    run = open_seed(folder, config, seed, data)
    run.signals = StopAfter(stop)
    return run


def test_a_seed_keeps_its_number_of_threads_unless_told(tmp_path, data, monkeypatch):
    used, idle = [], iter((3, 1))
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(device, "idle_threads", lambda most: next(idle))
    free = replace(TINY, threads=0)
    for config in (free, free, replace(TINY, threads=2), free):
        open_seed(tmp_path, config, 0, data)
    open_seed(tmp_path, free, 1, data)  # another seed looks again
    assert used == [3, 3, 2, 2, 1]
    (tmp_path / "seed-1/config.json").write_text("{}")
    with pytest.raises(UserError, match="its contents do not fit"):
        open_seed(tmp_path, free, 1, data)


def train_all(run: Run) -> Run:
    for stage in train.STAGES.values():
        stage(run)
    return run


def interrupt(stage, folder, data, stop):
    """Run a stage, or `train_all`, until a signal arrives after so many steps."""
    with pytest.raises(endings.Interrupted):
        stage(a_run(folder, data, stop))


def state_of(run, name: str) -> dict:
    """All that a resumed stage must reproduce: checkpoints, index maps, rows, without times."""
    state = {}
    for file in ("codes",) if name == "codes" else (f"{name}_last", f"{name}_best"):
        values = torch.load(run.path(f"{file}.pt"), "cpu", weights_only=True)
        for key in ("seconds", "row_seconds"):
            values.pop(key, None)
        state |= {f"{file}.{key}": value for key, value in checkpoints._tensors(values)}
    if name == "codes":
        state["codes.npy"] = torch.from_numpy(np.load(run.path("codes.npy")).astype(int))
    rows = [row for row in Log(run.path("log.csv")).rows() if row["stage"] == name]
    times = "seconds", "images_per_s"
    state["rows"] = [{k: v for k, v in row.items() if k not in times} for row in rows]
    return state


def final_state(run) -> dict:
    return {f"{name}.{k}": v for name in train.STAGES for k, v in state_of(run, name).items()}


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    same = {
        k: torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k]
        for k, v in a.items()
    }
    return [k for k, equal in same.items() if not equal]


@pytest.fixture(scope="module")
def data():
    return some_data()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Run:
    """A run that was never interrupted. Tests copy what they change."""
    return train_all(a_run(tmp_path_factory.mktemp("whole"), data))


def without(whole: Run, folder, name: str):
    """Copy the run `whole` into `folder`, without the files of stage `name`."""
    seed = shutil.copytree(whole.folder, folder / "seed-0")
    for path in seed.glob("codes.*" if name == "codes" else f"{name}_*.pt"):
        path.unlink()


def lost_by_resuming(whole: Run, folder, name: str) -> list[str]:
    """What differs from the run `whole` after stage `name` went on to its end in `folder`."""
    run = a_run(folder, whole.data)
    train.STAGES[name](run)
    return differing(state_of(run, name), state_of(whole, name))


# --- exact resume -------------------------------------------------------------------------


# Mid-epoch; an epoch's end (24 slices, 4 a step) and again; step 1; the stage's end.
@pytest.mark.parametrize(
    "stops", [(5,), (6, 1), pytest.param((1,), marks=SLOW), pytest.param((13,), marks=SLOW)]
)
@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_stage_ends_at_the_same_bits(name, stops, whole, tmp_path):
    without(whole, tmp_path, name)
    for stop in stops:
        interrupt(train.STAGES[name], tmp_path, whole.data, stop)
    assert lost_by_resuming(whole, tmp_path, name) == []


def test_a_run_stopped_in_every_stage_and_between_them_ends_at_the_same_bytes(whole, tmp_path):
    """The third stop is within the index maps, the second and sixth at the end of a stage."""
    for stop in (6, 7, 1, 6, 8, 13, 4):
        interrupt(train_all, tmp_path, whole.data, stop)
    run = train_all(a_run(tmp_path, whole.data))
    assert differing(final_state(run), final_state(whole)) == []
    for name in ("codes.npy", "codes.pt", *(f"{stage}_best.pt" for stage in TRAINED)):
        assert run.path(name).read_bytes() == whole.path(name).read_bytes(), name


@pytest.mark.slow
def test_another_seed_gives_other_weights_and_maps(whole, tmp_path):
    other = train_all(a_run(tmp_path, whole.data, seed=1))
    for name in ("codes.npy", "codes.pt", *(f"{stage}_best.pt" for stage in TRAINED)):
        assert other.path(name).read_bytes() != whole.path(name).read_bytes(), name


def train_until_killed(folder, data):
    stage_module.CHECKPOINT_EVERY_S = 0
    train_all(a_run(folder, data))


@pytest.mark.slow
def test_30_kills_at_random_moments_lose_nothing(whole, data, tmp_path):
    # A server without torch's threads forks the processes: they compute as this one does.
    server, draw, seen = multiprocessing.get_context("forkserver"), random.Random(0), set()
    server.set_forkserver_preload(["train", "torch._dynamo"])  # optimizers import it, slowly
    for kill in range(30):
        process = server.Process(target=train_until_killed, args=(tmp_path, data))
        process.start()
        process.join(timeout=draw.uniform(0.3, 3.0))
        process.kill()
        process.join()
        with runs.writing_alone(tmp_path):  # as the next start does
            assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name]
        for path in tmp_path.rglob("*.pt"):
            seen.add((path.name, checkpoints.load_checkpoint(path).get("nimg")))
        if kill == 24:  # it may be finished by now: once more from the start
            assert ("denoiser_last.pt", STEPS * 4) in seen or len(seen) > 5
            shutil.rmtree(tmp_path / "seed-0")
    run = train_all(a_run(tmp_path, data))
    assert differing(final_state(run), final_state(whole)) == [] and len(seen) > 10


def forget_optimizers(parts):
    for part in parts.values():
        if "param_groups" in part:
            part["state"] = {}


def forget_average(parts):
    parts["average"] = dict(next(iter(parts.values())))  # the network's own weights


def forget_codebook_sums(parts):
    parts["model"]["quantizer.sum"].mul_(1.01)


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, forget_optimizers) for name in TRAINED]
    + [(name, forget_average) for name in TRAINED[1:]]
    + [("vqvae", forget_codebook_sums)],
)
def test_the_comparison_finds_what_a_checkpoint_lacks(name, change, whole, tmp_path):
    """A negative control of the tests above."""
    without(whole, tmp_path, name)
    interrupt(train.STAGES[name], tmp_path, whole.data, 5)
    path = tmp_path / "seed-0" / f"{name}_last.pt"
    values = checkpoints.load_checkpoint(path)
    change(values["parts"])
    checkpoints.save_checkpoint(path, values)
    assert lost_by_resuming(whole, tmp_path, name)


@pytest.mark.parametrize("name", TRAINED)
def test_the_comparison_finds_another_random_sequence(name, whole, tmp_path, monkeypatch):
    without(whole, tmp_path, name)
    interrupt(train.STAGES[name], tmp_path, whole.data, 5)
    real = modules.generator_of
    for module in (train, decoder_stage, denoiser_stage):
        monkeypatch.setattr(module, "generator_of", lambda *path: real(*path, 1))
    assert lost_by_resuming(whole, tmp_path, name)


def test_a_finished_run_trains_nothing(whole, data, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in whole.folder.glob("*.pt")}
    for module in (train, decoder_stage, denoiser_stage):
        for name in [name for name in vars(module) if name.endswith("_step")]:
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a step"))
    train_all(a_run(whole.folder.parent, data))
    assert before == {p: p.stat().st_mtime_ns for p in whole.folder.glob("*.pt")}


# --- damage and divergence ----------------------------------------------------------------


def test_weights_that_are_not_finite_reach_no_checkpoint(data, tmp_path):
    bad = torch.nn.Linear(3, 1)
    stage = Stage(a_run(tmp_path, data), "vqvae", {"model": bad})
    stage.save()
    before = stage.last.read_bytes()
    with torch.no_grad():
        bad.weight[0, 1] = math.nan
    with pytest.raises(UserError, match=r"parts\.model\.weight is not finite") as problem:
        stage.save()
    assert problem.value.code == Exit.DIVERGED and stage.last.read_bytes() == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_cut_checkpoint_falls_back_to_the_one_before(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage_module, "CHECKPOINT_EVERY_S", 0)
    files = [tmp_path / "seed-0" / f"vqvae_{name}.pt" for name in ("last", "prev")]
    interrupt(train.train_vqvae, tmp_path, data, 5)
    cut(files[0])
    interrupt(train.train_vqvae, tmp_path, data, 1)
    error = capsys.readouterr().err
    assert "vqvae_last.pt" in error and "continuing from vqvae_prev.pt" in error
    assert len(list((tmp_path / "seed-0").glob("*.damaged-*"))) == 1
    interrupt(train.train_vqvae, tmp_path, data, 2)
    for path in files:
        cut(path)
    before = [path.read_bytes() for path in files]
    with pytest.raises(UserError) as problem:
        train.train_vqvae(a_run(tmp_path, data))
    assert problem.value.code == Exit.CHECKPOINT
    assert all(path.name in str(problem.value) for path in files)
    assert [path.read_bytes() for path in files] == before


def test_other_settings_do_not_resume_a_stage(whole):
    with pytest.raises(UserError, match=r"lr .*0\.5 here") as problem:
        train.train_vqvae(replace(whole, config=replace(TINY, lr=0.5)))
    assert problem.value.code == Exit.CHECKPOINT


@pytest.mark.parametrize(
    ("name", "owner", "loss", "each"),
    [
        ("decoder", modules, "relativistic_loss", 2),  # calls in a step
        ("dcgan", modules, "relativistic_loss", 2),
        ("denoiser", denoiser_stage, "denoising_loss", 1),
    ],
)
def test_a_nan_ends_training_and_is_in_no_checkpoint(
    name, owner, loss, each, whole, tmp_path, monkeypatch
):
    """The VQ-VAE's is in test_faults.py."""
    monkeypatch.setattr(stage_module, "CHECKPOINT_EVERY_S", 0)
    without(whole, tmp_path, name)
    real, calls = getattr(owner, loss), []

    def poisoned(*arguments, **options):
        calls.extend([1] * torch.is_grad_enabled())  # in a step, not in a validation
        return real(*arguments, **options) * (math.nan if len(calls) > 6 * each else 1)

    monkeypatch.setattr(owner, loss, poisoned)
    with pytest.raises(UserError, match=f"{name} .* step 7") as problem:
        train.STAGES[name](a_run(tmp_path, whole.data))
    assert problem.value.code == Exit.DIVERGED
    last = checkpoints.load_checkpoint(tmp_path / "seed-0" / f"{name}_last.pt")
    assert last["nimg"] == 6 * 4


def test_damaged_index_maps_are_made_again(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "seed-0")
    run = a_run(tmp_path, whole.data)
    good = run.path("codes.npy").read_bytes()
    run.path("codes.npy").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"another codes\.npy"):
        RealMaps(run)
    train.extract_codes(run)
    assert run.path("codes.npy").read_bytes() == good
    RealMaps(run)


def test_a_collapsed_codebook_is_exit_6_with_a_clear_message(whole, tmp_path, monkeypatch):
    without(whole, tmp_path, "codes")
    run = a_run(tmp_path, whole.data)
    monkeypatch.setattr(modules.VQVAE, "encode", lambda _, x: torch.full((len(x), 64, 64), 3))
    with pytest.raises(UserError, match="the codebook collapsed to one code") as problem:
        train.extract_codes(run)
    assert problem.value.code == Exit.DIVERGED and not run.path("codes.pt").exists()


@pytest.mark.parametrize(("best", "warned"), [(None, True), (-0.2, True), (-0.99, False)])
def test_a_vqvae_no_better_than_black_slices_is_a_warning(best, warned, data, capsys):
    train.warn_of_blanks(SimpleNamespace(best=best), data.validation.batch(range(4)))
    assert ("learned nothing" in capsys.readouterr().err) == warned


def test_samples_that_are_nearly_alike_are_one_warning(whole, tmp_path, monkeypatch, capsys):
    real = modules.draw_maps
    alike = lambda *given: (maps := real(*given))[:1].expand_as(maps)  # noqa: E731
    monkeypatch.setattr(modules, "draw_maps", alike)
    without(whole, tmp_path, "dcgan")
    run = a_run(tmp_path, whole.data)
    train.train_dcgan(run)
    said = capsys.readouterr().err
    assert said.count("the samples of seed 0 are nearly alike: diversity 0.000") == 1
    last = [row for row in run.log.rows() if row["stage"] == "dcgan"][-1]
    assert last["diversity"] == 0  # log.csv has it too


# --- a stage ------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_then_falls_as_a_cosine():
    schedule = stage_module.Schedule(1000, Config(warm_up=0.05))
    assert schedule.lr(2.0, 0) == pytest.approx(2.0 / 51)
    assert schedule.lr(2.0, 500) == pytest.approx(1.0)
    assert schedule.lr(2.0, 750) == pytest.approx(1 - math.sqrt(0.5))
    assert schedule.lr(2.0, 999) == pytest.approx(0.02)
    assert stage_module.Schedule(1000, Config(schedule="constant")).lr(2.0, 999) == 2.0


def test_measurements_are_due_as_often_as_said_and_at_the_end(data, tmp_path):
    config = replace(TINY, vqvae_kimg=1.6, log_rows=40)
    stage = Stage(a_run(tmp_path, data, config=config), "vqvae", {})
    due = []
    for step in range(1, 401):
        stage.nimg = 4 * step
        due += [step] * stage.due(10)
    assert stage.every == 10 and due == list(range(40, 401, 40))


@pytest.mark.parametrize(
    ("tolerance", "scores", "kept"),
    [
        ({}, (math.nan, math.inf, 3, math.nan, 4, -math.inf, 2, 2), [0, 0, 3, 3, 3, 3, 2, 2]),
        ({"tolerance": 1.2}, (9, 2, 2.3, 2.5, 1.9, 2.2, 2.3), [9, 2, 2.3, 2.3, 1.9, 2.2, 2.2]),
    ],
)
def test_the_best_is_the_latest_finite_score_within_the_tolerance_of_the_lowest(
    tolerance, scores, kept, data, tmp_path
):
    model, found, path = torch.nn.Linear(1, 1), [], tmp_path / "seed-0/vqvae_best.pt"
    stage = Stage(a_run(tmp_path, data), "vqvae", {"model": model})
    for score in scores:
        stage.offer(float(score), model=model, **tolerance)
        found.append(checkpoints.load_checkpoint(path)["score"] if path.exists() else 0)
    assert found == kept


def test_an_order_has_every_item_once_an_epoch_and_can_be_cut_anywhere():
    order = order_of(3, ORDER, 10, 0, 35)
    assert all(sorted(order[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert order[:10].tolist() != order[10:20].tolist()
    parts = [order_of(3, ORDER, 10, start, 7) for start in range(0, 35, 7)]
    assert np.concatenate(parts).tolist() == order.tolist()


def test_rows_kept_on_a_device_are_the_rows_of_the_file(monkeypatch):
    draw = np.random.default_rng(0)
    array = draw.integers(0, 255, (3000, 4, 4)).astype(np.uint8)
    read = Feed(array, steps.CPU)
    monkeypatch.setattr(device, "free_memory", lambda place: 2 * array.nbytes)
    kept = Feed(array, steps.CPU)
    assert read.kept is None and kept.kept.shape == array.shape
    rows = draw.integers(0, 3000, 50)
    assert torch.equal(kept[rows], read[rows]) and np.array_equal(kept[rows], array[rows])


@pytest.mark.parametrize(("slices", "maps"), [(40, 30), (1, 1)])
def test_a_batch_larger_than_the_data_and_a_batch_of_one(slices, maps, data, tmp_path):
    kimg = {f"{name}_kimg": 0.003 for name in ("vqvae", "decoder", "gan", "denoiser")}
    config = replace(TINY, batch_size=slices, gan_batch_size=maps, **kimg)
    train_all(a_run(tmp_path, data, config=config))


# --- VQ-VAE and index maps ----------------------------------------------------------------


def test_training_lowers_the_loss(whole):
    rows = [row for row in whole.log.rows() if row["stage"] == "vqvae"]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert sum(row["revived"] or 0 for row in rows) > 0  # so resuming was tested with revivals


def test_the_crop_holds_every_pixel_that_is_not_black():
    images = np.zeros((10, 256, 256), np.uint8)
    images[3, 40, 90] = images[4, 209, 60] = 1  # rows 9 to 53 and columns 14 to 23 of cells
    images[7] = 255  # not in the training split
    some = BrainSlices(images, range(5), ["s"] * 5, [np.nan] * 5)
    assert train.crop_of(some, TINY) == (7, 3, 48, 32)
    assert train.crop_of(some, replace(TINY, recipe="original")) == Crop()
    images[4, 0, 255] = 1
    assert train.crop_of(some, TINY) == (0, 8, 56, 56)


def test_outside_the_crop_all_training_maps_are_background(whole):
    maps = np.load(whole.path("codes.npy"))[whole.data.train.rows]
    code_map = RealMaps(whole).code_map
    assert code_map.crop.size < (64, 64)
    inside = code_map.crop.cut(torch.from_numpy(maps.astype(np.int64)))
    pasted = code_map.crop.paste(inside, code_map.background)
    assert np.array_equal(pasted.numpy(), maps)


def test_the_vqvae_trains_on_the_crop(data, tmp_path, monkeypatch):
    step = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(train, "vqvae_step", step)
    with pytest.raises(KeyboardInterrupt):
        train.train_vqvae(a_run(tmp_path, data))
    images = step.call_args.args[4]
    height, width = train.crop_of(data.train, TINY).size
    assert images.shape == (TINY.batch_size, 1, 4 * height, 4 * width) and height < 64


def test_codes_are_counted_over_each_split(whole, data):
    maps = np.load(whole.path("codes.npy"))
    counts = checkpoints.load_checkpoint(whole.path("codes.pt"))["counts"]
    for name in ("train", "validation", "test"):
        brute = np.bincount(maps[getattr(data, name).rows].ravel(), minlength=16)
        assert counts[name].tolist() == brute.tolist()


def test_level_tables():
    levels = np.repeat(np.linspace(0, 1, 4, dtype=np.float32), 25)
    table = train.level_table(levels)
    assert sorted(set(table.tolist())) == sorted(set(levels.tolist()))
    assert train.level_table(np.array([0.5, np.nan], np.float32)).unique().tolist() == [0.5]
    assert train.level_table(np.array([np.nan], np.float32)).numel() == 0


# --- DCGAN --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "chosen"), [("quick", "Gan"), ("full", "Gan"), ("classic", "OriginalGan")]
)
def test_the_classic_preset_trains_the_original_gan(preset, chosen):
    kinds = {name: mock.Mock(side_effect=KeyboardInterrupt) for name in ("Gan", "OriginalGan")}
    config = replace(Config(preset=preset), **PRESETS[preset])
    with mock.patch.multiple(train, **kinds), pytest.raises(KeyboardInterrupt):
        train.train_dcgan(SimpleNamespace(config=config))
    assert [name for name, kind in kinds.items() if kind.called] == [chosen]


def test_the_original_gan_has_batch_norm_and_bce_and_nothing_else():
    gan = steps.original_gan()
    gan.make_networks()
    assert gan.G_optimizer.defaults["betas"] == (0.5, 0.999)
    assert [type(m) for m in gan.D.modules()].count(torch.nn.BatchNorm2d) == 3
    stage = SimpleNamespace(run=gan.run, batch_size=8, nimg=0, step=0)
    real, level, noise = gan.batch(stage)
    assert real.shape == (8, 3, 64, 64) and torch.equal(real[:, 0], real[:, 2])
    assert len(real.unique()) <= 64  # bin middles, without jitter
    fake = gan.G(noise, level)
    loss, score, penalties = gan.discriminator_loss(real, fake, level, penalise=True)
    other = torch.rand_like(level)  # the level plays no part
    p, q = (torch.sigmoid(gan.D(u, other)) for u in (real, fake))
    torch.testing.assert_close(loss, -(p.log().mean() + (1 - q).log().mean()))
    torch.testing.assert_close(gan.G(noise, other), fake)
    wanted = -torch.sigmoid(score).log().mean()
    torch.testing.assert_close(gan.generator_loss(score, None), wanted)
    assert penalties == {}


def test_diversity_is_1_for_real_maps_and_0_after_a_collapse(whole, monkeypatch):
    gan = train.Gan(whole)
    monitor = train.Monitor(gan)
    rows = whole.data.train.rows[dataset.evenly(len(whole.data.train), 64)]
    real, stage = gan.real_maps(rows), SimpleNamespace(due=lambda times: False)
    for maps, diversity in ((real, 1.0), (real[:1].repeat(len(real), 1, 1), 0.0)):
        monkeypatch.setattr(modules, "draw_maps", lambda *given, maps=maps: maps)
        assert monitor.measure(stage)["diversity"] == pytest.approx(diversity, abs=1e-5)


# --- sharper decoder and denoiser ---------------------------------------------------------


def test_the_patch_discriminator_learns_and_asks_the_decoder_for_missing_detail(whole):
    """Slices against blurred ones. The decoder's loss does not move the discriminator."""
    draw = torch.Generator().manual_seed(0)
    decoding, losses = Decoding(whole, modules.make_vqvae(TINY)), []
    noise = torch.rand(4, 1, 64, 64, generator=draw)
    real = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    fake = torch.nn.functional.avg_pool2d(real, 3, 1, 1).requires_grad_()
    for step in range(30):
        values = judge_patches(decoding, real, fake, TINY, step % 4 == 0)
        losses.append(values["d_loss"].item())
    assert losses[-1] < 0.5 * losses[0], losses
    before = [p.grad.clone() for p in decoding.D.parameters()]
    values["g_loss"].backward()
    assert all(map(torch.equal, before, (p.grad for p in decoding.D.parameters())))
    lacking, asked = metrics.high_pass(real - fake).detach(), -fake.grad
    assert (lacking * asked).sum() > 0.1 * lacking.norm() * asked.norm()


PLACES, LEVELS = torch.arange(64 * 64).view(1, 64, 64), torch.rand(4096)
CROP = Crop(4, 10, 56, 40)


def real_of_places(crop: Crop) -> SimpleNamespace:
    """In place of `RealMaps`: each cell holds its own number."""
    return SimpleNamespace(
        code_map=SimpleNamespace(crop=crop),
        levels=LEVELS,
        real_maps=lambda rows: PLACES.expand(len(rows), -1, -1),
    )


def test_windows_of_the_decoder_lie_on_cells_everywhere_in_the_crop(whole):
    pixels = np.arange(256 * 256, dtype=np.int32).reshape(1, 256, 256)
    slices = Feed(np.broadcast_to(pixels, (48, 256, 256)).copy(), torch.device("cpu"))
    stage, starts = SimpleNamespace(run=whole, batch_size=4, nimg=0), set()
    for stage.step in range(300):
        images, maps, corner, noise = decoder_batch(real_of_places(CROP), slices, stage)
        assert images.shape == (4, 1, 64, 64) and noise.shape == (2, 4, 1, 64, 64)
        assert round(images[0, 0, 0, 0].item() * 255) == 256 * corner[0] + corner[1]
        starts.add(tuple(corner.tolist()))
    assert {top for top, _ in starts} == set(range(16, 16 + 161, 4))
    assert {left for _, left in starts} == set(range(40, 40 + 97, 4))
    assert maps.shape == (4, 64, 64)
    stage.run, edge = replace(whole, config=replace(TINY, window_px=61)), Crop(24, 24, 40, 40)
    for stage.step in range(100):  # the crop ends at the frame
        images, *_ = decoder_batch(real_of_places(edge), slices, stage)
        assert images.shape == (4, 1, 61, 61)


def test_the_denoiser_learns_from_the_crop_of_real_maps(whole):
    denoiser, starts = make_denoiser(TINY), set()
    stage = SimpleNamespace(run=whole, batch_size=16, nimg=0)
    for stage.step in range(30):
        batch, start = denoiser_batch(denoiser, real_of_places(CROP), stage)
        maps, noise, sigma, level = batch
        assert torch.equal(level, LEVELS[stage_module.batch_rows(stage)])
        assert maps.shape == (16, *CROP.size) and noise.shape == (16, 4, *CROP.size)
        assert (maps[:, 0, 0] == 64 * CROP.top + CROP.left).all()
        assert Denoiser.LEAST <= sigma.min() <= sigma.max() <= Denoiser.MOST
        starts.add(start)
    assert starts == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_after_a_binned_map_the_denoiser_uses_coordinates(tmp_path, data):
    kimg = {f"{name}_kimg": 0.012 for name in ("vqvae", "gan", "denoiser")}
    config = replace(TINY, order="pc1", map_channels=1, decoder_kimg=0.0, **kimg)
    run = train_all(a_run(tmp_path / "run", data, config=config))
    best = torch.load(run.path("denoiser_best.pt"), weights_only=True)["denoiser"]
    codebook = trained_vqvae(run).quantizer.codebook
    wanted = CodeMap.fit(codebook, RealMaps(run).counts, "coordinates", Config.map_channels)
    torch.testing.assert_close(best["points"][wanted.used] * best["sd"], wanted.points)


# --- no synchronisation -------------------------------------------------------------------


def test_a_step_reads_no_value_from_the_device(whole, monkeypatch):
    """On "meta", where tensors have no values, .item(), nonzero() and the like are errors.

    On a GPU each of them would wait until the GPU has finished.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)  # "meta" has none
    meta, muon = torch.device("meta"), lambda network: Muon(network, 0.01, (0.8, 0.9))
    gan, loss = train.Gan(whole), structural_loss(TINY)
    run = gan.run = replace(whole, device=meta)
    stage = SimpleNamespace(run=run, batch_size=4, nimg=0, step=0)
    model = modules.make_vqvae(TINY).to(meta)
    slices = Feed(run.data.train.images, meta)
    images = dataset.unit_range(slices[np.arange(4)])
    corner = torch.zeros(2, dtype=torch.long, device=meta)
    values, _ = train.vqvae_step(model, muon(model), TINY, loss, images, corner, True)
    assert values["loss"].device == meta

    decoding = Decoding(run, model)
    for name in ("G", "D", "average", "code_map"):
        getattr(gan, name).to(meta)
    gan.maps = Feed(gan.maps.array, meta)
    gan.G_optimizer, gan.D_optimizer = muon(gan.G), muon(gan.D)
    for stage.step, penalise in ((0, True), (1, False)):
        stage.nimg = 4 * stage.step
        batch = decoder_batch(gan, slices, stage)
        assert decoder_step(decoding, TINY, loss, *batch, penalise)["g_loss"].device == meta
        values = train.dcgan_step(gan, *gan.batch(stage), penalise)
        stage_module.update_average(gan.average, gan.G, 4, 4)
        assert values["g_loss"].device == meta
    denoiser = make_denoiser(TINY).to(meta)
    batch, start = denoiser_batch(denoiser, gan, stage)
    found = denoiser_step(denoiser, muon(denoiser), TINY, *batch, start=start)
    assert found.device == meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        values["g_loss"].item()  # the control
