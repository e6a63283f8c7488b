"""Clip gradients, skip steps, average weights and compile the losses, for both scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.config import RunConfig
from utils import first_line


class Step(NamedTuple):
    """One training step: its number, and this process's part of the batch."""

    number: int  # number within the run, counted from 0
    progress: float  # fraction of the run's steps before this one
    batch: Tensor | tuple[Tensor, ...]  # this process's part of the batch, on the device
    size: int  # number of examples in `batch`; may be 0 if there are fewer than processes
    # Factor for this process's mean loss. It makes the average over the processes weight all
    # examples of the batch equally.
    weight: float
    is_full: bool  # whether the whole batch has `batch_size` examples; the last may have fewer


def clip_gradients(modules: Iterable[nn.Module], max_norm: float) -> Tensor:
    """Clip the gradient norm of each module to `max_norm` (0: no clipping).

    Returns:
        A bool tensor, (), true if all gradients are finite. It stays on the device, so that the
        host does not wait for it.
    """
    norms = []
    for module in modules:
        parameters = [p for p in module.parameters() if p.grad is not None]
        if parameters:
            norms.append(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))
    return torch.stack(norms).isfinite().all()


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict]:
    """Return two groups for an optimizer: matrices, and other parameters without weight decay."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0},
    ]


def may_step(finite: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether to call `optimizer.step()`, so that non-finite gradients change nothing.

    On a CPU or a CUDA GPU, the result is always true, and the fused optimizer itself skips the step
    if `finite`, (), is false. `found_inf` is the attribute through which `torch.amp.GradScaler`
    requests this. The host then need not wait for the gradients. On mps, the fused optimizer
    ignores `found_inf`, so the host has to wait.
    """
    if finite.device.type == "mps":
        return bool(finite)
    optimizer.found_inf = (~finite).float()
    return True


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Update an exponential moving average of the weights after a step of the optimizer.

    The decay increases from 0.1 to 0.999, so that the first weights are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage). The host does not wait for the device.

    Args:
        average: a copy of the model, whose weights are updated.
        model: the model that is trained.
        step: number of the step within the run, counted from 0.
    """
    decay = min(0.999, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def compile_if_enabled(function: Callable, config: RunConfig, device: torch.device) -> Callable:
    """Return `function`, compiled if `--compile` is set or, by default, on CUDA GPUs.

    The other arguments are those of `compile_with_fallback`.
    """
    enabled = device.type == "cuda" if config.compile is None else config.compile
    return compile_with_fallback(function, device) if enabled else function


def compile_with_fallback(function: Callable, device: torch.device) -> Callable:
    """Wrap `function` so that its first call compiles it; if that fails, it runs uncompiled.

    The first call compiles the function with a trial forward and backward pass, which leaves
    gradients, and then restores the random generators. If the trial fails, a warning is printed.

    Args:
        function: a function that returns losses, or a tuple of losses and other tensors; all calls
            must pass tensors of the same shapes.
        device: the device; on a GPU, the compiled function is recorded as CUDA graphs.
    """
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    active: Callable | None = None  # the function that later calls use

    def call(*arguments):
        nonlocal active
        if active is None:
            generators = _random_states(device)
            try:
                active = torch.compile(function, mode=mode, dynamic=False)
                results = active(*arguments)
                losses = results[0] if isinstance(results, tuple) else results
                losses.sum().backward()  # backward is compiled when it first runs
            except Exception as error:  # compilers raise many types of exceptions
                tqdm.write(
                    "warning: the training step cannot be compiled here and runs uncompiled: "
                    f"{first_line(error)}"
                )
                active = function
            _set_random_states(device, generators)
        return active(*arguments)

    return call


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the random generators that a step on this device uses."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Restore the states that `_random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
