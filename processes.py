"""Several processes that train one run, as `torchrun` starts them; alone, nothing of it acts.

Every process holds the same weights and its own even share of each batch. What the whole batch
must decide (gradients, codebook statistics, BatchNorm's moments, scores) is reduced over all of
them; what exists once (files, messages) is the first one's. Data order and noise are functions
of the position in the whole batch, so that N processes compute what one does.
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

PATIENCE = datetime.timedelta(hours=2)  # of those who wait while the first decodes the data


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started; alone without it."""
    started = dist.is_available() and dist.is_torchelastic_launched()
    if not started or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # after a failure the others see the connection close
    # Gloo's threads live on, and one that lets go of the last tensor while the interpreter ends
    # aborts the process (github.com/pytorch/pytorch/issues/190489): give it the time before.
    time.sleep(0.1)


class Told(UserError):
    """An error of the first process, which has said so, in another one."""


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _is_joined() else 1


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _is_joined() else 0


def local() -> int:
    """The number of this process on its machine, and of the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def share(n: int) -> slice:
    """This process's part of range(n), in the order of ranks."""
    return slice(n * rank() // count(), n * (rank() + 1) // count())


# --- collectives --------------------------------------------------------------------------


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """A process that waits for one that has ended ends, too: exit 143."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        raise UserError(
            Exit.TERMINATED,
            "this process could not reach the others; one that has ended says why in its own "
            "message. The last checkpoint is whole; the same command continues. Cause: "
            + str(problem).partition("\n")[0],
        ) from problem


def sum_(*tensors: Tensor):
    """Replace tensors, of one dtype, by their sums over the processes: one message for all."""
    if count() > 1:
        _reduce(tensors, 1)


def mean_(*tensors: Tensor):
    """The same for the mean."""
    if count() > 1:
        _reduce(tensors, count())


@torch.no_grad()
def _reduce(tensors: tuple[Tensor, ...], divisor: int):
    message = torch.cat([t.detach().reshape(-1) for t in tensors])
    with _together():
        dist.all_reduce(message)
    if divisor > 1:
        message /= divisor
    parts = message.split([t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def average_gradients(module: nn.Module, *values: Tensor):
    """Gradients of the whole batch's mean loss, from each share's; and mean `values`."""
    gradients = (p.grad for p in module.parameters() if p.grad is not None)
    mean_(*gradients, *(v.detach() for v in values))


def gathered(x: Tensor) -> Tensor:
    """All processes' rows of x (n, ...), in the order of ranks; n may differ."""
    if count() == 1:
        return x
    return torch.cat([part.to(x.device) for part in collected(x.cpu())])


def collected(value) -> list:
    """What each process has as `value`, in the order of ranks."""
    if count() == 1:
        return [value]
    values = [None] * count()
    with _together():
        dist.all_gather_object(values, value)
    return values


def agreed(flag: bool) -> bool:
    """Whether any process says so: all act alike after it."""
    if count() == 1:
        return flag
    flags = torch.tensor(float(flag))  # on the CPU: the GPU need not be waited for
    sum_(flags)
    return bool(flags > 0)


def first(call: Callable):
    """What `call` returns in the first process alone, for all; or its UserError, for all."""
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
    """What `call` returns in the first process, None in the others; its UserError for all."""
    mine = []
    first(lambda: mine.append(call()))
    return mine[0] if mine else None


def first_then_all(call: Callable):
    """`call` in the first process, which may write files, and then in those that read them."""
    mine = first_alone(call)
    return mine if is_first() else call()


# --- BatchNorm ----------------------------------------------------------------------------


class _Mean(torch.autograd.Function):
    """Mean over the processes; gradients come from every process's use of it."""

    @staticmethod
    def forward(ctx, x):
        mean = x.clone()
        mean_(mean)
        return mean

    @staticmethod
    def backward(ctx, gradient):
        mean = gradient.clone()
        mean_(mean)
        return mean


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the moments of the whole batch (torch's SyncBatchNorm wants a GPU)."""

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
    """Let every BatchNorm in `module` see the whole batch; parameters and state stay."""
    if count() > 1:
        for part in module.modules():
            if type(part) is nn.BatchNorm2d:
                part.__class__ = SharedBatchNorm
