"""Distributed training, started by torchrun. No-ops in a single process.

Every process holds the same weights and an even share of each batch. Sums over the whole batch
(gradients, codebook statistics, BatchNorm moments, validation scores) are reduced over all
processes. The first process alone writes files and messages, and computes the final scores.
Data order and noise depend only on the position in the whole batch, so N processes compute
what one computes.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Exit, UserError

# The others wait while the first process decodes data or computes scores, which takes hours for
# large sets. A dead process closes its connection, and that ends the wait without a timeout.
PATIENCE = datetime.timedelta(days=30)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started; do nothing without it."""
    started = dist.is_available() and dist.is_torchelastic_launched()
    if not started or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # after a failure the others notice the closed connection
    # Gloo's threads live on. If one frees the last tensor while the interpreter ends, the
    # process aborts (github.com/pytorch/pytorch/issues/190489): let it finish before.
    time.sleep(0.1)


class Told(UserError):
    """In the other processes: an error of the first process, which has printed it already."""


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_joined() else 1


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if _is_joined() else 0


def local() -> int:
    """Return this process's number on its machine; it is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process writes the files and messages."""
    return rank() == 0


def share(n: int) -> slice:
    """Return this process's part of range(n); the parts are in rank order."""
    return slice(n * rank() // count(), n * (rank() + 1) // count())


# --- collectives --------------------------------------------------------------------------


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Exit 143 if another process has ended while this one waits for it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        raise UserError(
            Exit.TERMINATED,
            "this process could not reach the others; the one that ended says why. The last "
            "checkpoint is intact; the same command continues. Cause: "
            + str(problem).partition("\n")[0],
        ) from problem


@torch.no_grad()
def sum_(*tensors: Tensor, divisor: int = 1):
    """Replace tensors of one dtype by sums over the processes / divisor, in one message."""
    if count() == 1:
        return
    message = torch.cat([t.detach().reshape(-1) for t in tensors])
    with _together():
        dist.all_reduce(message)
    if divisor > 1:
        message /= divisor
    parts = message.split([t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def mean_(*tensors: Tensor):
    """Replace tensors of one dtype by their means over the processes, in one message."""
    sum_(*tensors, divisor=count())


def average_gradients(module: nn.Module, *values: Tensor):
    """Replace gradients and `values` by their means over the processes, in one message."""
    gradients = (p.grad for p in module.parameters() if p.grad is not None)
    mean_(*gradients, *(v.detach() for v in values))


def gathered(x: Tensor) -> Tensor:
    """Concatenate all processes' rows of x (n, ...) in rank order; n may differ."""
    if count() == 1:
        return x
    parts = [None] * count()
    with _together():
        dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)


def in_shares(function: Callable, *arrays) -> Tensor:
    """function(*arrays), which has their rows (n, ...); each process computes a part."""
    mine = share(len(arrays[0]))
    return gathered(function(*(array[mine] for array in arrays)))


def agreed(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes get the same answer."""
    if count() == 1:
        return flag
    flags = torch.tensor(float(flag))  # on the CPU, to avoid a sync
    sum_(flags)
    return bool(flags > 0)


def first(call: Callable):
    """Run `call` in the first process only; return its value, or raise its error, in all."""
    if count() == 1:
        return call()
    outcome, mine = [None, None], None
    if is_first():
        try:
            outcome[0] = call()
        except (UserError, FloatingPointError) as problem:
            outcome[1] = getattr(problem, "code", Exit.DIVERGED), str(problem)
            mine = problem
    with _together():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise (UserError if is_first() else Told)(*outcome[1]) from mine
    return outcome[0]


def first_alone(call: Callable):
    """Like `first`, but the other processes get None. The value need not be picklable."""
    mine = []
    first(lambda: mine.append(call()))
    return mine[0] if mine else None


def first_then_all(call: Callable):
    """Run `call` in the first process, which may write files, then in those that read them."""
    mine = first_alone(call)
    return mine if is_first() else call()


# --- BatchNorm ----------------------------------------------------------------------------


class _Mean(torch.autograd.Function):
    """Mean over the processes, with gradients."""

    @staticmethod
    def forward(ctx, x):
        mean = x.clone()
        mean_(mean)
        return mean

    @staticmethod
    def backward(ctx, gradient):
        return _Mean.forward(ctx, gradient)


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the moments of the whole batch (torch's SyncBatchNorm needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        n = x.numel() // x.shape[1] * count()
        y = x.float()
        mean = _Mean.apply(y.mean((0, 2, 3)))  # (C,)
        centred = y - mean[:, None, None]  # (B, C, H, W)
        var = _Mean.apply(centred.square().mean((0, 2, 3)))  # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()  # (C,)
        shift = self.bias[:, None, None]
        return torch.addcmul(shift, centred, scale[:, None, None]).to(x.dtype)


def share_batch_norm(module: nn.Module):
    """Replace every BatchNorm in `module` by SharedBatchNorm; weights and statistics stay."""
    if count() > 1:
        for part in module.modules():
            if type(part) is nn.BatchNorm2d:
                part.__class__ = SharedBatchNorm
