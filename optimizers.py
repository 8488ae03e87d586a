"""Muon, the optimiser of the convolutions' kernels, and the choice between it and Adam.

In: a network, its gradients. Out: a step. A kernel's gradient is mostly a few directions, taken
again and again; Muon takes all of them equally far. EXPERIMENTS.md, section 2, has what that
is worth.
"""

import torch
from torch import Tensor, nn


class Muon(torch.optim.Adam):
    """Adam; but a step of a convolution's kernel is its momentum, made orthogonal.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon), whose Newton-Schulz iteration brings
    the singular values of a matrix (the kernel's first axis by the rest) near to 1: directions
    that gradients seldom take move as far as the frequent ones. A kernel of one row has one
    direction: Adam's, like biases and gains. (torch.optim.Muon takes matrices alone.)
    """

    RATIO = 6.0  # a kernel's step in units of lr, by its singular values
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
            if not state:  # under the names that Adam looks for
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(grad)}
            momentum = state["exp_avg"].lerp_(grad, 1 - self.momentum)
            matrix = grad.lerp(momentum, self.momentum).flatten(1)
            alike.setdefault(matrix.shape, []).append((kernel, matrix))
            kernel.grad = None  # so that Adam leaves it alone
        for some in alike.values():  # of one size, at once: small products wait for launches
            those, matrices = zip(*some, strict=True)
            for kernel, way in zip(those, self.orthogonal(torch.stack(matrices)), strict=True):
                kernel.sub_(way.view(kernel.shape) * kernels["lr"], alpha=self.RATIO)
        super().step()

    @classmethod
    def orthogonal(cls, matrices: Tensor) -> Tensor:
        """Each (m, n) = U S V^T of (B, m, n) -> nearly U V^T, times sqrt(m / n) where m > n."""
        m, n = matrices.shape[1:]
        if m > n:
            return cls.orthogonal(matrices.mT).mT * (m / n) ** 0.5
        x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
        gram = x @ x.mT  # (B, m, m): small products
        whole = factor = cls.quintic(gram)  # x would become factor @ x
        for _ in range(4):
            gram = factor @ gram @ factor  # of what x would have become
            factor = cls.quintic(gram)
            whole = factor @ whole
        return whole @ x

    @classmethod
    def quintic(cls, gram: Tensor) -> Tensor:
        """a + b G + c G^2, of each G = X X^T (B, m, m): times X, the quintic of X."""
        a, b, c = cls.QUINTIC
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        return factor


def make_optimizer(
    network: nn.Module, name: str, lr: float, betas: tuple[float, float], momentum: float = 0.95
) -> torch.optim.Optimizer:
    """The optimiser that `Config.optimizer` names. momentum: Muon's, of kernels."""
    if name == "muon":
        return Muon(network, lr, betas, momentum)
    return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=True)
