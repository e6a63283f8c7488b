"""Communicate between the processes of a data-parallel run, started by torchrun on one machine.

    with distributed.session():
        if distributed.get_rank() == 0: ...
        total = distributed.all_reduce_sum(tensor)

Outside a session, or with a single process, every function works without communication.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError, first_line


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer."""


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the process group if torchrun started several processes, and leave it after the block.

    GPU tensors are exchanged through NCCL, if torch has it, and CPU tensors through gloo, so that
    bookkeeping never waits for a GPU. Only rank 0 prints to stdout.

    Raises:
        UserError: if torchrun was started on several machines.
        LostProcessError: if an exchange fails because another process has ended or hangs.
    """
    starts_group = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if starts_group:
        if os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):
            raise UserError("torchrun was started on several machines; expected one: omit --nnodes")
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    try:
        with _silence_stdout() if get_rank() > 0 else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise LostProcessError(
            f"another process of this run has ended or hangs ({first_line(error)}); run the "
            "command again"
        ) from None
    if starts_group:  # not reached after an error, when it could wait forever
        dist.destroy_process_group()


@contextlib.contextmanager
def _silence_stdout() -> Iterator[None]:
    """Discard what this process, including its libraries, writes to stdout."""
    sys.stdout.flush()
    stdout = os.dup(sys.stdout.fileno())
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, sys.stdout.fileno())
        os.close(stdout)


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether the error says that another process could not be reached."""
    if get_world_size() == 1:
        return False
    # gloo has no exception class of its own, but its messages contain "gloo".
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error).lower()


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """Return this process's rank; rank 0 writes all files."""
    return dist.get_rank() if get_world_size() > 1 else 0


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 first, so that the other ranks find the files that it writes."""
    if get_rank() > 0:
        _barrier()
    yield
    if get_rank() == 0:
        _barrier()


def _barrier() -> None:
    """Wait for all processes. Unlike `dist.barrier`, do not use a GPU if NCCL is available."""
    all_reduce_sum(torch.zeros(1))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the processes' tensors, as a new tensor on the CPU."""
    total = tensor.detach().cpu().clone()
    if get_world_size() > 1:
        dist.all_reduce(total)
    return total


def broadcast_tensors(tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors with those of rank 0."""
    if get_world_size() > 1:
        for tensor in tensors.values():
            dist.broadcast(tensor, 0)


def broadcast_object(value):
    """Return the value of rank 0, which may be any object that can be pickled."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


def check_replicas(tensors: dict[str, Tensor]) -> None:
    """Check that all processes hold equal tensors.

    Raises:
        RuntimeError: if they differ; the message names the tensors. Replicas that have diverged
            must not be trained further.
    """
    if get_world_size() == 1:
        return
    checksums = []
    for tensor in tensors.values():
        values = tensor.detach().cpu().double().flatten()  # mps has no float64
        weights = torch.linspace(1, 2, len(values)).double()  # so that order matters
        checksums.append(values @ weights)
    own = torch.stack(checksums)
    reference = own.clone()
    dist.broadcast(reference, 0)
    differs = all_reduce_sum((own != reference).long())
    if differs.any():
        names = [name for name, count in zip(tensors, differs.tolist(), strict=True) if count]
        raise RuntimeError(f"processes hold different {', '.join(names)}")


def average_gradients(modules: Iterable[nn.Module]) -> None:
    """Average the gradients of all modules over the processes, in one exchange.

    `DistributedDataParallel` is not used: it overlaps the exchange with the backward pass, which
    does not pay for a model of this size, and its hooks prevent compilation into a single graph.
    """
    world_size = get_world_size()
    if world_size == 1:
        return
    parameters = [parameter for module in modules for parameter in module.parameters()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
