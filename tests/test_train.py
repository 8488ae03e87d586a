"""Training stops anywhere and continues to the same bits; its files survive damage."""

import copy
import csv
import itertools
import math
import multiprocessing
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metrics
import modules
import runtime
import train
from config import PRESETS, Config, Exit, UserError
from dataset import BrainSlices, Data

TINY = Config(
    codes=16, code_dim=8, widths=(4, 4, 4, 4), batch_size=4, vqvae_kimg=0.052,
    gan_widths=(16, 4), gan_batch_size=4, gan_kimg=0.052, penalty_every=4, samples=8,
    ema_kimg=0.02, decoder_kimg=0.052, denoiser_kimg=0.052, device="cpu",
    decoder_widths=(6, 5),
)  # fmt: skip
STEPS = 13  # of each training stage


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
    return Data(*parts, images, "fingerprint", False, "stamp", {})


class StopAfter:
    """In place of `runtime.Signals`: a signal that comes after so many steps."""

    def __init__(self, steps: float = math.inf):
        self.steps = steps

    def check(self, save):
        self.steps -= 1
        if self.steps <= 0:
            save()
            raise runtime.Interrupted(15)


def a_run(folder, data, stop=math.inf, config=TINY, seed=0) -> train.Run:
    run = train.open_seed(folder, config, seed, data)
    run.signals = StopAfter(stop)
    return run


def train_all(run):
    for stage in train.STAGES.values():
        stage(run)


def final_state(run) -> dict:
    """Everything that continuation must reproduce, times aside."""
    state = {}
    stages = ("vqvae", "decoder", "dcgan", "denoiser")
    for name in ("codes", *(f"{s}_{w}" for s in stages for w in ("last", "best"))):
        values = torch.load(run.path(f"{name}.pt"), "cpu", weights_only=True)
        times = "seconds", "row_seconds"
        for key in (*times, "vqvae", "codes", "dcgan"):  # the last are checksums over times
            values.pop(key, None)
        state |= {f"{name}.{key}": value for key, value in runtime._tensors(values)}
    state["codes.npy"] = torch.from_numpy(np.load(run.path("codes.npy")).astype(int))
    with open(run.path("log.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file)]
    for row in rows:
        del row["seconds"], row["images_per_s"]
    state["rows"] = rows
    return state


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
def uninterrupted(data, tmp_path_factory):
    run = a_run(tmp_path_factory.mktemp("whole"), data)
    train_all(run)
    return run


@pytest.fixture(scope="module")
def expected(uninterrupted):
    return final_state(uninterrupted)


# Step 1, mid-epoch, an epoch's end (24 slices, 4 a step), a stage's end; index maps ask once a
# batch of 64 slices, so 14 is within them. Then the same in stages 3, 4 and 5.
STOPS = [(1,), (5,), (6, 1), (13,), (14,)]
STOPS += [(15,), (19, 3), (27,), (28,), (32, 3), (39,), (41,), (46, 4), (53,)]


@pytest.mark.parametrize("stops", STOPS)
def test_continuing_gives_the_same_bits(stops, data, expected, tmp_path):
    for stop in stops:
        with pytest.raises(runtime.Interrupted):
            train_all(a_run(tmp_path, data, stop))
    run = a_run(tmp_path, data)
    train_all(run)
    assert differing(final_state(run), expected) == []


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    data, uninterrupted, tmp_path
):
    again, other = (a_run(tmp_path, data, seed=seed) for seed in (0, 1))
    for run in (again, other):
        train_all(run)
    best = (f"{stage}_best.pt" for stage in ("vqvae", "decoder", "dcgan", "denoiser"))
    for name in ("codes.npy", "codes.pt", *best):
        wanted = uninterrupted.path(name).read_bytes()
        assert again.path(name).read_bytes() == wanted, name
        assert other.path(name).read_bytes() != wanted, name


def train_until_killed(folder, data):
    train.CHECKPOINT_EVERY_S = 0
    train_all(a_run(folder, data))


@pytest.mark.slow
def test_30_kills_at_random_moments_lose_nothing(data, uninterrupted, expected, tmp_path):
    # A server without torch's threads forks the processes: they compute as this one does.
    server, draw, seen = multiprocessing.get_context("forkserver"), random.Random(0), set()
    server.set_forkserver_preload(["train"])
    for kill in range(30):
        process = server.Process(target=train_until_killed, args=(tmp_path, data))
        process.start()
        process.join(timeout=draw.uniform(0.3, 3.0))
        process.kill()
        process.join()
        with runtime.writing_alone(tmp_path):  # as the next start does
            assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name]
        for path in tmp_path.rglob("*.pt"):
            seen.add((path.name, runtime.load_checkpoint(path).get("nimg")))
        if kill == 24:  # by now it may be done: once more from the start
            assert ("denoiser_last.pt", STEPS * 4) in seen or len(seen) > 5
            shutil.rmtree(tmp_path / "seed-0")
    run = a_run(tmp_path, data)
    train_all(run)
    assert differing(final_state(run), expected) == [] and len(seen) > 10


def tampered(tmp_path, data, name: str, change) -> dict:
    """The final state after stage `name` was stopped, its checkpoint changed, and continued."""
    place = ("vqvae", "decoder", "dcgan", "denoiser").index(name)
    stop = 5 + place * STEPS + (place > 0)
    with pytest.raises(runtime.Interrupted):
        train_all(a_run(tmp_path, data, stop))
    path = tmp_path / "seed-0" / f"{name}_last.pt"
    values = runtime.load_checkpoint(path)
    change(values)
    runtime.save_checkpoint(path, values)
    run = a_run(tmp_path, data)
    train_all(run)
    return final_state(run)


def forget_optimizers(values):
    for name, part in values["parts"].items():
        if "state" in part and "param_groups" in part:
            part["state"] = {}
            assert name in ("optimizer", "G_optimizer", "D_optimizer", "D_adam", "muon")


def forget_position(values):
    values["nimg"] -= 4


def forget_codebook_sums(values):
    values["parts"]["model"]["quantizer.sum"].mul_(1.01)


def forget_average(values):
    parts = values["parts"]
    network = next(name for name in ("decoder", "G", "denoiser") if name in parts)
    parts["average"] = dict(parts[network])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vqvae", forget_optimizers), ("dcgan", forget_optimizers),
        ("vqvae", forget_position), ("dcgan", forget_position),
        ("vqvae", forget_codebook_sums), ("dcgan", forget_average),
        ("denoiser", forget_optimizers), ("denoiser", forget_position),
        ("denoiser", forget_average), ("decoder", forget_optimizers),
        ("decoder", forget_position), ("decoder", forget_average),
    ],
)  # fmt: skip
def test_the_comparison_sees_what_a_checkpoint_lacks(name, change, data, expected, tmp_path):
    assert differing(tampered(tmp_path, data, name, change), expected)


def test_the_comparison_sees_another_random_sequence(data, expected, tmp_path, monkeypatch):
    with pytest.raises(runtime.Interrupted):
        train_all(a_run(tmp_path, data, 5))
    real = modules.generator_of
    monkeypatch.setattr(train, "generator_of", lambda *path: real(*path, 1))
    run = a_run(tmp_path, data)
    train_all(run)
    assert differing(final_state(run), expected)


def test_training_learns(uninterrupted, expected):
    losses = [float(r["loss"]) for r in expected["rows"] if r["stage"] == "vqvae"]
    assert losses[-1] < 0.9 * losses[0]
    # 13 steps of 4 channels still snap to few codes: what is asked is whether the generator's
    # own output follows its noise; that the logged number sees a collapse is the next test.
    gan = train.Gan(uninterrupted)
    gan.G.load_state_dict(
        torch.load(uninterrupted.path("dcgan_last.pt"), weights_only=True)["parts"]["G"]
    )
    u = gan.G.eval()(torch.randn(8, TINY.noise_dim), torch.full((8,), 0.5))
    assert train.mean_distance(u.detach()) > 0


def test_diversity_is_1_for_real_maps_and_0_after_a_collapse(uninterrupted, monkeypatch):
    gan = train.Gan(uninterrupted)
    monitor = train.Monitor(gan)
    rows = uninterrupted.data.train.rows[train.evenly(len(uninterrupted.data.train), 64)]
    real = gan.real_maps(rows)

    class Stage:
        done, step, every = False, 1, 1  # a row without a validation FD

    for maps, diversity in ((real, 1.0), (real[:1].repeat(len(real), 1, 1), 0.0)):
        monkeypatch.setattr(modules, "draw", lambda *a, maps=maps, **k: (maps, None))
        assert monitor.measure(Stage)["diversity"] == pytest.approx(diversity, abs=1e-5)


def test_samples_get_the_strength_of_detail_of_reconstructions(uninterrupted, monkeypatch):
    gan, asked = train.Gan(uninterrupted), []
    contrast = train.Contrast(gan, train.last_vqvae(gan))

    def draw(generator, code_map, vqvae, noise, level, denoiser, autocast):
        asked.append((level, denoiser))
        edges = torch.zeros(4, 1, 64, 64)
        edges[..., ::8] = 0.1 + generator.contrast  # stronger edges with more contrast
        return None, edges

    gan.average.contrast.fill_(0.13)
    wanted = metrics.detail_strength(draw(gan.average, *[None] * 6)[1]).mean().item()
    monkeypatch.setattr(modules, "draw", draw)
    for detail, gain in ((wanted, 0.13), (1.0, contrast.MOST), (0.0, 0.0)):
        contrast.wanted = detail
        contrast.fit(gan.average, "denoiser")
        assert gan.average.contrast.item() == pytest.approx(gain, abs=0.002)
    rows = train.evenly(len(uninterrupted.data.train), 128)
    assert torch.equal(asked[-1][0], gan.levels[rows]) and asked[-1][1] == "denoiser"


@pytest.mark.parametrize("denoised", [False, True])
def test_contrast_waits_for_the_denoiser_if_there_is_one(uninterrupted, monkeypatch, denoised):
    gan, kept = train.Gan(uninterrupted), []
    vqvae = train.last_vqvae(gan)  # its file is one of this run's settings
    monkeypatch.setattr(train, "last_vqvae", lambda gan: vqvae)
    config = replace(uninterrupted.config, denoiser_kimg=float(denoised))
    monkeypatch.setattr(gan, "run", replace(uninterrupted, config=config))
    monitor = train.Monitor(gan)
    assert (monitor.contrast is None) == denoised
    if not denoised:
        monitor.contrast.wanted = 1.0  # more than any sample has

    class Last:
        done, step, every = True, 1, 1

        def offer(score, alike, generator):
            kept.append(generator.state_dict()["contrast"].item())

    monitor.measure(Last)
    assert kept == [0.0 if denoised else pytest.approx(train.Contrast.MOST)]
    assert gan.G.contrast.item() == kept[0]


def test_the_denoiser_of_one_ordered_channel_sees_coordinates(tmp_path):
    config = replace(TINY, order="pc1", map_channels=1, decoder_kimg=0.0)
    run = a_run(tmp_path / "run", some_data(), config=config)
    train_all(run)
    best = torch.load(run.path("denoiser_best.pt"), weights_only=True)["denoiser"]
    codebook = train.trained_vqvae(run).quantizer.codebook
    counts = train.RealMaps(run).counts
    wanted = modules.CodeMap.fit(codebook, counts, "coordinates", Config.map_channels)
    torch.testing.assert_close(best["points"][wanted.used] * best["sd"], wanted.points)


def test_contrast_is_set_once_for_this_generator_and_denoiser(uninterrupted, monkeypatch):
    path = uninterrupted.path("denoiser_best.pt")
    before, values = path.read_bytes(), runtime.load_checkpoint(path)
    assert 0 <= values["contrast"] <= train.Contrast.MOST
    train.add_contrast(train.RealMaps(uninterrupted))
    assert path.read_bytes() == before
    fitted = []
    monkeypatch.setattr(train.Contrast, "fit", lambda self, *networks: fitted.append(networks))
    try:  # another generator: what was set is not its own
        runtime.save_checkpoint(path, values | {"dcgan": 7})
        train.add_contrast(train.RealMaps(uninterrupted))
        dcgan = runtime.checksum(uninterrupted.path("dcgan_best.pt"))
        assert len(fitted) == 1 and runtime.load_checkpoint(path)["dcgan"] == dcgan
    finally:
        path.write_bytes(before)


def test_a_finished_run_trains_nothing(uninterrupted, data, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.folder.glob("*.pt")}
    for stage in ("vqvae", "decoder", "dcgan", "denoiser"):
        monkeypatch.setattr(train, f"{stage}_step", lambda *_, **__: pytest.fail("a step"))
    train_all(a_run(uninterrupted.folder.parent, data))
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.folder.glob("*.pt")}


def test_weights_that_are_not_finite_reach_no_checkpoint(data, tmp_path):
    bad = torch.nn.Linear(3, 1)
    stage = train.Stage(a_run(tmp_path, data), "vqvae", 0.052, 4, {"model": bad})
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
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0)
    with pytest.raises(runtime.Interrupted):
        train_all(a_run(tmp_path, data, 5))
    cut(tmp_path / "seed-0" / "vqvae_last.pt")
    with pytest.raises(runtime.Interrupted):
        train_all(a_run(tmp_path, data, 1))
    error = capsys.readouterr().err
    assert "vqvae_last.pt" in error and "continuing from vqvae_prev.pt" in error
    assert len(list((tmp_path / "seed-0").glob("*.damaged-*"))) == 1


def test_without_a_usable_checkpoint_nothing_is_overwritten(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0)
    with pytest.raises(runtime.Interrupted):
        train_all(a_run(tmp_path, data, 5))
    files = [tmp_path / "seed-0" / f"vqvae_{name}.pt" for name in ("last", "prev")]
    for path in files:
        cut(path)
    before = [path.read_bytes() for path in files]
    with pytest.raises(UserError) as problem:
        train_all(a_run(tmp_path, data))
    assert problem.value.code == Exit.CHECKPOINT
    assert all(path.name in str(problem.value) for path in files)
    assert [path.read_bytes() for path in files] == before


def test_other_settings_do_not_continue_a_stage(data, tmp_path):
    with pytest.raises(runtime.Interrupted):
        train_all(a_run(tmp_path, data, 3))
    other = Config(**{**TINY.__dict__, "lr": 0.5})
    with pytest.raises(UserError, match=r"lr .*0\.5 here") as problem:
        train_all(a_run(tmp_path, data, config=other))
    assert problem.value.code == Exit.CHECKPOINT


@pytest.mark.parametrize("stage", ["vqvae", "decoder", "dcgan", "denoiser"])
def test_a_nan_ends_training_and_is_in_no_checkpoint(stage, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0)
    owner, function = {
        "vqvae": (train, "reconstruction_loss"), "dcgan": (train, "discriminator_loss"),
        "denoiser": (modules, "denoising_loss"), "decoder": (train, "judge_patches"),
    }[stage]  # fmt: skip
    real, calls = getattr(owner, function), []

    def poisoned(*arguments):
        value = real(*arguments)
        calls.extend([1] * torch.is_grad_enabled())  # a step, not a look at validation
        if len(calls) < 7:
            return value
        if stage == "decoder":
            return value | {"g_loss": value["g_loss"] * math.nan}
        return (value[0] * math.nan, *value[1:]) if stage == "dcgan" else value * math.nan

    monkeypatch.setattr(owner, function, poisoned)
    with pytest.raises(UserError) as problem:
        train_all(a_run(tmp_path, data))
    assert problem.value.code == Exit.DIVERGED
    assert stage in str(problem.value) and "step 7" in str(problem.value)
    last = runtime.load_checkpoint(tmp_path / "seed-0" / f"{stage}_last.pt")
    assert last["nimg"] == 6 * 4


def test_maps_are_made_anew_when_damaged(uninterrupted, data, capsys, tmp_path):
    run = a_run(tmp_path, data)
    train.train_vqvae(run)
    train.extract_codes(run)
    good = run.path("codes.npy").read_bytes()
    damaged = bytearray(good)
    damaged[-1] ^= 1
    run.path("codes.npy").write_bytes(damaged)
    train.extract_codes(run)
    assert run.path("codes.npy").read_bytes() == good


def test_index_maps_are_compact_and_counted_over_the_whole_split(uninterrupted, data):
    maps = np.load(uninterrupted.path("codes.npy"), mmap_mode="r")
    assert maps.dtype == np.uint16 and maps.shape == (48, 64, 64)
    counts = runtime.load_checkpoint(uninterrupted.path("codes.pt"))["counts"]
    for name, split in train.splits(uninterrupted):
        brute = np.bincount(maps[split.rows].ravel(), minlength=16)
        assert counts[name].tolist() == brute.tolist()


def test_an_order_visits_every_item_once_an_epoch_and_is_cut_anywhere():
    whole = train.order_of(3, train.ORDER, 10, 0, 35)
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert whole[:10].tolist() != whole[10:20].tolist()
    parts = [train.order_of(3, train.ORDER, 10, start, 7) for start in range(0, 35, 7)]
    assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize(("slices", "maps"), [(40, 30), (1, 1)])
def test_a_batch_larger_than_the_data_and_a_batch_of_one(slices, maps, data, tmp_path):
    config = Config(**{**TINY.__dict__, "batch_size": slices, "gan_batch_size": maps})
    train_all(a_run(tmp_path, data, config=config))


def test_a_collapsed_codebook_is_exit_6_with_a_clear_message(data, tmp_path, monkeypatch):
    run = a_run(tmp_path, data)
    train.train_vqvae(run)
    monkeypatch.setattr(
        modules.VQVAE, "encode", lambda model, x: torch.full((len(x), 64, 64), 3)
    )
    with pytest.raises(UserError, match="the codebook collapsed to one code") as problem:
        train.extract_codes(run)
    assert problem.value.code == Exit.DIVERGED and not run.path("codes.pt").exists()


@pytest.mark.parametrize("dead", [False, True])
def test_a_decoder_that_draws_black_slices_is_told(dead, data, tmp_path, capsys, monkeypatch):
    if dead:
        monkeypatch.setattr(
            modules.VQVAE,
            "decode",
            lambda model, indices: torch.zeros(len(indices), 1, 256, 256),
        )
    train.train_vqvae(a_run(tmp_path, data, config=replace(TINY, vqvae_kimg=0.8)))
    assert ("learned nothing" in capsys.readouterr().err) == dead


def test_the_best_changes_for_a_finite_better_score_only(data, tmp_path):
    model = torch.nn.Linear(1, 1)
    stage = train.Stage(a_run(tmp_path, data), "vqvae", 0.052, 4, {"model": model})
    kept = []
    for score in (math.nan, math.inf, 3.0, math.nan, 4.0, -math.inf, 2.0, 2.0):
        stage.offer(score, model=model)
        path = tmp_path / "seed-0/vqvae_best.pt"
        kept.append(runtime.load_checkpoint(path)["score"] if path.exists() else None)
    assert kept == [None, None, 3, 3, 3, 3, 2, 2]


def test_of_alike_scores_the_later_weights_are_kept_and_the_bar_stays(data, tmp_path):
    model, kept = torch.nn.Linear(1, 1), []
    stage = train.Stage(a_run(tmp_path, data), "dcgan", 0.052, 4, {"model": model})
    for score in (9.0, 2.0, 2.3, 2.5, 2.35, math.nan, 1.9, 2.27, 2.3):
        stage.offer(score, alike=1.2, model=model)
        kept.append(runtime.load_checkpoint(tmp_path / "seed-0/dcgan_best.pt")["score"])
    assert kept == [9, 2, 2.3, 2.3, 2.35, 2.35, 1.9, 2.27, 2.27]


def test_patches_are_told_apart_and_the_decoder_hears_what_they_lack(uninterrupted):
    """Slices beside blurred ones; the decoder's side of it leaves the discriminator alone."""
    draw = torch.Generator().manual_seed(0)
    decoding, losses = train.Decoding(uninterrupted, modules.make_vqvae(TINY)), []
    noise = torch.rand(4, 1, 128, 128, generator=draw)
    real = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    fake = torch.nn.functional.avg_pool2d(real, 3, 1, 1).requires_grad_()
    for step in range(30):
        values = train.judge_patches(decoding, real, fake, TINY, step % 4 == 0)
        losses.append(values["d_loss"].item())
    assert losses[-1] < 0.5 * losses[0], losses
    before = [p.grad.clone() for p in decoding.D.parameters()]
    values["g_loss"].backward()
    assert all(map(torch.equal, before, (p.grad for p in decoding.D.parameters())))
    lacking, asked = metrics.high_pass(real - fake).detach(), -fake.grad
    assert (lacking * asked).sum() > 0.1 * lacking.norm() * asked.norm()


def test_windows_lie_everywhere_in_the_box_and_are_decoded_as_in_the_whole():
    model = modules.make_vqvae(TINY, sharper=True).eval()
    maps, common = torch.randint(16, (2, 64, 64)), torch.zeros(64, 64).long()
    common[:, 16:56] = -1
    whole, draw, starts = model.decode_raw(maps), torch.Generator().manual_seed(0), set()
    box, margin = modules.Box(common), train.margin_of(TINY)
    for _ in range(200):
        window, cells, corner = train.window_of(whole, maps, box, TINY, draw)
        starts.add((window[1].start, window[2].start))
        assert maps[cells].shape == (2, 32 + 2 * margin, 32 + 2 * margin)
        found = train.window_at(model.decode_raw(maps[cells]), torch.tensor(corner))
        assert torch.allclose(found, whole[window], atol=1e-6 * whole.abs().max().item())
    assert {top for top, _ in starts} == set(range(0, 129, 4))
    assert {left for _, left in starts} == set(range(64, 97, 4))


def test_what_all_training_maps_share_is_found_and_no_other_map_counts(uninterrupted):
    maps = np.full((len(uninterrupted.data.images), 64, 64), 5, np.uint16)
    train_rows = uninterrupted.data.train.rows
    others = np.setdiff1d(np.arange(len(maps)), train_rows)
    maps[:, 3, 4] = 9  # in all, and another code than elsewhere
    maps[train_rows[-1], 20, 30] = maps[train_rows[0], 21, 31] = 65534
    maps[others, 50, 50] = 7
    expected = torch.full((64, 64), 5)
    expected[3, 4], expected[20, 30], expected[21, 31] = 9, -1, -1
    assert torch.equal(train.common_codes(maps, uninterrupted), expected)
    whole = replace(uninterrupted, config=replace(TINY, gan_loss="bce"))
    assert (train.common_codes(maps, whole) == -1).all()


def test_a_run_draws_the_box_of_its_own_maps(uninterrupted):
    maps = np.load(uninterrupted.path("codes.npy"))[uninterrupted.data.train.rows]
    box = train.RealMaps(uninterrupted).code_map.box
    same = torch.from_numpy((maps == maps[0]).all(0))
    assert torch.equal(box.common >= 0, same) and box.size < (64, 64)
    assert torch.equal(box.common[same], torch.from_numpy(maps[0].astype(np.int64))[same])


def test_stage_1_sees_no_more_than_heads(data, tmp_path, monkeypatch):
    run, seen = a_run(tmp_path, data), []

    def step(model, optimizer, config, variance, images, corner, quantize):
        seen.append(images.shape)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "vqvae_step", step)
    with pytest.raises(KeyboardInterrupt):
        train.train_vqvae(run)
    _, down, across = train.heads_in(data.train, run.config)
    sides = down.stop - down.start, across.stop - across.start
    assert seen == [(run.config.batch_size, 1, *sides)] and sides < (256, 256)


def test_crops_lie_everywhere_in_the_box(uninterrupted, monkeypatch):
    seen, common = [], torch.zeros(64, 64).long()
    common[5:60, 10:50] = -1  # rows 4 to 59
    places = torch.arange(64 * 64).view(1, 64, 64)
    real = SimpleNamespace(
        code_map=SimpleNamespace(box=modules.Box(common)), levels=torch.zeros(9),
        real_maps=lambda rows: places.expand(len(rows), -1, -1),
    )  # fmt: skip

    def loss(denoiser, maps, *others):
        seen.append(maps)
        return torch.zeros(len(maps), requires_grad=True)

    monkeypatch.setattr(modules, "denoising_loss", loss)
    denoiser = modules.make_denoiser(TINY)
    sgd = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    stage = SimpleNamespace(run=uninterrupted, batch_size=16, nimg=0)
    for stage.step in range(30):
        batch, start = train.denoiser_batch(denoiser, real, stage)
        train.denoiser_step(denoiser, sgd, TINY, *batch, start)
    rows, columns = torch.cat(seen) // 64, torch.cat(seen) % 64
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 59, 10, 49)
    assert (rows[:, :, :1] == rows).all() and (rows.diff(dim=1) == 1).all()
    assert (columns[:, :1] == columns).all() and (columns.diff(dim=2) == 1).all()


def test_slices_are_trained_on_where_heads_are():
    images = np.zeros((10, 256, 256), np.uint8)
    images[3, 40, 90] = images[4, 209, 60] = 1  # cells 10 to 52, and 15 to 22
    images[7] = 255  # of no training slice
    some = BrainSlices(images, range(5), ["s"] * 5, [np.nan] * 5)
    _, down, across = train.heads_in(some, TINY)
    assert (down, across) == (slice(28, 220), slice(12, 140))
    assert train.heads_in(some, replace(TINY, reconstruction="mse")) == (...,)
    images[4, 0, 255] = 1
    assert train.heads_in(some, TINY)[1:] == (slice(0, 224), slice(32, 256))


def test_what_lies_about_a_window_does_not_reach_it():
    """The margin holds all cells that a pixel depends on, for each preset that trains so."""
    for preset, upsampling in itertools.product(("quick", "full"), ("nearest", "bilinear")):
        config = replace(Config(), **PRESETS[preset], upsampling=upsampling)
        model = modules.make_vqvae(config, sharper=True).eval()
        for block in model.decoder:  # whose last layers start at zero
            if isinstance(block, modules.ResidualBlock):
                torch.nn.init.normal_(block.conv2.weight, std=0.1)
        maps = torch.randint(config.codes, (1, 64, 64))
        whole, crop = model.decode_raw(maps), model.decode_raw(maps[:, 10:42, 10:42])
        margin = train.margin_of(config)
        for cells, alike in ((margin, True), (margin - 3, False)):
            edge, inside = 4 * cells, slice(4 * (10 + cells), 4 * (42 - cells))
            apart = crop[..., edge:-edge, edge:-edge] - whole[..., inside, inside]
            assert (apart.abs().max() < 1e-5 * whole.abs().max()) == alike, preset


def test_level_tables():
    levels = np.repeat(np.linspace(0, 1, 4, dtype=np.float32), 25)
    table = train.level_table(levels)
    assert sorted(set(table.tolist())) == sorted(set(levels.tolist()))
    assert train.level_table(np.array([0.5, np.nan], np.float32)).unique().tolist() == [0.5]
    assert train.level_table(np.array([np.nan], np.float32)).numel() == 0


def test_a_collapsed_run_can_be_ended(uninterrupted, tmp_path, monkeypatch):
    """Samples all alike: without the option training goes on, with it the end says why."""
    real_draw = modules.draw

    def alike(*arguments, **keywords):
        maps, images = real_draw(*arguments, **keywords)
        return maps[:1].expand_as(maps), images

    monkeypatch.setattr(modules, "draw", alike)
    for stop in (False, True):
        folder = tmp_path / f"{stop}"
        shutil.copytree(uninterrupted.folder, folder / "seed-0")
        for path in folder.glob("seed-0/dcgan_*"):
            path.unlink()
        run = a_run(folder, uninterrupted.data, config=replace(TINY, stop_collapsed=stop))
        if not stop:
            train.train_dcgan(run)
            continue
        with pytest.raises(UserError, match=r"collapsed: diversity 0.000 .* seed 0") as problem:
            train.train_dcgan(run)
        assert problem.value.code == Exit.DIVERGED
        last = run.log.rows()[-1]
        assert last["stage"] == "dcgan" and last["diversity"] == 0  # the log shows it
        assert 0.25 < last["nimg"] / 1000 / TINY.gan_kimg < 0.4  # not before, and not late


def test_rows_kept_on_a_device_are_the_rows_of_the_file(monkeypatch):
    draw = np.random.default_rng(0)
    array = draw.integers(0, 255, (3000, 4, 4)).astype(np.uint8)
    cpu = torch.device("cpu")
    read = train.Feed(array, cpu)
    monkeypatch.setattr(train, "free_memory", lambda device: 2 * array.nbytes)
    kept = train.Feed(array, cpu)
    assert read.kept is None and kept.kept.shape == array.shape
    rows = draw.integers(0, 3000, 50)
    assert torch.equal(kept[rows], read[rows]) and np.array_equal(kept[rows], array[rows])


class OtherDevice:
    """Stands for an autocast of a device that has none."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_a_step_asks_the_device_for_no_value(uninterrupted, monkeypatch):
    """On "meta", where tensors have no values, .item(), nonzero() and the like are errors.

    On a GPU each of them would stop the loop until the GPU has caught up.
    """
    monkeypatch.setattr(torch, "autocast", OtherDevice)
    monkeypatch.setattr(runtime, "autocast", OtherDevice)
    meta = torch.device("meta")
    run = copy.copy(uninterrupted)
    stage = train.Stage(run, "vqvae", TINY.vqvae_kimg, 4, {})
    stage.nimg = 0
    run.device = meta
    model = modules.make_vqvae(TINY).to(meta)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slices = train.Feed(run.data.train.images, meta)
    images = train.unit_range(slices[np.arange(4)])
    corner = train.corner_of(images, torch.Generator())
    values, _ = train.vqvae_step(model, optimizer, TINY, 1.0, images, corner, quantize=True)
    assert values["loss"].device == meta

    run.device = torch.device("cpu")
    gan = train.Gan(run)
    run.device = meta
    decoding = train.Decoding(run, model)
    decoding.optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    decoding.D_adam = torch.optim.SGD(decoding.D.parameters(), lr=0.1)
    for name in ("G", "D", "average", "code_map"):
        getattr(gan, name).to(meta)
    gan.maps = train.Feed(gan.maps.array, meta)
    gan.G_optimizer = torch.optim.SGD(gan.G.parameters(), lr=0.1)
    gan.D_optimizer = torch.optim.SGD(gan.D.parameters(), lr=0.1)
    for stage.nimg, penalise in ((0, True), (4, False)):
        batch = train.decoder_batch(gan, slices, stage)
        values = train.decoder_step(decoding, TINY, 1.0, *batch, penalise)
        assert values["g_loss"].device == meta
        values = train.dcgan_step(gan, *gan.batch(stage), penalise)
        train.update_average(gan.average, gan.G, 4, 4)
        assert values["g_loss"].device == meta
    denoiser = modules.make_denoiser(TINY).to(meta)
    adam = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    batch, start = train.denoiser_batch(denoiser, gan, stage)
    assert train.denoiser_step(denoiser, adam, TINY, *batch, start).device == meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        values["g_loss"].item()  # the control
