"""What only a GPU shows: a recorded step is the step, and ends at the same bits each time.

Skipped where there is none.
"""

from dataclasses import replace

import pytest
import torch
from test_train import STEPS, TINY, a_run, differing, final_state, some_data, train_all

import train
from support import checkpoints, device, endings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CLASSIC = {
    "gan_loss": "bce", "order": "raw", "map_channels": 3,
    "reconstruction": "mse", "optimizer": "adam", "decoder_kimg": 0.0, "denoiser_kimg": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return some_data()


@pytest.fixture(scope="module", autouse=True)
def steps_enough_to_record():
    """With and without codes; called at first, and then recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PLAIN", 0.5)
        yield


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    """The end of a run whose steps were recorded."""
    run = a_run(tmp_path_factory.mktemp("recorded"), data, config=replace(TINY, device="cuda"))
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


def test_recorded_steps_end_at_the_bits_of_called_ones(recorded, data, tmp_path, monkeypatch):
    monkeypatch.setattr(device.Recorded, "WARM", STEPS)
    train_all(run := a_run(tmp_path, data, config=replace(TINY, device="cuda")))
    assert differing(final_state(run), recorded) == []


@pytest.mark.parametrize("stops", [(5,), (9, 2), (14,), (20, 4), (33,), (48,)])
def test_continuing_on_a_gpu_gives_the_same_bits(stops, recorded, data, tmp_path):
    config = replace(TINY, device="cuda")
    for stop in stops:
        with pytest.raises(endings.Interrupted):
            train_all(a_run(tmp_path, data, stop, config=config))
    run = a_run(tmp_path, data, config=config)
    train_all(run)
    assert differing(final_state(run), recorded) == []


def test_a_run_of_the_gpu_continues_on_the_cpu_and_back(data, tmp_path):
    for stop, device in ((4, "cuda"), (6, "cpu"), (18, "cuda"), (12, "cpu")):
        with pytest.raises(endings.Interrupted):
            train_all(a_run(tmp_path, data, stop, config=replace(TINY, device=device)))
    train_all(run := a_run(tmp_path, data, config=replace(TINY, device="cuda")))
    assert all(torch.isfinite(x).all() for x in final_state(run).values() if torch.is_tensor(x))


@pytest.mark.parametrize(
    ("codebook", "stages"), [("loss", ["vqvae"]), ("ema", ["vqvae", "codes", "dcgan"])]
)
def test_the_original_recipe_is_recorded_too(codebook, stages, data, tmp_path, monkeypatch):
    """Its codebook has not learned enough in these few steps for maps of more than one code."""
    config, ends = replace(TINY, device="cuda", codebook=codebook, **CLASSIC), []
    for warm in (device.Recorded.WARM, STEPS):
        monkeypatch.setattr(device.Recorded, "WARM", warm)
        run = a_run(tmp_path / str(warm), data, config=config)
        for stage in stages:
            train.STAGES[stage](run)
        parts = torch.load(run.path(f"{stages[-1]}_last.pt"), weights_only=True)["parts"]
        ends.append({k: torch.as_tensor(v) for k, v in checkpoints._tensors(parts)})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_record_has_values_of_its_own_for_other_plain_arguments():
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
