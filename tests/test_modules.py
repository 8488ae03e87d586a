"""The networks against brute force and closed forms."""

import copy
import math
from dataclasses import replace
from unittest import mock

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import modules
from config import PRESETS, Config
from modules import MAP, VQVAE, CodeMap, Crop, Generator, draw_maps, make_vqvae, noise_of
from scores.metrics import perplexity
from stages.decoder import PatchDiscriminator, ResidualBlock, make_sharper_vqvae, widen_decoder
from stages.denoiser import Denoiser, denoising_loss, grain_of, make_denoiser, place_features
from stages.losses import scaled_mse
from stages.stage import update_average
from support import device


@pytest.mark.parametrize("preset", ["quick", "long", "full"])
def test_initial_reconstructions_have_the_range_of_slices(preset):
    """Training does not recover from far brighter ones."""
    config = Config(**PRESETS[preset])
    slices = torch.rand(2, 1, 64, 64)
    for seed in range(3):
        torch.manual_seed(seed)
        pictures = make_vqvae(config)(slices, quantize=False)[0]
        assert 0.005 < pictures.std() < 1 and pictures.abs().max() < 5


# --- quantiser ----------------------------------------------------------------------------


def quantizer(learned_by="ema"):
    """A quantiser, its projection, and the encoder's output (2, 4, 5, 6), partly zero."""
    draw = torch.Generator().manual_seed(1)
    q = modules.Quantizer(16, 8, learned_by)
    q.replace(torch.arange(16), torch.randn(16, 8, generator=draw))
    projection = torch.nn.Conv2d(4, 8, 1)
    a = torch.randn(2, 4, 5, 6, generator=draw)
    a[0, :, 0], a[1, :, 2:] = 0.0, 0.0  # background
    return q, projection, a.requires_grad_()


@pytest.mark.parametrize("learned_by", ["loss", "ema"])
def test_the_quantiser_agrees_with_the_plain_one(learned_by):
    """Codes, both losses, and every gradient, those through the straight-through step too."""
    q, projection, a = quantizer(learned_by)
    twin = plain.Quantizer(*q.codebook.shape)
    twin.load_state_dict(q.state_dict())
    twin.codebook.requires_grad_()
    ours, z = q(a, projection), projection(a)
    embedding, indices, error, chosen = twin(z)  # both losses have the value of this error
    assert torch.equal(ours.indices.flatten(), indices)
    torch.testing.assert_close(ours.embedding, embedding)
    torch.testing.assert_close(ours.codebook_loss, error)
    torch.testing.assert_close(ours.commitment, error)
    torch.testing.assert_close(ours.counts, chosen.sum(0))
    torch.testing.assert_close(ours.errors.mean() / 8, error)
    pull, learners = torch.randn_like(embedding), [a, *projection.parameters()]
    for mine, theirs in (
        ((ours.embedding * pull).sum(), (embedding * pull).sum()),
        (ours.commitment, error),
    ):
        gradients = torch.autograd.grad(mine, learners, retain_graph=True)
        wanted = torch.autograd.grad(theirs, learners, retain_graph=True)
        torch.testing.assert_close(gradients, wanted)
    if learned_by == "loss":
        gradient = torch.autograd.grad(ours.codebook_loss, q.codebook, retain_graph=True)
        wanted = torch.autograd.grad(error, twin.codebook)
        torch.testing.assert_close(gradient, wanted)
        for loss, other_side in ((ours.codebook_loss, a), (ours.commitment, q.codebook)):
            assert torch.autograd.grad(loss, other_side, allow_unused=True) == (None,)


def test_the_search_agrees_with_cdist_on_more_vectors_than_one_part():
    """Except for ties: rounding differs, since the search leaves out |z|^2."""
    q, projection, _ = quantizer()
    a = torch.randn(10_000, 4)
    a[::3] = 0.0
    z = F.linear(a, projection.weight.flatten(1), projection.bias)
    brute = torch.cdist(z, q.codebook).argmin(1)
    assert (q.search(a, projection) == brute).float().mean() > 0.9999


def test_both_ways_to_sum_by_code_agree():
    rows, indices = torch.randn(300_000, 9), torch.randint(500, (300_000,))  # in three parts
    columns = (np.bincount(indices, column, 512) for column in rows.T.double())
    expected = torch.tensor(np.stack(list(columns), 1)).float()
    for function in (device.sums_by_index, device.sums_by_product):
        found = function(rows, indices, 512)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_code_that_is_never_used_stays_where_it_is():
    q, *_ = quantizer()
    before = q.codebook.clone()
    for _ in range(1000):
        q.update(torch.zeros(16), torch.zeros(16, 8), 0.9)
    torch.testing.assert_close(q.codebook, before)


def test_revival_sets_vector_sum_and_count_and_outlasts_the_next_update():
    q, projection, a = quantizer()
    q.codebook[3] = 1e3  # far from everything: never chosen
    q.count[3] = 0.0
    out = q(a, projection)
    draw = torch.Generator().manual_seed(0)
    assert q.revive(out.z, out.errors, 0.1, draw) == 1
    revived = q.codebook[3].clone()
    assert (out.z - revived).abs().amax(1).min() == 0
    assert q.count[3] == 1 and torch.equal(q.sum[3], revived)
    q.update(torch.zeros(16), torch.zeros(16, 8), 0.99)
    torch.testing.assert_close(q.codebook[3], revived)
    q.count.fill_(0.0)
    assert q.revive(out.z, torch.zeros(60), 0.1, draw) == 0  # nothing is badly coded
    errors = torch.zeros(60)
    errors[[7, 9]] = 1.0
    assert q.revive(out.z, errors, 0.1, draw) == 2
    pairs = torch.cdist(q.codebook[:2], out.z[[7, 9]])
    assert pairs.amin(0).max() == 0  # both, once each


# --- encoder and decoder ------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 5])
def test_the_doubling_kernel_is_upsampling_and_convolution(channels):
    conv = modules.UpsampleConv(8, channels, "nearest").double()
    x = torch.randn(2, 8, 7, 9, dtype=torch.double, requires_grad=True)
    found, wanted = conv(x), F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(y, (x, conv.weight), pull) for y in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_images_and_maps_are_processed_in_parts_without_loss():
    model, seen = VQVAE().requires_grad_(False), []
    x, maps = torch.rand(20, 1, 64, 64), torch.randint(512, (20, 16, 16))
    z = model.pre_vq(model.encoder(x)).permute(0, 2, 3, 1).flatten(0, 2)
    model.quantizer.codebook.copy_(z[::10])
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda _, inputs, out: seen.append(len(out)))
    found, images = model.encode(x), model.decode(maps)
    assert sum(seen) == 40 and max(seen) <= 16
    one_by_one = torch.cat([model.encode(part) for part in x.split(1)])
    assert (found == one_by_one).float().mean() > 0.999 and len(found.unique()) > 1
    torch.testing.assert_close(images, model.decode_raw(maps).clamp(0, 1))
    assert model.encode(x[:0]).shape == (0, 16, 16)  # a process may have an empty share
    assert model.decode(maps[:0]).shape == (0, 1, 64, 64)


def test_encode_and_decode_are_the_forward_pass_which_changes_nothing():
    model, x = VQVAE(), torch.rand(2, 1, 256, 256)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        output, quantized = model(x)
        assert torch.equal(model.encode(x), quantized.indices)
        torch.testing.assert_close(model.decode(quantized.indices), output.clamp(0, 1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_logit_of_the_patch_discriminator_is_about_30_by_30_pixels():
    discriminator = PatchDiscriminator(width=4).double()
    x = torch.rand(1, 1, 64, 64, dtype=torch.double, requires_grad=True)
    logits = discriminator(x)
    assert logits.shape == (1, 16, 16)
    logits[0, 8, 8].backward()
    middle = 4 * 8 + 1.5
    for places in x.grad[0, 0].nonzero().T:
        assert (places.min(), places.max()) == (middle - 14.5, middle + 14.5)


def test_the_loss_of_the_original_is_scaled_by_the_variance():
    x, y = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    found = scaled_mse(0.25)(x, y, None)
    assert found.item() == pytest.approx(4 * (x - y).square().mean().item())


# --- code map -----------------------------------------------------------------------------


def some_code_map(order="pc1", **given):
    draw = torch.Generator().manual_seed(0)
    codebook = torch.randn(40, 6, generator=draw) * torch.tensor([5.0, 1, 1, 1, 1, 1])
    counts = torch.randint(0, 4, (40,), generator=draw)
    return CodeMap.fit(codebook, counts, order, 3, **given), counts, codebook


@pytest.mark.parametrize("order", ["coordinates", "pc1", "raw"])
def test_index_to_gan_space_and_back_is_the_identity(order):
    code_map, counts, _ = some_code_map(order)
    used = counts.nonzero().flatten()
    maps = used[torch.randint(len(used), (3, 64, 64))]
    u = code_map.encode(maps)
    assert u.shape == (3, 3 if order == "coordinates" else 1, 64, 64)
    assert torch.equal(code_map.decode(u), maps)
    if order != "coordinates":
        assert u.abs().max() < 1
        jitter = (torch.rand(3, 1, 64, 64) * 2 - 1) * 0.999 / len(used)
        assert torch.equal(code_map.decode(u + jitter), maps)
        assert torch.equal(code_map.decode(u.expand(-1, 3, -1, -1)), maps)


def test_coordinates_keep_the_codebooks_metric_and_decode_to_the_nearest_code():
    code_map, counts, codebook = some_code_map("coordinates")
    weights = counts[code_map.used].numpy()
    covariance = np.cov(code_map.points.numpy().T, fweights=weights, ddof=0)
    original = np.cov(codebook[code_map.used].numpy().T, fweights=weights, ddof=0)
    variances = np.linalg.eigvalsh(original)[::-1][:3]  # one scale: their ratios stay
    np.testing.assert_allclose(covariance, np.diag(variances / variances[0]), atol=1e-5)
    assert (code_map.points[:, 0].diff() >= 0).all()
    assert torch.equal(some_code_map("pc1")[0].used, code_map.used)
    u = torch.randn(2, 3, 8, 8)
    cells = u.permute(0, 2, 3, 1).reshape(-1, 3)
    brute = code_map.used[torch.cdist(cells, code_map.points).argmin(1)]
    assert torch.equal(code_map.decode(u).flatten(), brute)


def test_stretched_bins_span_the_range_of_each_sample():
    """Inner codes move by less than a bin; the least and the greatest value are the ends."""
    code_map, counts, _ = some_code_map("raw", stretched=True)
    maps = counts.nonzero().flatten().repeat(4)[None, None]
    u = code_map.encode(maps)
    for scaled in (u, 0.1 * u + 0.3):
        back = code_map.decode(scaled)
        assert (code_map.rank[back] - code_map.rank[maps]).abs().max() <= 1
        assert back[0, 0, 0] == code_map.used[0] and back.max() == code_map.used[-1]
    both = torch.cat([u, 0.1 * u])
    assert torch.equal(*code_map.decode(both))


@given(
    st.integers(1, 30), st.sampled_from(["coordinates", "pc1", "raw"]), st.booleans(),
    st.floats(-10, 10, width=32), st.integers(0, 99),
)  # fmt: skip
@example(1, "raw", True, 10.0, 0)
@settings(max_examples=100, deadline=None)
def test_every_finite_generator_output_becomes_a_used_code(used, order, stretched, far, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(30, dtype=torch.long)
    counts[torch.randperm(30, generator=generator)[:used]] = 3
    codebook = torch.randn(30, 5, generator=generator)
    code_map = CodeMap.fit(codebook, counts, order, 2, stretched=stretched)
    u = torch.rand(1, 2, 3, 3, generator=generator) * 2 - 1
    u[0, :, 0] = torch.tensor([-1.0, 1.0, far])
    drawn = code_map.decode(u)
    assert (counts[drawn] > 0).all() and drawn.shape == (1, 3, 3)
    u[0, 1, 2, 2] = math.nan
    with pytest.raises(FloatingPointError):
        code_map.decode(u)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=20).filter(any), st.randoms())
@settings(max_examples=50, deadline=None)
def test_perplexity_is_from_1_to_the_used_codes_in_any_order(counts, draw):
    value, used = perplexity(torch.tensor(counts)), sum(map(bool, counts))
    assert 1 - 1e-9 <= value <= used + 1e-9
    assert perplexity(torch.tensor(counts).bool().long() * 7) == pytest.approx(used)
    draw.shuffle(counts)
    assert perplexity(torch.tensor(counts)) == pytest.approx(value)


@pytest.mark.parametrize(("dim", "channels"), [(6, 1), (2, 4)])
def test_any_number_of_coordinates_leads_back_to_the_index(dim, channels):
    codebook = torch.randn(20, dim, generator=torch.Generator().manual_seed(0))
    code_map = CodeMap.fit(codebook, torch.ones(20), "coordinates", channels)
    maps = torch.arange(20).view(1, 4, 5)
    u = code_map.encode(maps)
    assert u.shape == (1, channels, 4, 5) and not code_map.even
    assert torch.equal(code_map.decode(u), maps)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((5, 58), (10, 54), (3, 8, 56, 48)),
        ((0, 3), (61, 64), (0, 32, 32, 32)),  # at least 32 cells, and inside the map
        ((2, 63), (20, 52), (0, 20, 64, 32)),
        ((7, 7), (7, 7), (0, 0, 64, 64)),  # nothing is seen
    ],
)
def test_the_crop_holds_every_seen_cell_and_cut_and_paste_are_inverse(rows, columns, expected):
    seen = torch.zeros(MAP, MAP, dtype=torch.bool)
    seen[slice(*rows), slice(*columns)] = True
    crop = Crop.around(seen)
    assert crop == expected and crop.size == expected[2:]
    assert crop.cut(seen).sum() == seen.sum()
    inside = torch.randint(16, (3, *crop.size))
    pasted = crop.paste(inside, 11)
    assert pasted.shape == (3, MAP, MAP) and torch.equal(crop.cut(pasted), inside)
    outside = torch.ones(MAP, MAP, dtype=torch.bool)
    crop.cut(outside)[:] = False
    assert (pasted[:, outside] == 11).all()
    images = torch.rand(2, 1, 4 * MAP, 4 * MAP)
    top, left, height, width = (4 * n for n in crop)
    wanted = images[:, :, top : top + height, left : left + width]
    assert torch.equal(crop.cut(images, scale=4), wanted)


def saved_map(order="coordinates") -> dict:
    """What codes.pt holds of a code map."""
    code_map, counts, _ = some_code_map(order, crop=Crop(8, 0, 48, 40), background=11)
    levels = torch.linspace(0, 1, 8)
    return code_map.saved() | {"levels": levels, "counts": {"train": counts}}


@pytest.mark.parametrize("order", ["coordinates", "pc1", "raw"])
def test_a_saved_code_map_is_the_same_after_loading(order):
    values, config = saved_map(order), Config(codes=40, map_channels=3, order=order)
    loaded = CodeMap.from_saved(values, config)
    code_map, counts, _ = some_code_map(order)
    used = counts.nonzero().flatten()
    maps = used[torch.randint(len(used), (2, 8, 8))]
    assert torch.equal(loaded.encode(maps), code_map.encode(maps))
    assert torch.equal(loaded.decode(loaded.encode(maps)), maps)
    assert loaded.crop == (8, 0, 48, 40) and loaded.background == 11
    original = replace(config, recipe="original")
    assert CodeMap.from_saved(values, original).stretched and not loaded.stretched


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"crop": torch.tensor((20, 0, 48, 40))}, "crop"),  # beyond the map
        ({"crop": torch.tensor((0, 0, 0, 40))}, "crop"),
        ({"background": torch.tensor(40)}, "crop"),
        ({"used": torch.zeros(30).long()}, "codes"),
        ({"points": torch.randn(30, 2)}, "place"),
        ({"counts": {"train": torch.ones(39).long()}}, "histogram"),
        ({"levels": torch.tensor([0.5, 1.5])}, "levels"),
        ({"levels": torch.tensor([math.nan])}, "levels"),
    ],
)
def test_a_saved_code_map_that_does_not_fit_is_refused(changed, words):
    values = saved_map() | changed
    with pytest.raises(ValueError, match=words):
        CodeMap.from_saved(values, Config(codes=40, map_channels=3))


# --- DCGAN --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (56, 48), (40, 32)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_dcgan_shapes(batch_norm, size):
    G = Generator(100, 8, 3, batch_norm, True, size)
    D = modules.Discriminator(8, 3, batch_norm, size)
    noise, level = torch.randn(4, 100), torch.rand(4)
    u = G(noise, level)
    assert u.shape == (4, 3, *size) and u.abs().max() <= 1
    edges = torch.cat([u[..., 0], u[..., -1], u[..., 0, :], u[..., -1, :]], 2)
    assert edges.std(0).min() > 0  # every border cell is drawn
    v = u.detach().requires_grad_()
    scores = D(v, level)
    assert scores.shape == (4,)
    scores.sum().backward()
    assert (v.grad.abs().amax((0, 1)) > 0).all()


def test_a_generator_layer_is_a_transposed_convolution_cut_to_its_size():
    up = modules.UpTo(3, 2, (7, 6))
    whole, x = torch.nn.ConvTranspose2d(3, 2, 4, 2, 1), torch.randn(2, 3, 4, 3)
    whole.load_state_dict(up.state_dict())
    torch.testing.assert_close(up(x), whole(x)[:, :, :7, :6])


def widths_of(layers) -> list[int]:
    kinds = torch.nn.Conv2d | torch.nn.ConvTranspose2d
    return [layer.out_channels for layer in layers if isinstance(layer, kinds)]


def test_the_original_networks_have_the_papers_widths():
    G = Generator(100, 128, 3, classic=True, bounded=True)
    assert widths_of(G.layers) == [1024, 512, 256, 128, 3]
    D = modules.Discriminator(64, 3, batch_norm=True)
    assert widths_of(D.layers) == [64, 128, 256, 512, 1]


def test_an_unknown_level_gives_zero_features():
    features = modules.level_features(torch.tensor([0.0, 0.5, math.nan]))
    assert features.isfinite().all() and (features[2] == 0).all()
    assert not torch.equal(features[0], features[1])


def test_the_average_is_the_copy_of_a_network_with_a_half_life_in_images():
    network, average = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    network.weight.data.fill_(2.0)
    network.running_mean.fill_(8.0)
    network.num_batches_tracked.fill_(5)
    for _ in range(4):  # one half-life
        update_average(average, network, half_life=32, batch_size=8)
    torch.testing.assert_close(average.weight.data, torch.full((3,), 1.5))
    torch.testing.assert_close(average.running_mean, torch.full((3,), 4.0))
    assert average.num_batches_tracked == 0
    update_average(average, network, half_life=0, batch_size=8)
    torch.testing.assert_close(average.weight.data, network.weight.data)


# --- generation ---------------------------------------------------------------------------


SMALL = Crop(16, 8, 32, 32)


def test_batches_are_full_and_in_order():
    add, x = mock.Mock(wraps=torch.add), torch.arange(40.0)
    assert torch.equal(modules.in_full_batches(add, x, torch.ones(40)), x + 1)
    assert [len(call.args[0]) for call in add.call_args_list] == [modules.DRAW_BATCH] * 3


def test_a_map_has_the_background_around_the_crop():
    crop = Crop(8, 0, 48, 40)
    code_map, _, _ = some_code_map("coordinates", crop=crop, background=11)
    G = Generator(100, 8, 3, False, False, crop.size).eval()
    given = noise_of(range(2), 100, 3, torch.linspace(0, 1, 32))
    maps = draw_maps(G, code_map, *given)
    inside = modules.in_full_batches(lambda *noise: code_map.decode(G(*noise)), *given)
    assert torch.equal(crop.cut(maps), inside)
    crop.cut(maps)[:] = 11
    assert maps.shape == (2, MAP, MAP) and (maps == 11).all()


def fitted(points, shares) -> tuple[Denoiser, torch.Tensor]:
    """A denoiser whose odd codes have these points, and its coordinates of them (U, C) float64.

    Even codes were never used.
    """
    points, K = torch.as_tensor(points), 2 * len(points)
    used, counts = torch.arange(1, K, 2), torch.zeros(K).long()
    counts[used] = torch.tensor(shares)
    codebook = torch.full((K, 6), 7.0)
    codebook[used] = F.pad(points, (0, 6 - points.shape[1]))
    denoiser = Denoiser(K, 4)
    denoiser.fit(CodeMap.fit(codebook, counts, "coordinates", 4), counts)
    return denoiser, denoiser.points[used].double()


LEVELS = torch.full((3,), 0.5)
PLACES, SHARES = [[0.0, 1.0], [1.0, 0.0], [-2.0, 5.0], [0.1, 1.0]], [60, 25, 10, 5]


def test_the_denoiser_holds_the_principal_coordinates_of_codes():
    denoiser, places = fitted(PLACES, SHARES)
    share, points = torch.tensor(SHARES).double() / 100, torch.tensor(PLACES).double()
    assert places.shape == (4, 4) and places[:, 2:].abs().max() < 1e-6
    assert (share @ places).abs().max() < 1e-6
    assert (share @ places.square()).mean() == pytest.approx(1.0, rel=1e-6)
    apart = torch.cdist(points, points)
    scale = torch.cdist(places, places)[0, 1] / apart[0, 1]
    assert (torch.cdist(places, places) - scale * apart).abs().max() < 1e-5
    assert denoiser.points[::2].min() == Denoiser.FAR


@pytest.mark.parametrize("sigma", [0.1, 0.7, 4.0])
def test_an_untrained_denoiser_is_bayes_rule_without_neighbours(sigma):
    """The prior is the codes' shares, the likelihood that of Gaussian noise."""
    denoiser, places = fitted(PLACES, SHARES)
    share = torch.tensor(SHARES).double() / 100
    ranks = torch.multinomial(share.float(), 3 * 8 * 16, replacement=True).view(3, 8, 16)
    noise, sigma = torch.randn(3, 4, 8, 16), torch.full((3,), sigma)
    x = places[ranks].permute(0, 3, 1, 2) + sigma[0] * noise
    near = (x.permute(0, 2, 3, 1)[..., None, :] - places).square().sum(-1)  # (3, 8, 16, 4)
    posterior = (share.log() - near / (2 * sigma[0] ** 2)).softmax(-1)
    with torch.no_grad():
        found = denoiser(x.float(), sigma, LEVELS)
        loss = denoising_loss(denoiser, 2 * ranks + 1, noise, sigma, LEVELS, (1, 0))
    assert (found - (posterior @ places).permute(0, 3, 1, 2)).abs().max() < 1e-4
    surprise = -posterior.gather(-1, ranks[..., None])[..., 0].log()
    assert (loss - surprise[:, 1::2, ::2].mean((1, 2))).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("most", "steps", "wrong"),
    [(2.0, 4, 0.05), (2.0, 48, 0.005), (Denoiser.MOST, Denoiser.STEPS + 1, 0.05)],
)
def test_restoring_solves_the_equation_exactly_without_neighbours(most, steps, wrong):
    # On a line no cell overtakes another: each ends at the code of its own quantile.
    denoiser, places = fitted([[-1.0], [0.5], [2.0]], [50, 30, 20])
    denoiser.LEAST, denoiser.MOST, denoiser.STEPS, denoiser.KEPT = 0.1, most, steps, 0
    places, shares = places[:, 0], torch.tensor([0.5, 0.3, 0.2])
    ranks = torch.multinomial(shares, 8192, replacement=True).view(2, 64, 64)
    noise = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        found = denoiser.restore(denoiser.places(2 * ranks + 1), noise, LEVELS[:2])
    x = places[ranks] + most * noise[:, 0]
    quantile = (shares * torch.special.ndtr((x[..., None] - places) / most)).sum(-1)
    wanted = 2 * torch.bucketize(quantile, shares.cumsum(0)[:2]) + 1
    assert (found != wanted).float().mean() < wrong


def test_restoring_keeps_the_means_over_squares():
    denoiser, _ = fitted([[-1.0], [0.5], [2.0]], [50, 30, 20])
    coarse = torch.randn(2, 4, 8, 8)
    coarse[:, 1:] = 0  # on a line, as the codes
    made = F.interpolate(coarse, scale_factor=8, mode="bilinear")
    noise = torch.randn(made.shape)

    def likeness(kept: int) -> float:
        denoiser.KEPT = kept
        with torch.no_grad():
            found = denoiser.places(denoiser.restore(made, noise, LEVELS[:2]))
        means = [F.avg_pool2d(x[:, 0], 8).flatten() for x in (made, found)]
        return torch.corrcoef(torch.stack(means))[0, 1].item()

    assert likeness(Denoiser.KEPT) > 0.95 and likeness(0) < 0.8


def test_the_noise_of_restoring_is_white_and_a_smooth_function_of_z():
    z = F.normalize(torch.randn(3, 100))
    z[2] = z[0] + 0.01 * z[1]
    grain = grain_of(5 * z, 1, 64, 64)  # the length of z does not matter
    assert grain.std((1, 2, 3)).sub(1).abs().max() < 0.05
    next_to = (grain[:, :, 1:] * grain[:, :, :-1]).mean((1, 2, 3))
    assert next_to.abs().max() < 0.06  # of 4,032 pairs: 4 standard deviations
    assert (grain[0] - grain[2]).std() < 0.02 < 1 < (grain[0] - grain[1]).std()


def some_denoiser() -> Denoiser:
    """As if trained: its network changes the result."""
    code_map, counts, _ = some_code_map("coordinates")
    denoiser = Denoiser(len(counts), 3).eval()
    denoiser.fit(code_map, counts)
    with torch.no_grad():
        for layer in (denoiser.head, *(block.last for block in denoiser.blocks)):
            torch.nn.init.normal_(layer.weight, std=0.05)
    return denoiser


def test_a_denoised_cell_depends_on_the_whole_map():
    """By the mean of features over the map: convolutions do not reach this far."""
    denoiser, sigma, x = some_denoiser(), torch.tensor([2.0]), torch.randn(1, 3, 256, 16)
    other = x.clone()
    other[:, :, 248:] = 5.0
    for std, low, high in ((0.0, 0, 1e-5), (1.0, 1e-3, 1e3)):
        torch.nn.init.normal_(denoiser.mean.weight, std=std)
        with torch.no_grad():
            apart = [denoiser.features(y, sigma, LEVELS[:1])[:, :, :16] for y in (x, other)]
        assert low <= (apart[0] - apart[1]).abs().max() < high


def test_the_denoiser_is_told_noise_level_and_place():
    denoiser, sigma, x = some_denoiser(), torch.tensor([2.0]), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        asked = denoiser.features(x, sigma, LEVELS[:1])
        for told in ((3.0, 0.5), (2.0, 0.9), (2.0, math.nan)):
            found = denoiser.features(x, *torch.tensor(told).split(1))
            assert (found - asked).abs().max() > 1e-4
        denoiser.first.weight[:, 3:] = 0
        assert (denoiser.features(x, sigma, LEVELS[:1]) - asked).abs().max() > 1e-4


def test_places_differ():
    places = place_features(64, 48, "cpu")
    assert torch.pdist(places.flatten(1).T).min() > 0.01
    angle = torch.tensor(2 * math.pi * 7 / 64)  # second octave of row 7
    torch.testing.assert_close(places[1, 7], angle.cos().expand(48))


@pytest.mark.parametrize(
    ("order", "stretched"),
    [("coordinates", False), ("pc1", False), ("raw", False), ("raw", True)],
)
def test_samples_pass_through_the_denoiser(order, stretched):
    """Coordinates as the generator made them; of bins, those of the codes that they mean."""
    code_map, _, _ = some_code_map(order, stretched=stretched, crop=SMALL)
    denoiser, bounded = some_denoiser(), order != "coordinates"
    G = Generator(100, 8, 3, stretched, bounded, SMALL.size).eval()
    noise, level = noise_of(range(modules.DRAW_BATCH), 100, 3, torch.linspace(0, 1, 32))
    maps = draw_maps(G, code_map, noise, level, denoiser.restorer(code_map))
    alone = draw_maps(G, code_map, noise, level)
    with torch.no_grad():
        x = denoiser.places(SMALL.cut(alone)) if bounded else G(noise, level) / denoiser.sd
        told = level if G.conditional else torch.full_like(level, math.nan)
        restored = denoiser.restore(x, grain_of(noise, 3, *SMALL.size), told)
    assert torch.equal(SMALL.cut(maps), restored) and not torch.equal(maps, alone)


@pytest.mark.parametrize("denoised", [False, True])
def test_a_sample_does_not_depend_on_its_batch(denoised):
    code_map, _, _ = some_code_map(crop=SMALL)
    model = VQVAE(codes=40).eval().requires_grad_(False)
    G = Generator(100, 8, 1, False, True, SMALL.size).eval()
    restore = some_denoiser().restorer(code_map) if denoised else None

    def draw(noise, level):
        maps = draw_maps(G, code_map, noise, level, restore)
        return maps, modules.in_full_batches(model.decode, maps)

    noise, level = noise_of(range(20), 100, 3, torch.linspace(0, 1, 32))
    maps, images = draw(noise, level)
    for start, stop in ((0, 1), (5, 12), (15, 20)):
        again, pictures = draw(noise[start:stop], level[start:stop])
        assert torch.equal(again, maps[start:stop])
        assert torch.equal(pictures, images[start:stop])
    alone, _ = noise_of(range(17, 18), 100, 3, torch.linspace(0, 1, 32))
    assert torch.equal(alone[0], noise[17])


# --- sharper decoder ----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["improved", "original"])
def test_a_widened_decoder_draws_the_same_and_every_filter_can_learn(recipe):
    config = Config(codes=32, widths=(4, 4, 4, 6), recipe=recipe)
    model, maps = make_vqvae(config), torch.randint(32, (2, 16, 16))
    before = model.decode_raw(maps)
    wide = widen_decoder(model, config)
    now = wide.decode_raw(maps)
    assert torch.allclose(now, before, rtol=0, atol=1e-6 * before.abs().max().item())
    optimizer = torch.optim.SGD(wide.decoder.parameters(), lr=1e-3)
    for _ in range(2):  # what adds nothing yet hides what lies before it from the first step
        optimizer.zero_grad()
        wide.decode_raw(maps).square().sum().backward()
        optimizer.step()
    for name, weight in wide.decoder.named_parameters():
        assert weight.grad.flatten(1).any(1).all(), name  # every filter


def test_generators_are_functions_of_their_path():
    paths = [(0, 1), (1, 0), (0, 2), (0, 1, 1), (2**31 - 1, 1)]
    once, again = ([modules.generator_of(*p).initial_seed() for p in paths] for _ in range(2))
    assert once == again and len(set(once)) == len(paths)


def test_config_makes_the_networks_it_describes():
    config = Config(codes=32, code_dim=16, widths=(8, 4, 6, 5), decoder_widths=(9, 3))
    model = make_vqvae(config)
    assert model.quantizer.codebook.shape == (32, 16)
    assert widths_of(model.encoder) + widths_of(model.decoder) == [8, 4, 6, 5, 1]
    decoder = make_sharper_vqvae(config).decoder
    assert widths_of(decoder) == [9, 5, 1]  # at least as many as before
    assert sum(isinstance(m, ResidualBlock) for m in decoder) == config.residual_blocks == 2
    for drawn, seen in (({"map_channels": 3}, 3), ({"order": "pc1", "map_channels": 1}, 4)):
        assert make_denoiser(Config(**drawn)).channels == seen
