"""The networks against brute force and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import modules
from config import PRESETS, Config
from modules import (
    DRAW_BATCH,
    VQVAE,
    Box,
    CodeMap,
    Denoiser,
    Discriminator,
    FromOne,
    Generator,
    PatchDiscriminator,
    Quantizer,
    ResidualBlock,
    UpsampleConv,
    UpTo,
    architecture_rows,
    blank_margins,
    denoising_loss,
    draw,
    generator_of,
    gradient_penalty,
    grain_of,
    level_features,
    make_denoiser,
    make_vqvae,
    noise_of,
    perplexity,
    principal_coordinates,
    raise_contrast,
    relativistic_loss,
    widen_decoder,
)

SEED_TABLE = """
Conv2d + ReLU | 16 | 3 | 1 | 1 | (1 x 256 x 256) | (16 x 256 x 256)
Max2D Pool | - | 2 | - | - | (16 x 256 x 256) | (16 x 128 x 128)
Conv2d + ReLU | 8 | 3 | 1 | 1 | (16 x 128 x 128) | (8 x 128 x 128)
Max2D Pool | - | 2 | - | - | (8 x 128 x 128) | (8 x 64 x 64)
Pre_VQ Conv2d | 64 | 1 | 1 | 0 | (8 x 64 x 64) | (64 x 64 x 64)
Vector Quantized | - | - | - | - | (64 x 64 x 64) | (1 x 64 x 64)
Conv2d + ReLU | 8 | 3 | 1 | 1 | (1 x 64 x 64) | (8 x 64 x 64)
Upsampling | - | 2 | - | - | (8 x 64 x 64) | (8 x 128 x 128)
Conv2d + ReLU | 16 | 3 | 1 | 1 | (8 x 128 x 128) | (16 x 128 x 128)
Upsampling | - | 2 | - | - | (16 x 128 x 128) | (16 x 256 x 256)
Final Conv2d | 1 | 3 | 1 | 1 | (16 x 256 x 256) | (1 x 256 x 256)
"""


@pytest.mark.parametrize("preset", ["quick", "long", "full"])
def test_training_starts_with_pictures_of_the_range_of_slices(preset):
    """From far brighter ones no training recovers, and residual blocks add."""
    config = Config(**PRESETS[preset])
    draw = torch.Generator().manual_seed(0)
    slices = torch.rand(2, 1, 64, 64, generator=draw)
    for seed in range(3):
        torch.manual_seed(seed)
        pictures = make_vqvae(config)(slices, quantize=False)[0]
        assert 0.005 < pictures.std() < 1 and pictures.abs().max() < 5


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_the_architecture_is_the_original_table(upsampling):
    rows = [tuple(line.split(" | ")) for line in SEED_TABLE.strip().splitlines()]
    # One row differs by intent: the decoder reads the map's 64-channel embedding, not the map.
    at = next(i for i, row in enumerate(rows) if row[5] == "(1 x 64 x 64)")
    rows[at] = (*rows[at][:5], "(64 x 64 x 64)", rows[at][6])
    assert architecture_rows(VQVAE(upsampling=upsampling)) == rows


def quantizer(K=16, D=8, A=4, learned_by="ema"):
    draw = torch.Generator().manual_seed(1)
    q = Quantizer(K, D, learned_by)
    with torch.no_grad():
        q.codebook.copy_(torch.randn(K, D, generator=draw))
    projection = torch.nn.Conv2d(A, D, 1)
    a = torch.randn(2, A, 5, 6, generator=draw, requires_grad=True)
    return q, projection, a


def test_search_finds_the_nearest_code():
    q, projection, a = quantizer()
    z = projection(a).permute(0, 2, 3, 1).flatten(0, 2)
    brute = torch.cdist(z, q.codebook).argmin(1)
    assert torch.equal(q(a, projection).indices.flatten(), brute)


def test_search_is_exact_for_more_vectors_than_one_piece():
    q, projection, _ = quantizer()
    a = torch.randn(10_000, 4)
    weight, bias = projection.weight.flatten(1), projection.bias
    brute = torch.cdist(a @ weight.T + bias, q.codebook).argmin(1)
    assert (q.search(a, weight, bias) == brute).float().mean() > 0.9999


def test_search_finds_the_code_of_background_too():
    q, projection, a = quantizer()
    with torch.no_grad():
        a[0], a[1, :, 2:] = 0.0, 0.0
    z = projection(a).permute(0, 2, 3, 1).flatten(0, 2)
    brute = torch.cdist(z, q.codebook).argmin(1)
    assert torch.equal(q(a, projection).indices.flatten(), brute)


def test_straight_through_gives_the_decoder_codes_and_the_encoder_its_gradient():
    q, projection, a = quantizer()
    out = q(a, projection)
    codes = q.codebook[out.indices].permute(0, 3, 1, 2)
    torch.testing.assert_close(out.embedding, codes)
    pull, learners = torch.randn_like(codes), (a, *projection.parameters())
    gradients = torch.autograd.grad((out.embedding * pull).sum(), learners)
    direct = torch.autograd.grad((projection(a) * pull).sum(), learners)
    torch.testing.assert_close(gradients, direct)


def test_codebook_term_moves_codes_only():
    q, projection, a = quantizer(learned_by="loss")
    out = q(a, projection)
    assert torch.autograd.grad(out.codebook_loss, a, allow_unused=True) == (None,)
    (gradient,) = torch.autograd.grad(q(a, projection).codebook_loss, q.codebook)
    z = projection(a).permute(0, 2, 3, 1).flatten(0, 2)
    expected = torch.zeros_like(q.codebook)
    for vector, k in zip(z, out.indices.flatten(), strict=True):
        expected[k] += 2 * (q.codebook[k] - vector) / z.numel()
    torch.testing.assert_close(gradient, expected)


def test_commitment_term_moves_the_encoder_only():
    q, projection, a = quantizer(learned_by="loss")
    out = q(a, projection)
    z = projection(a).permute(0, 2, 3, 1)
    e = q.codebook[out.indices].detach()
    torch.testing.assert_close(out.commitment, F.mse_loss(z, e))
    learners = a, *projection.parameters()
    gradients = torch.autograd.grad(out.commitment, learners, retain_graph=True)
    expected = torch.autograd.grad(F.mse_loss(z, e), learners)
    torch.testing.assert_close(gradients, expected)
    assert torch.autograd.grad(out.commitment, q.codebook, allow_unused=True) == (None,)


def test_forward_changes_nothing():
    model = VQVAE()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.rand(2, 1, 256, 256))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_moving_averages_by_brute_force():
    q, projection, a = quantizer()
    out = q(a, projection)
    z = projection(a).permute(0, 2, 3, 1).flatten(0, 2).detach()
    expected = q.codebook.clone()
    for k in range(16):
        mine = z[out.indices.flatten() == k]
        count, total = 0.9 + 0.1 * len(mine), 0.9 * q.sum[k] + 0.1 * mine.sum(0)
        expected[k] = total / count
    q.update(out.counts, out.sums, 0.9)
    torch.testing.assert_close(q.codebook, expected)


def test_sums_by_code_are_the_same_by_products_as_by_adding():
    rows, indices = torch.randn(300_000, 9), torch.randint(500, (300_000,))  # in three parts
    expected = torch.zeros(512, 9).index_add_(0, indices, rows)
    assert torch.equal(modules.sums_by_code(rows, indices, 512), expected)
    found = modules.sums_by_product(rows, indices, 512)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_code_never_used_stays_where_it_is():
    q, *_ = quantizer()
    q.replace(torch.arange(16), q.codebook.clone())
    before = q.codebook.clone()
    for _ in range(1000):
        q.update(torch.zeros(16), torch.zeros(16, 8), 0.9)
    torch.testing.assert_close(q.codebook, before)


def test_revival_sets_vector_sum_and_count_and_survives_the_next_update():
    q, projection, a = quantizer()
    with torch.no_grad():
        q.codebook[3] = 1e3  # far from everything: never chosen
        q.count[3] = 0.0
    out = q(a, projection)
    draw = torch.Generator().manual_seed(0)
    assert q.revive(out.inputs, out.errors, projection, 0.1, draw) == 1
    revived = q.codebook[3].clone()
    vectors = projection(a).permute(0, 2, 3, 1).flatten(0, 2)
    assert (vectors - revived).abs().amax(1).min() < 1e-5
    assert q.count[3] == 1 and torch.equal(q.sum[3], revived)
    q.update(torch.zeros(16), torch.zeros(16, 8), 0.99)
    torch.testing.assert_close(q.codebook[3], revived)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_folded_upsampling_is_upsampling_and_convolution(channels, dtype):
    """As exact as numbers of 8, 4 and 2 bytes allow; gradients are sums of more."""
    conv = UpsampleConv(8, channels, "nearest").to(dtype)
    x = torch.randn(2, 8, 7, 9).to(dtype).requires_grad_()
    plain = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, padding=1)
    exact = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {}
    within = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 0.1}[dtype]
    near = {"atol": within, "rtol": within}
    torch.testing.assert_close(conv(x), plain, **(exact or near))
    pull = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad(y, (x, conv.weight), pull) for y in (conv(x), plain))
    torch.testing.assert_close(ours, theirs, **near)


def test_many_images_are_seen_a_few_at_a_time_and_none_is_lost():
    model, seen = VQVAE().requires_grad_(False), []
    x, maps = torch.rand(20, 1, 64, 64), torch.randint(512, (20, 16, 16))
    z = model.pre_vq(model.encoder(x)).permute(0, 2, 3, 1).flatten(0, 2)
    model.quantizer.codebook.copy_(z[::10])
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda _, inputs, out: seen.append(len(out)))
    found, images = model.encode(x), model.decode(maps)
    assert sum(seen) == 40 and max(seen) <= 16
    one_by_one = torch.cat([model.encode_some(part) for part in x.split(1)])
    assert (found == one_by_one).float().mean() > 0.999 and len(found.unique()) > 1
    torch.testing.assert_close(images, model.decode_raw(maps).clamp(0, 1))
    assert model.decode(maps[:0]).shape == (0, 1, 64, 64)


def test_pooling_before_relu_is_relu_before_pooling():
    model, x = VQVAE(), torch.rand(2, 1, 256, 256)
    conv1, _, _, conv2 = [m for m in model.encoder][:4]
    plain = F.max_pool2d(F.relu(conv2(F.max_pool2d(F.relu(conv1(x)), 2))), 2)
    torch.testing.assert_close(model.encoder(x), plain)


@pytest.mark.parametrize("rows", [(0, 64), (22, 41), (23, 42), (24, 43), (25, 44), (0, 1)])
@pytest.mark.parametrize("columns", [(0, 64), (30, 31), (63, 64)])
def test_the_encoder_of_the_box_is_that_of_the_whole_slice(rows, columns):
    """To 1e-5, gradients to 1e-4; and there is no smaller box."""
    torch.manual_seed(0)
    model, x = VQVAE(), torch.zeros(3, 1, 64, 64)
    x[2, :, slice(*rows), slice(*columns)] = 1
    x[1] = -x[2]
    x[1, :, : rows[0] + 1] = 0  # a smaller box
    x *= 0.1 + torch.rand(x.shape)
    weights = list(model.encoder.parameters())
    for sign in (1, -1):
        whole, part = model.encoder(sign * x), model.encoded(sign * x)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
        of_whole = torch.autograd.grad(whole.square().sum(), weights)
        of_part = torch.autograd.grad(part.square().sum(), weights)
        torch.testing.assert_close(of_part, of_whole, atol=1e-4, rtol=1e-4)

    for weight in weights:
        weight.data.abs_()  # what sees anything is then not 0
    seen = model.encoder(x.abs()).amax((0, 1)) > 0
    across, down = (seen.any(d).nonzero().flatten() for d in (0, 1))
    box = [across[0], 15 - across[-1], down[0], 15 - down[-1]]
    assert blank_margins(x) == blank_margins(-x) == box


def test_slices_that_are_all_0_have_no_margins():
    assert blank_margins(torch.zeros(2, 1, 64, 64)) == [0, 0, 0, 0]


def test_no_slices_are_no_maps_and_no_images():
    """What a process gets whose share of the last batch is empty."""
    model = VQVAE()
    maps = model.encode(torch.zeros(0, 1, 64, 64))
    assert maps.shape == (0, 16, 16) and model.decode(maps).shape == (0, 1, 64, 64)


def test_encode_and_decode_are_the_forward_pass():
    model, x = VQVAE().eval(), torch.rand(2, 1, 256, 256)
    with torch.no_grad():
        output, quantized = model(x)
        assert torch.equal(model.encode(x), quantized.indices)
        torch.testing.assert_close(model.decode(quantized.indices), output.clamp(0, 1))


def test_a_nan_in_the_encoder_is_no_picture():
    model = VQVAE()
    with torch.no_grad():
        model.encoder[0].weight[0, 0, 0, 0] = math.nan
        with pytest.raises(FloatingPointError):
            model.encode(torch.rand(1, 1, 256, 256))


def test_a_logit_of_the_patch_discriminator_is_about_30_by_30_pixels():
    discriminator = PatchDiscriminator(width=4).double()
    x = torch.rand(1, 1, 64, 64, dtype=torch.double, requires_grad=True)
    logits = discriminator(x)
    assert logits.shape == (1, 16, 16)
    logits[0, 8, 8].backward()
    middle = 4 * 8 + 1.5
    for places in x.grad[0, 0].nonzero().T:
        assert (places.min(), places.max()) == (middle - 14.5, middle + 14.5)


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)


# --- code map -----------------------------------------------------------------------------


def some_code_map(order="pc1", K=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    codebook = torch.randn(K, 6, generator=draw) * torch.tensor([5.0, 1, 1, 1, 1, 1])
    counts = torch.randint(0, 4, (K,), generator=draw)
    return CodeMap.fit(codebook, counts, order, 3), counts, codebook


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
    u = torch.randn(2, 3, 8, 8)
    cells = u.permute(0, 2, 3, 1).reshape(-1, 3)
    brute = code_map.used[torch.cdist(cells, code_map.points).argmin(1)]
    assert torch.equal(code_map.decode(u).flatten(), brute)


def test_stretched_binning_is_the_identity_on_a_map_of_all_used_codes():
    code_map, counts, _ = some_code_map("raw")
    maps = counts.nonzero().flatten().repeat(4)[None, None]
    # The stretched range runs from the first bin's middle to the last's: inner codes move by
    # less than one bin, the ends stay.
    u = code_map.encode(maps)
    back = code_map.decode(code_map.spread(u))
    assert (code_map.rank[back] - code_map.rank[maps]).abs().max() <= 1
    assert back[0, 0, 0] == code_map.used[0] and back.max() == code_map.used[-1]


def test_unused_codes_are_never_emitted():
    code_map, counts, _ = some_code_map()
    u = torch.linspace(-1, 1, 4096).view(1, 1, 64, 64)
    assert set(code_map.decode(u).unique().tolist()) == set(counts.nonzero().flatten().tolist())


@given(
    st.integers(1, 30), st.sampled_from(["coordinates", "pc1", "raw"]), st.booleans(),
    st.floats(-10, 10, width=32), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_whatever_a_generator_draws_becomes_a_used_code(used, order, stretch, far, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(30, dtype=torch.long)
    counts[torch.randperm(30, generator=generator)[:used]] = 3
    code_map = CodeMap.fit(torch.randn(30, 5, generator=generator), counts, order, 2)
    u = torch.rand(1, 2, 3, 3, generator=generator) * 2 - 1
    u[0, :, 0] = torch.tensor([-1.0, 1.0, far])
    bins = code_map.spread if stretch else lambda u: u
    drawn = code_map.decode(bins(u))
    assert (counts[drawn] > 0).all() and drawn.shape == (1, 3, 3)
    u[0, 1, 2, 2] = math.nan
    with pytest.raises(FloatingPointError):
        code_map.decode(bins(u))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=20).filter(any), st.randoms())
@settings(max_examples=50, deadline=None)
def test_perplexity_is_from_1_to_the_used_codes_in_any_order(counts, draw):
    value = perplexity(torch.tensor(counts))
    assert 1 - 1e-9 <= value <= sum(map(bool, counts)) + 1e-9
    draw.shuffle(counts)
    assert perplexity(torch.tensor(counts)) == pytest.approx(value)


def test_the_ends_of_tanh_fall_into_the_end_bins():
    code_map, _, _ = some_code_map()
    ends = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    assert code_map.decode(ends).flatten().tolist() == code_map.used[[0, -1]].tolist()


def test_a_single_used_code_and_a_nan():
    code_map = CodeMap(torch.tensor([7]), torch.zeros(1, 1), 16)
    assert (code_map.decode(code_map.spread(torch.rand(1, 1, 4, 4))) == 7).all()
    with pytest.raises(FloatingPointError):
        code_map.decode(torch.full((1, 1, 4, 4), math.nan))
    with pytest.raises(ValueError, match="not seen"):
        code_map.encode(torch.zeros(1, 4, 4, dtype=torch.long))


def test_codes_are_ordered_along_their_first_principal_component():
    code_map, _, codebook = some_code_map()
    along = codebook[code_map.used][:, 0]  # the axis of the largest variance, by construction
    rank_correlation = torch.corrcoef(
        torch.stack([along.argsort().argsort().float(), torch.arange(len(along)).float()])
    )[0, 1]
    assert abs(rank_correlation) > 0.95


def test_principal_coordinates_against_weighted_covariance():
    _, counts, codebook = some_code_map()
    used = counts.nonzero().flatten()
    y = principal_coordinates(codebook[used], counts[used], 6)
    weights = counts[used].numpy()
    covariance = np.cov(y.numpy().T, fweights=weights, ddof=0)
    original = np.cov(codebook[used].double().numpy().T, fweights=weights, ddof=0)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-12)
    np.testing.assert_allclose(np.diag(covariance), np.linalg.eigvalsh(original)[::-1])


@pytest.mark.parametrize(("dim", "channels"), [(6, 1), (2, 4)])
def test_coordinates_of_any_number_lead_back_to_the_index(dim, channels):
    codebook = torch.randn(20, dim, generator=torch.Generator().manual_seed(0))
    code_map = CodeMap.fit(codebook, torch.ones(20), "coordinates", channels)
    maps = torch.arange(20).view(1, 4, 5)
    u = code_map.encode(maps)
    assert u.shape == (1, channels, 4, 5) and not code_map.even
    assert torch.equal(code_map.decode(u), maps)


@pytest.mark.parametrize(
    "rows, columns, sides",
    [
        ((5, 58), (10, 54), (slice(3, 59), slice(8, 56))),
        ((0, 3), (61, 64), (slice(0, 32), slice(32, 64))),  # no shorter than a crop
        ((2, 63), (20, 52), (slice(0, 64), slice(20, 52))),
        ((7, 7), (7, 7), (slice(0, 32), slice(0, 32))),  # all maps are one map
    ],
)
def test_the_box_holds_what_differs(rows, columns, sides):
    common = torch.full((64, 64), 7)
    common[slice(*rows), slice(*columns)] = -1
    box = Box(common)
    assert (box.rows, box.columns) == sides
    maps = torch.randint(16, (3, 64, 64))
    maps = torch.where(common < 0, maps, common)
    inside = box.inside(maps)
    assert inside.shape[1:] == box.size
    assert torch.equal(box.around(inside), maps)


def test_where_nothing_is_common_a_map_is_drawn_whole():
    maps = torch.randint(16, (3, 64, 64))
    assert torch.equal(Box().inside(maps), maps) and torch.equal(Box().around(maps), maps)


# --- DCGAN --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (56, 48), (40, 32)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_dcgan_shapes(batch_norm, size):
    G = Generator(100, 8, 3, batch_norm, True, size)
    D = Discriminator(8, 3, batch_norm, size)
    noise, level = torch.randn(4, 100), torch.rand(4)
    u = G(noise, level)
    assert u.shape == (4, 3, *size) and u.abs().max() <= 1
    edges = torch.cat([u[..., 0], u[..., -1], u[..., 0, :], u[..., -1, :]], 2)
    assert edges.std(0).min() > 0  # all of the rim is drawn, and is seen
    v = u.detach().requires_grad_()
    scores = D(v, level)
    assert scores.shape == (4,)
    scores.sum().backward()
    assert (v.grad.abs().amax((0, 1)) > 0).all()


def test_the_first_layer_of_the_generator_is_a_transposed_convolution():
    first = FromOne(5, 6, (4, 3))
    plain, x = torch.nn.ConvTranspose2d(5, 6, (4, 3), bias=False), torch.randn(2, 5, 1, 1)
    plain.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x), plain(x))


def test_a_layer_of_the_generator_is_the_first_cells_of_the_whole():
    up = UpTo(3, 2, (7, 6))
    whole, x = torch.nn.ConvTranspose2d(3, 2, 4, 2, 1), torch.randn(2, 3, 4, 3)
    whole.load_state_dict(up.state_dict())
    torch.testing.assert_close(up(x), whole(x)[:, :, :7, :6])


def test_the_original_generator_has_the_papers_widths():
    G = Generator(100, 128, 3, classic=True, bounded=True)
    widths = [m.out_channels for m in G.layers if isinstance(m, torch.nn.ConvTranspose2d)]
    assert widths == [1024, 512, 256, 128, 3]
    D = Discriminator(64, 3, batch_norm=True)
    widths = [m.out_channels for m in D.layers if isinstance(m, torch.nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]


def test_unknown_levels_condition_on_nothing():
    features = level_features(torch.tensor([0.0, 0.5, math.nan]))
    assert features.isfinite().all() and (features[2] == 0).all()
    assert not torch.equal(features[0], features[1])


def test_relativistic_loss_in_closed_form():
    loss = relativistic_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradient_penalty_of_a_linear_function():
    weight = torch.randn(1, 1, 64, 64, requires_grad=True)
    penalty = gradient_penalty(
        lambda u, level: (u * weight).sum((1, 2, 3)), torch.rand(4, 1, 64, 64), None
    ).mean()
    assert penalty.item() == pytest.approx(weight.square().sum().item(), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight)


def test_contrast_leaves_what_is_flat_and_raises_what_is_not():
    flat = torch.full((2, 3, 8, 8), 1.7)
    torch.testing.assert_close(raise_contrast(flat, torch.tensor(0.4)), flat)
    u = torch.randn(1, 1, 3, 3)
    raised = raise_contrast(u, torch.tensor(0.4))
    assert raised[0, 0, 1, 1].item() == pytest.approx(
        (u[0, 0, 1, 1] + 0.4 * (u[0, 0, 1, 1] - u.mean())).item(), abs=1e-6
    )
    corner = u[0, 0, :2, :2]
    expected = corner[0, 0] + 0.4 * (corner[0, 0] - corner.mean())
    assert raised[0, 0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-6)


def test_what_all_maps_share_lies_about_a_drawn_box():
    code_map, _, _ = some_code_map("coordinates")
    common = torch.full((64, 64), 11)
    common[3:50, 9:40] = -1
    code_map.box = Box(common)
    G = Generator(100, 8, 3, False, False, code_map.box.size).eval()
    given = noise_of(range(2), 100, 3, torch.linspace(0, 1, 32))
    maps, images = draw(G, code_map, VQVAE(codes=40).eval(), *given)
    assert images.shape == (2, 1, 256, 256)
    with torch.no_grad():
        box = code_map.decode(G(*(F.pad(x, [0, 0] * (x.ndim - 1) + [0, 14]) for x in given)))
    assert torch.equal(code_map.box.inside(maps), box[:2])
    maps[:, code_map.box.rows, code_map.box.columns] = 11
    assert (maps == 11).all()


def test_samples_are_drawn_with_the_generators_contrast():
    code_map, _, _ = some_code_map()
    model = VQVAE(codes=40).eval()
    G = Generator(100, 8, 1, classic=False, bounded=True).eval()
    noise, level = noise_of(range(2), 100, 3, torch.linspace(0, 1, 32))
    G.contrast.fill_(0.3)
    maps, _ = draw(G, code_map, model, noise, level)
    with torch.no_grad():
        filled = torch.cat([noise, torch.zeros(14, 100)]), torch.cat([level, torch.zeros(14)])
        u = raise_contrast(G(*filled), torch.tensor(0.3))[:2]
    assert torch.equal(maps, code_map.decode(u))


def fitted(points, shares) -> tuple[Denoiser, torch.Tensor]:
    """Of codes 1, 3, 5 ... of as many places, 0 elsewhere; the even ones were never used.

    And where they lie (U, C) float64: turned to principal axes, scaled as one.
    """
    points, K = torch.as_tensor(points), 2 * len(points)
    used, counts = torch.arange(1, K, 2), torch.zeros(K).long()
    counts[used] = torch.tensor(shares)
    codebook = torch.full((K, 6), 7.0)
    codebook[used] = F.pad(points, (0, 6 - points.shape[1]))
    denoiser = Denoiser(K, 4)
    denoiser.fit(CodeMap.fit(codebook, counts, "coordinates", 4), counts)
    return denoiser, denoiser.points[used].double()


PLACES, SHARES = [[0.0, 1.0], [1.0, 0.0], [-2.0, 5.0], [0.1, 1.0]], [60, 25, 10, 5]


def test_a_denoiser_sees_codes_at_their_principal_coordinates():
    denoiser, places = fitted(PLACES, SHARES)
    share, points = torch.tensor(SHARES).double() / 100, torch.tensor(PLACES).double()
    assert places.shape == (4, 4) and places[:, 2:].abs().max() < 1e-6
    assert (share @ places).abs().max() < 1e-6
    assert (share @ places.square()).mean() == pytest.approx(1.0, rel=1e-6)
    apart = torch.cdist(points, points)
    scale = torch.cdist(places, places)[0, 1] / apart[0, 1]
    assert (torch.cdist(places, places) - scale * apart).abs().max() < 1e-5
    assert denoiser.points[::2].min() == Denoiser.FAR


def test_a_denoiser_sees_what_a_code_map_of_coordinates_draws():
    code_map, _, _ = some_code_map("coordinates")
    denoiser, maps = some_denoiser(), code_map.used.view(1, 1, -1)
    places = code_map.encode(maps) / denoiser.sd
    assert (denoiser.places(maps) - places).abs().max() < 1e-5


@pytest.mark.parametrize("sigma", [0.1, 0.7, 4.0])
def test_an_untrained_denoiser_knows_codes_without_neighbours(sigma):
    """Bayes: a cell's code by the codes' shares and by what the noise lets the cell say."""
    denoiser, places = fitted(PLACES, SHARES)
    share = torch.tensor(SHARES).double() / 100
    ranks = torch.multinomial(share.float(), 3 * 8 * 12, replacement=True).view(3, 8, 12)
    noise, sigma = torch.randn(3, 4, 8, 12), torch.full((3,), sigma)
    x = places[ranks].permute(0, 3, 1, 2) + sigma[0] * noise
    near = (x.permute(0, 2, 3, 1)[..., None, :] - places).square().sum(-1)  # (3, 8, 12, 4)
    posterior = (share.log() - near / (2 * sigma[0] ** 2)).softmax(-1)
    with torch.no_grad():
        found = denoiser(x.float(), sigma)
        loss = denoising_loss(denoiser, 2 * ranks + 1, noise, sigma, (1, 0))
    assert (found - (posterior @ places).permute(0, 3, 1, 2)).abs().max() < 1e-4
    surprise = -posterior.gather(-1, ranks[..., None])[..., 0].log()
    assert (loss - surprise[:, 1::2, ::2].mean((1, 2))).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("most", "steps", "wrong"),
    [(2.0, 4, 0.05), (2.0, 48, 0.005), (Denoiser.MOST, Denoiser.STEPS + 1, 0.05)],
)
def test_restoring_follows_the_equation_of_codes_without_neighbours(most, steps, wrong):
    # On a line no cell overtakes another: each ends at the code of its own quantile.
    denoiser, places = fitted([[-1.0], [0.5], [2.0]], [50, 30, 20])
    denoiser.LEAST, denoiser.MOST, denoiser.STEPS = 0.1, most, steps
    places, shares = places[:, 0], torch.tensor([0.5, 0.3, 0.2])
    ranks = torch.multinomial(shares, 8192, replacement=True).view(2, 64, 64)
    noise = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        found = denoiser.restore(denoiser.places(2 * ranks + 1), noise)
    x = places[ranks] + most * noise[:, 0]
    quantile = (shares * torch.special.ndtr((x[..., None] - places) / most)).sum(-1)
    wanted = 2 * torch.bucketize(quantile, shares.cumsum(0)[:2]) + 1
    assert (found != wanted).float().mean() < wrong


def test_the_noise_of_restoring_is_white_and_follows_z():
    z = F.normalize(torch.randn(3, 100))
    z[2] = z[0] + 0.01 * z[1]
    grain = grain_of(5 * z, 1, 64, 64)  # its length is of no account
    assert grain.std((1, 2, 3)).sub(1).abs().max() < 0.05
    next_to = (grain[:, :, 1:] * grain[:, :, :-1]).mean((1, 2, 3))
    assert next_to.abs().max() < 0.06  # of 4,032 pairs: 4 standard deviations
    assert (grain[0] - grain[2]).std() < 0.02 < 1 < (grain[0] - grain[1]).std()


def some_denoiser() -> Denoiser:
    """As if trained: its network has a say."""
    code_map, counts, _ = some_code_map("coordinates")
    denoiser = Denoiser(len(counts), 3).eval()
    denoiser.fit(code_map, counts)
    with torch.no_grad():
        for layer in (denoiser.head, *(block.last for block in denoiser.blocks)):
            torch.nn.init.normal_(layer.weight, std=0.05)
    return denoiser


def test_a_denoised_cell_depends_on_its_neighbourhood_alone():
    # It learns from crops, so that what lies farther away on a whole map must not matter.
    denoiser, sigma = some_denoiser(), torch.tensor([0.5])
    x = torch.randn(1, 3, 96, 16)
    other = x.clone()
    other[:, :, 64:] = 5.0
    with torch.no_grad():
        apart = (denoiser(x, sigma) - denoiser(other, sigma)).abs().amax((0, 1, 3))
    assert apart[:24].max() < 1e-5 < 1e-3 < apart[60:64].max()


@pytest.mark.parametrize("order", ["raw", "pc1", "coordinates"])
def test_samples_go_through_the_denoiser(order):
    """Which sees coordinates: the generator's own, or those of the codes that it drew."""
    code_map, _, _ = some_code_map(order)
    model, denoiser = VQVAE(codes=40).eval(), some_denoiser()
    G = Generator(100, 8, 3, classic=False, bounded=order != "coordinates").eval()
    noise, level = noise_of(range(DRAW_BATCH), 100, 3, torch.linspace(0, 1, 32))
    maps, _ = draw(G, code_map, model, noise, level, denoiser=denoiser)
    alone, _ = draw(G, code_map, model, noise, level)
    with torch.no_grad():
        own = order == "coordinates"
        x = G(noise, level) / denoiser.sd if own else denoiser.places(alone)
        restored = denoiser.restore(x, grain_of(noise, 3, 64, 64))
    assert torch.equal(maps, restored) and not torch.equal(maps, alone)


def test_what_a_sample_of_bins_is_spread_over_comes_before_the_denoiser():
    code_map, _, _ = some_code_map()
    model, denoiser = VQVAE(codes=40).eval(), some_denoiser()
    G = Generator(100, 8, 1, classic=True, bounded=True).eval()
    noise, level = noise_of(range(DRAW_BATCH), 100, 3, torch.linspace(0, 1, 32))
    maps, _ = draw(G, code_map, model, noise, level, stretch=True, denoiser=denoiser)
    with torch.no_grad():
        bins = code_map.decode(code_map.spread(G(noise, level)))
        restored = denoiser.restore(denoiser.places(bins), grain_of(noise, 3, 64, 64))
    assert torch.equal(maps, restored)


@pytest.mark.parametrize("denoised", [False, True])
def test_no_sample_depends_on_the_batch_it_was_drawn_in(denoised):
    code_map, _, _ = some_code_map()
    model, G = (
        VQVAE(codes=40).eval(),
        Generator(100, 8, 1, classic=False, bounded=True).eval(),
    )
    denoiser = some_denoiser() if denoised else None
    noise, level = noise_of(range(40), 100, 3, torch.linspace(0, 1, 32))
    maps, images = draw(G, code_map, model, noise, level, denoiser=denoiser)
    for start, stop in ((0, 1), (5, 12), (31, 40)):
        part = noise[start:stop], level[start:stop]
        again, pictures = draw(G, code_map, model, *part, denoiser=denoiser)
        assert torch.equal(again, maps[start:stop])
        assert torch.equal(pictures, images[start:stop])
    alone, _ = noise_of(range(17, 18), 100, 3, torch.linspace(0, 1, 32))
    assert torch.equal(alone[0], noise[17])


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_a_widened_decoder_draws_the_same_and_all_of_it_can_learn(upsampling):
    config = Config(codes=32, widths=(4, 4, 4, 6), upsampling=upsampling)
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
    def first(*path):
        return torch.rand(4, generator=generator_of(*path)).tolist()

    assert first(1, 2, 3) == first(1, 2, 3)
    paths = [(0, 1), (1, 0), (0, 2), (0, 1, 1), (2**31 - 1, 1)]
    assert len({tuple(first(*path)) for path in paths}) == len(paths)


def test_config_makes_the_networks_it_describes():
    config = Config(codes=32, code_dim=16, widths=(8, 4, 6, 5), decoder_widths=(9, 3))
    model = make_vqvae(config)
    assert model.quantizer.codebook.shape == (32, 16)
    assert model.encoder[0].out_channels == 8
    widths = [m.out_channels for m in model.encoder if isinstance(m, torch.nn.Conv2d)]
    widths += [m.out_channels for m in model.decoder if isinstance(m, torch.nn.Conv2d)]
    assert widths == [8, 4, 6, 5, 1]
    decoder = make_vqvae(config, sharper=True).decoder
    widths = [m.out_channels for m in decoder if isinstance(m, torch.nn.Conv2d)]
    assert widths == [9, 5, 1]  # at least as many as before
    assert sum(isinstance(m, ResidualBlock) for m in decoder) == config.residual_blocks == 2
    for drawn, seen in (({"map_channels": 3}, 3), ({"order": "pc1", "map_channels": 1}, 4)):
        assert make_denoiser(Config(**drawn)).channels == seen
