"""Muon, the optimizer of convolution kernels, and the choice between Muon and Adam.

A few directions dominate a kernel's gradient. Muon moves equally far in all directions.
docs/experiments.md measures the gain.
"""

import torch
from torch import Tensor, nn


class Muon(torch.optim.Adam):
    """Muon for convolution kernels (Jordan et al. 2024), Adam for all other weights.

    A kernel's step is its momentum, made orthogonal: a Newton-Schulz iteration brings the
    singular values of the matrix (first axis by the rest) near 1, so rare directions move as
    far as frequent ones. A kernel with one row has one direction and stays with Adam.
    Source: kellerjordan.github.io/posts/muon. (torch.optim.Muon accepts only matrices.)
    """

    RATIO = 6.0  # singular values of a kernel's step, in units of lr
    QUINTIC = 3.4445, -4.7750, 2.0315  # coefficients of x, x^3, x^5

    def __init__(self, network: nn.Module, lr: float, betas, momentum: float = 0.95):
        self.momentum = momentum
        kernels, others = [], []
        for weight in network.parameters():
            (kernels if weight.ndim == 4 and len(weight) > 1 else others).append(weight)
        super().__init__([{"params": kernels}, {"params": others}], lr, betas, fused=True)

    @torch.no_grad()
    def step(self):
        kernels, alike = self.param_groups[0], {}
        for kernel in kernels["params"]:
            state, grad = self.state[kernel], kernel.grad
            if not state:  # with Adam's names, which checkpoints hold
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(grad)}
            momentum = state["exp_avg"].lerp_(grad, 1 - self.momentum)
            matrix = grad.lerp(momentum, self.momentum).flatten(1)
            alike.setdefault(matrix.shape, []).append((kernel, matrix))
            kernel.grad = None  # Adam skips weights without a gradient
        for some in alike.values():  # one batch per size: launches cost more than the products
            those, matrices = zip(*some, strict=True)
            for kernel, way in zip(those, self.orthogonal(torch.stack(matrices)), strict=True):
                kernel.sub_(way.view(kernel.shape) * kernels["lr"], alpha=self.RATIO)
        super().step()

    @classmethod
    def orthogonal(cls, matrices: Tensor) -> Tensor:
        """Map each (m, n) = U S V^T of (B, m, n) to about U V^T, times sqrt(m / n) if m > n."""
        m, n = matrices.shape[1:]
        if m > n:
            return cls.orthogonal(matrices.mT).mT * (m / n) ** 0.5
        x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
        gram = x @ x.mT  # (B, m, m), the smaller side
        whole = factor = cls.quintic(gram)  # stands for x = factor @ x
        for _ in range(4):
            gram = factor @ gram @ factor  # the Gram matrix of the new x
            factor = cls.quintic(gram)
            whole = factor @ whole
        return whole @ x

    @classmethod
    def quintic(cls, gram: Tensor) -> Tensor:
        """Return a + b G + c G^2 for each G = X X^T (B, m, m); times X: the quintic of X."""
        a, b, c = cls.QUINTIC
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        return factor


def make_optimizer(
    network: nn.Module, name: str, lr: float, betas: tuple[float, float], momentum: float = 0.95
) -> torch.optim.Optimizer:
    """Return the optimizer that `Config.optimizer` names. momentum: only for Muon's kernels."""
    if name == "muon":
        return Muon(network, lr, betas, momentum)
    return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=True)
