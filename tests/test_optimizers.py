"""Muon moves kernels as torch.optim.Muon moves matrices, and other weights as Adam does."""

import copy

import pytest
import torch

from support.muon import Muon


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (24, 5, 1, 1), (16, 4, 2, 2)])
def test_kernels_move_as_with_torchs_muon_and_the_rest_as_with_adam(shape):
    network = torch.nn.Sequential(torch.nn.Conv2d(shape[1], shape[0], shape[2:]))
    network.append(torch.nn.Conv2d(shape[0], 1, 1)).to(memory_format=torch.channels_last)
    start = {k: v.detach().clone() for k, v in network.named_parameters()}
    before = start["0.weight"].flatten(1)
    matrix = torch.nn.Parameter(before.clone())
    others = {k: torch.nn.Parameter(v) for k, v in start.items() if k != "0.weight"}
    here = Muon(network, 0.01, betas=(0.8, 0.9))
    muon = torch.optim.Muon([matrix], 0.01 * Muon.RATIO, weight_decay=0)
    adam = torch.optim.Adam(others.values(), 0.01, (0.8, 0.9), fused=True)
    for _ in range(4):
        for name, weight in network.named_parameters():
            weight.grad = torch.randn(weight.shape)
            twin = matrix if name == "0.weight" else others[name]
            twin.grad = weight.grad.clone().view(twin.shape)
        for each in (here, muon, adam):
            each.step()
    moved, there = (w.detach().flatten(1) - before for w in (network[0].weight, matrix))
    assert (moved - there).norm() < 0.05 * there.norm()  # torch's Muon works in bfloat16
    for name, twin in others.items():
        assert torch.equal(network.get_parameter(name), twin)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_a_step_is_nearly_as_long_in_every_direction(shape):
    matrix = torch.randn(shape) * torch.logspace(0, -2, shape[1])
    found = torch.linalg.svdvals(Muon.orthogonal(matrix[None])[0])
    found /= max(1, shape[0] / shape[1]) ** 0.5
    assert found.min() > 0.5 and found.max() < 1.3
    assert torch.linalg.svdvals(matrix / matrix.norm()).min() < 0.2  # the control


def test_a_batch_of_kernels_takes_the_same_steps_as_single_kernels():
    together = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3) for _ in range(3)))
    alone = copy.deepcopy(together)
    weights, twins = list(together.parameters()), list(alone.parameters())
    optimizers = [Muon(network, 0.01, betas=(0.8, 0.9)) for network in (together, *alone)]
    for _ in range(3):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = torch.randn(weight.shape)
            twin.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(weights, twins, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_zero_moves_nothing():
    network = torch.nn.Conv2d(3, 8, 3)
    start = [weight.detach().clone() for weight in network.parameters()]
    optimizer = Muon(network, 0.01, betas=(0.8, 0.9))
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(map(torch.equal, network.parameters(), start))
