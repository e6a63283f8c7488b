"""Compute and set the learning rate of a step."""

from __future__ import annotations

import math

import torch


def learning_rate(config, step: int, total_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: a configuration with the attributes `learning_rate` (the peak), `warmup` (the
            fraction of the steps in which the rate rises linearly to the peak) and `schedule`
            ("constant"; "cosine"; or "linear", constant in the first third of the steps and then
            falling linearly). Both falling rates reach 0 one step after the last step.
        step: number of the step, 0 to total_steps - 1.
        total_steps: number of steps of the whole run.
    """
    peak = config.learning_rate
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "linear":
        return peak * min(1.0, 1.5 * (1 - step / total_steps))
    angle = math.pi * (step - warmup_steps) / (total_steps - warmup_steps)  # 0 to almost pi
    return peak * 0.5 * (1 + math.cos(angle))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups of parameters, times `rate_factor` if a group has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1)
