"""Everything that depends on the device: its choice, precision, CUDA graphs, memory."""

import collections
import contextlib
import ctypes
import functools
import hashlib
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from config import Exit, UserError
from support import distributed
from support.messages import warn

# --- the device and its precision ---------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """Return the device; 'auto' takes a GPU if there is one. An absent one is exit 2.

    In a distributed run each process gets its own GPU, or all use the CPU.
    """
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits gave one cell in 600 another code
    torch.backends.cudnn.deterministic = True
    if distributed.count() > 1:
        mine = f"cuda:{distributed.local()}"
        if name not in ("auto", "cuda", "cpu", mine):
            raise UserError(
                Exit.USAGE, f"--device {name}: several processes take cuda (one each) or cpu"
            )
        if name != "cpu" and torch.cuda.is_available():
            name = mine
        elif name == "auto":
            name = "cpu"
    if name == "auto":
        found = "mps" if torch.backends.mps.is_available() else "cpu"
        found = "cuda" if torch.cuda.is_available() else found
        if not (problem := _kernel_problem(found)):
            return torch.device(found)
        warn(f"the GPU cannot be used ({problem}); the CPU is used")
        torch.cuda.is_available = lambda: False  # optimizers query an available GPU each step
        return torch.device("cpu")
    if problem := _kernel_problem(name):
        raise UserError(
            Exit.USAGE,
            f"--device {name}: not available here ({problem}); use cpu"
            + ("" if torch.version.cuda else " (this torch was built without CUDA)"),
        )
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _kernel_problem(name: str) -> str:
    """Return why a device cannot run a kernel, else "". Old GPUs are found but have none."""
    try:
        x = torch.zeros(1, 1, 4, 4, device=torch.device(name))
        torch.nn.functional.conv2d(x, x).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        return str(problem).partition("\n")[0]
    return ""


def set_threads(count: int) -> int:
    """Set torch's threads on the CPU to `count`, or for 0 to as many as are idle; return them.

    With a thread more than idle cores all threads wait for the slowest at every operation: one
    other busy process on two cores made training 3 to 8 times slower.
    """
    most = all_threads()
    count = count or (most if distributed.count() > 1 else idle_threads(most))
    torch.set_num_threads(count)
    return count


@functools.cache  # before `set_threads` changes torch's number
def all_threads(limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return torch's own number of threads, or a container's limit of cores if it is lower."""
    n = torch.get_num_threads()
    with contextlib.suppress(OSError, ValueError):  # not in a container; "max": no limit
        quota, period = Path(limit).read_text().split()
        n = max(1, min(n, int(quota) // int(period)))
    return n


def idle_threads(n: int, seconds: float = 0.4) -> int:
    """Measure how many of n threads can run undisturbed.

    n threads compute for a moment. If b others compete for n cores, they get n / (n + b) of
    the time.
    """
    block = bytes(1 << 20)
    if n == 1:
        return 1

    def work(end: float):
        while time.monotonic() < end:
            hashlib.sha256(block)  # releases the interpreter's lock

    start, used = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(n) as pool:
        list(pool.map(work, [start + seconds] * n))
    share = (time.process_time() - used) / (time.monotonic() - start) / n
    others = n * (1 / max(share, 1e-3) - 1)
    return max(1, n - round(others))


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16. Emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context for `Config.precision`."""
    low = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Copy x to the device, on CUDA without a sync.

    On MPS such a copy may read memory that is freed meanwhile (pytorch issue 189690).
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


# --- training steps as CUDA graphs --------------------------------------------------------


def set_lr(lr: float, optimizer: torch.optim.Optimizer):
    """Set the learning rate. On CUDA it is a 0-d tensor, so that a captured graph reads it."""
    groups = optimizer.param_groups
    device = next(weight.device for group in groups for weight in group["params"])
    for group in groups:
        if device.type != "cuda":
            group["lr"] = lr
            continue
        if not isinstance(group["lr"], Tensor) or group["lr"].device != device:
            group |= {"lr": torch.zeros((), device=device), "capturable": True}
        group["lr"].fill_(lr)


class Recorded:
    """A training step that is captured as a CUDA graph and replayed; a plain call elsewhere.

    These networks are small: launching their kernels takes longer than running them.
    step(*inputs, **given): the tensors `inputs` have the same shapes in every call; they are
    copied into the graph's buffers. Each set of plain values `given` has its own graph. All
    other tensors that the step reads (weights, optimizer state, the rate of `set_lr`) must keep
    their addresses. The step must not synchronise or draw random numbers on the device. The
    next call overwrites the returned tensors. In a distributed run the step is a plain call.
    """

    WARM = 3  # plain calls before capture: libraries start, optimizers create their state

    def __init__(self, step: Callable):
        self.step, self.calls, self.records = step, collections.Counter(), {}
        self.stream = None

    def __call__(self, *inputs: torch.Tensor, **given):
        if inputs[0].device.type != "cuda" or distributed.count() > 1:
            return self.step(*inputs, **given)
        key = tuple(given.items())
        self.calls[key] += 1
        if self.calls[key] <= self.WARM:
            return self.aside(inputs, given)
        if key not in self.records:
            self.records[key] = self.record(inputs, given)
        buffers, graph, values = self.records[key]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)
        graph.replay()
        return values

    def aside(self, inputs, given):
        """Run the step on a side stream: CUDA graphs require this of the warm-up calls."""
        here = torch.cuda.current_stream()
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            values = self.step(*inputs, **given)
        here.wait_stream(self.stream)
        return values

    def record(self, inputs, given):
        """Capture the step; return its input buffers, the graph, and its output tensors."""
        buffers, graph = [torch.empty_like(x) for x in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # captures without running
            values = self.step(*buffers, **given)
        return buffers, graph, values


# --- memory -------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU; 0 for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def is_out_of_memory(problem: Exception) -> bool:
    """Whether this is an out-of-memory error; on the CPU torch raises a plain RuntimeError."""
    words = ("can't allocate memory", "out of memory", "bad_alloc", "Insufficient memory")
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or any(
        word in str(problem) for word in words
    )


def tame_malloc():
    """Let glibc keep large freed blocks instead of returning them to the kernel.

    A training step frees and allocates the same tens of megabytes again and again. The page
    faults of getting them back zeroed took half of its time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


def release_memory():
    """Return free memory to the system; otherwise the peaks of the stages add up."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far, in MB (0 if unknown)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# --- operations with a form for each device -----------------------------------------------


def window_at(images: torch.Tensor, corner: torch.Tensor, side: int) -> torch.Tensor:
    """The window of images (.., H, W) that begins at corner (2,): (.., side, side)."""
    if corner.device.type == "cpu":
        top, left = corner.tolist()
        return images[..., top : top + side, left : left + side]
    places = corner[:, None] + torch.arange(side, device=corner.device)  # does not synchronise
    return images.index_select(-2, places[0]).index_select(-1, places[1])


def sums_by_index(rows: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
    """Sum (count, C) of the rows (N, C) with each index (N,).

    On a GPU a product with one-hot rows: `index_add_` adds in a random order there, so the same
    seed would give other bits.
    """
    if rows.device.type == "cpu":
        return rows.new_zeros(count, rows.shape[1]).index_add_(0, indices, rows)
    return sums_by_product(rows, indices, count)


def sums_by_product(rows: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
    """`sums_by_index` as a product."""
    every = torch.arange(count, device=rows.device)[:, None]  # (count, 1)
    few = max(1, (1 << 26) // count)  # 0.25 GB of one-hot rows
    parts = zip(rows.split(few), indices.split(few), strict=True)
    return sum((every == chosen).to(part.dtype) @ part for part, chosen in parts)
