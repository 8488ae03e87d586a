"""What only a GPU shows: a captured step gives the same bits as a plain one, every time.

Skipped without a GPU.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import steps
import torch
from test_train import STEPS, TINY, a_run, differing, final_state, some_data, train_all

import train
from support import device, endings
from support.device import sums_by_index, window_at

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Enough steps before and after the codebook starts for capture.
CUDA = replace(TINY, device="cuda", codebook_delay=0.5)


@pytest.fixture(scope="module")
def data():
    return some_data()


@pytest.fixture(scope="module")
def captured(data, tmp_path_factory):
    """The final state of a run whose steps were captured."""
    run = a_run(tmp_path_factory.mktemp("captured"), data, config=CUDA)
    records, real = [], device.Recorded.record

    def record(self, inputs, given):
        records.append(given)
        return real(self, inputs, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.Recorded, "record", record)
        train_all(run)
    for given in ({"quantize": False}, {"quantize": True}, {"penalise": False}):
        assert given in records
    assert any("start" in given for given in records)
    return final_state(run)


def test_captured_steps_end_at_the_bits_of_plain_ones(captured, data, tmp_path, monkeypatch):
    monkeypatch.setattr(device.Recorded, "WARM", STEPS)
    train_all(run := a_run(tmp_path, data, config=CUDA))
    assert differing(final_state(run), captured) == []


@pytest.mark.parametrize("stops", [(5,), (9, 2), (14,), (20, 4), (33,), (48,)])
def test_resuming_on_a_gpu_gives_the_same_bits(stops, captured, data, tmp_path):
    for stop in stops:
        with pytest.raises(endings.Interrupted):
            train_all(a_run(tmp_path, data, stop, config=CUDA))
    train_all(run := a_run(tmp_path, data, config=CUDA))
    assert differing(final_state(run), captured) == []


def test_a_run_changes_between_gpu_and_cpu(data, tmp_path):
    for stop, place in ((4, "cuda"), (6, "cpu"), (18, "cuda"), (12, "cpu")):
        with pytest.raises(endings.Interrupted):
            train_all(a_run(tmp_path, data, stop, config=replace(CUDA, device=place)))
    train_all(run := a_run(tmp_path, data, config=CUDA))
    assert all(torch.isfinite(x).all() for x in final_state(run).values() if torch.is_tensor(x))


def test_the_original_gan_is_captured_too(monkeypatch):
    ends, stage = [], SimpleNamespace(batch_size=8)
    for warm in (device.Recorded.WARM, 20):
        monkeypatch.setattr(device.Recorded, "WARM", warm)
        gan = steps.original_gan()
        stage.run = gan.run
        batches = []
        for stage.step in range(12):
            stage.nimg = 8 * stage.step
            batches.append([x.cuda() for x in gan.batch(stage)])
        gan.run.device = torch.device("cuda")
        gan.make_networks()
        step = device.Recorded(functools.partial(train.dcgan_step, gan))
        for batch in batches:
            for optimizer in (gan.G_optimizer, gan.D_optimizer):
                device.set_lr(2e-4, optimizer)
            step(*batch, penalise=False)
        ends.append(steps.floats(G=gan.G, D=gan.D))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_each_set_of_plain_arguments_has_its_own_graph():
    weight = torch.zeros(3, device="cuda")

    def step(x, sign: int):
        weight.add_(x * sign)
        return {"sum": weight.sum()}

    recorded, expected = device.Recorded(step), 0.0
    for number in range(20):
        x, sign = torch.full((3,), float(number), device="cuda"), 1 - 2 * (number % 3 == 0)
        expected += 3 * number * sign
        assert recorded(x, sign=sign)["sum"].item() == expected
    assert len(recorded.records) == 2


def test_windows_and_sums_agree_with_those_of_the_cpu():
    images, corner = torch.rand(2, 1, 32, 40), torch.tensor([5, 9])
    found = window_at(images.cuda(), corner.cuda(), 16).cpu()
    assert torch.equal(found, window_at(images, corner, 16))
    rows, indices = torch.randn(1000, 9), torch.randint(16, (1000,))
    found = sums_by_index(rows.cuda(), indices.cuda(), 16).cpu()
    torch.testing.assert_close(found, sums_by_index(rows, indices, 16), rtol=1e-4, atol=1e-4)
