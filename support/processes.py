"""Where the work is done: the device, and several processes under torchrun, by torch's own engines.

    torchrun --standalone --nproc_per_node 2 train.py ...            DistributedDataParallel: each process has the model
    torchrun --standalone --nproc_per_node 2 train.py --shard ...    FSDP2: each process has a part of every weight

Each process takes every WORLD-th example of a forward pass, and the result is that of one process. Engines *average*
gradients over processes; the losses here are shares of one mean and must be *summed*, hence train.py's `* WORLD`.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from support.cli import Stopped, UserError
from support.rms_norm import rms_norm

WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # set by torchrun
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # a RANK alone is of something else


def hardware(name="auto", dtype="float32"):
    """(device, autocast): where to run; a function that makes the context in which matrix products run in bfloat16, if
    that is wanted. dtype "auto" is bfloat16 on NVIDIA GPUs that have it, and float32 elsewhere."""
    from model import RMSNorm  # here, because not all that imports this needs models

    RMSNorm.formula = staticmethod(rms_norm)  # quick on CPUs
    if name == "auto":
        mps = torch.backends.mps.is_available() and WORLD == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and WORLD > 1:  # each process has a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).cpu()  # is it there, and does it compute?
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as failure:
        raise UserError(f"--device {name}: {str(failure).splitlines()[0]}; leave the flag out, or give cpu") from None
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":  # with a mask, cuDNN's attention gives NaN gradients now and then (pytorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it also plans anew for each shape
    if dtype == "bfloat16" and not has_bfloat16(device):
        raise UserError(f"--dtype bfloat16: this {device.type} has no fast bfloat16; leave the flag out")
    wanted = dtype == "bfloat16" or dtype == "auto" and device.type == "cuda" and has_bfloat16(device)
    return device, partial(torch.autocast, device.type, torch.bfloat16, enabled=wanted)


def has_bfloat16(device):
    """Does this device compute in bfloat16 faster than in float32?"""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_features())


def cpu_features():
    info = Path("/proc/cpuinfo")  # Linux; torch has no public name for this in all versions that are supported
    return info.read_text().split() if info.exists() else []


def width_multiple(device, dtype):
    """Rows are padded to a multiple of so many columns: GPUs, and AMX, choose or make kernels for each width."""
    return 8 if device.type == "cuda" or dtype == "bfloat16" and "amx_bf16" in cpu_features() else 1


def keep_memory():
    """Let this process keep what a step frees: glibc would return the end of its heap, and get it back page by page.
    Blocks over 32 MiB are returned: steps of many lengths would leave holes (SmolLM2, batch 32: 40 MB more each)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h


# ---- several processes


def start(device):
    """Join the other processes of this run, if torchrun started some."""
    if WORLD == 1:
        return
    if "MASTER_ADDR" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {WORLD}, but torchrun did not start this process; unset WORLD_SIZE and RANK")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))


def spread(model, shard):
    """The model to call in training: itself, or its wrapper of several processes."""
    if WORLD == 1:
        return model
    model.gather = Gather.apply
    if not shard:
        model.pred.requires_grad_(len(model.pred) > 0)  # DDP would wait for the gradient of an empty one
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        model.pred.requires_grad_()
        return wrapped
    if model.pred.device.type == "cpu" and torch.__version__ < (2, 9):
        raise UserError("--shard on CPUs needs torch 2.9 or newer: earlier ones sum gradients instead of averaging")
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(model.pred.device.type, (WORLD,))
    for module in (*model.decoder.blocks, model):  # the model last: what is outside the blocks
        fully_shard(module, mesh=mesh)
    return model


@contextlib.contextmanager
def at_hand(model, shard):
    """Within this context the methods of a sharded model work too, and not only calling it."""
    if shard:
        model._get_fsdp_state()._lazy_init()  # FSDP does so in the first pass of the whole; some runs begin with this
        model.unshard()
    yield
    if shard:
        model.reshard()


def end(code):
    """End this process, of several, with an exit code; a single one goes on if that is 0."""
    if WORLD > 1:
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # not by way of Python's shutdown, in which a thread of torch's now and then aborts the process
    if code:
        sys.exit(code)


class Gather(torch.autograd.Function):
    """The rows of all processes, (n, C) -> (sum of all n, C), with gradient: for distances that compare rows."""

    @staticmethod
    def forward(ctx, rows):
        sizes = all_of_them(len(rows))
        ctx.own = slice(sum(sizes[:RANK]), sum(sizes[: RANK + 1]))
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))  # all processes must send equally much
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every process's loss depends on these rows
        return gradient[ctx.own]


def any_of(*wishes):
    """For each of these booleans: does any process say True?"""
    if WORLD == 1:
        return wishes
    said = torch.tensor(wishes, dtype=torch.int32)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return tuple(map(bool, said.tolist()))


def finite_everywhere(model):
    """Are all weights of a sharded model finite, in every process's part?"""
    parts = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in model.state_dict().values())
    return not any(any_of(not all(part.isfinite().all() for part in parts)))


def all_of_them(value):
    """[the value of process 0, of process 1, ...]"""
    found = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, value)
    return found


class Stop:
    """After Ctrl-C, SIGTERM or a lost terminal `.wanted` is True, and training stops between steps; a second Ctrl-C
    stops at once. It is True also when torchrun has died, so that nobody is left writing into the run."""

    def __init__(self):
        self.signals, self.parent = [], os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup wants it ignored
                signal.signal(number, self)

    def __call__(self, number, frame):
        if number == signal.SIGINT and number in self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)

    @property
    def wanted(self):
        return bool(self.signals) or (WORLD > 1 and os.getppid() != self.parent)


# ---- sharded models on disk (what imports these functions' packages takes seconds, and few runs need them)


def whole_weights(model):
    """The state_dict of a sharded model with every tensor whole, on the CPU of process 0; empty in the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextlib.contextmanager
def all_went_well(what, then):
    """A context for torch's checkpoints: what went wrong in one process ends all of them, each with one line."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as failure:
        reason = str(next(iter(failure.failures.values()))[0]).splitlines()[0].partition(". ")[0]
        raise Stopped(f"{what} ({reason}); {then}") from None


def save_shards(model, optimizer, folder):
    """Each process writes its part of weights and optimizer."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)  # from a save that did not come to its end
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    with all_went_well(f"{folder}: cannot be written", "what was saved before is still there"):
        checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load_shards(model, optimizer, folder):
    """Take back what `save_shards` wrote, also with another number of processes."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    optimizer.zero_grad(set_to_none=True)  # torch makes an optimizer's missing state only where there is no gradient
    weights, moments = get_state_dict(model, optimizer)
    with all_went_well(f"{folder}: cannot be read", "this run cannot go on, start another"):
        checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
