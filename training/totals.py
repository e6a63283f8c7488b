"""Sums over the steps of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from training import distributed
from training.distributed import get_rank


class EpochTotals:
    """Sums over the steps of an epoch, kept on the device so that no step waits for it."""

    def __init__(self, num_losses: int, device: torch.device):
        self.losses = torch.zeros(num_losses, device=device)  # each times its number of examples
        self.examples = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)  # steps with non-finite gradients
        self.last_skipped = torch.zeros((), device=device)  # number of the last such step, from 1
        # The first step since the start of this process with a non-finite loss, from 1; else 0.
        self.nonfinite_step = torch.zeros((), device=device)

    def add(self, losses: Tensor, finite: Tensor, examples: int, step: int) -> None:
        """Add a step: its losses, (n,), and whether its gradients were finite, ()."""
        self.losses += (losses * examples).masked_fill(~finite, 0)
        self.examples += finite * examples
        self.skipped += ~finite
        self.last_skipped.masked_fill_(~finite, step)
        first = (self.nonfinite_step == 0) & ~losses.isfinite().all()
        self.nonfinite_step.masked_fill_(first, step)

    def to_tensor(self) -> Tensor:
        """Return this process's sums: losses, examples, skipped, last_skipped, (n + 3,)."""
        steps = torch.stack([self.examples, self.skipped, self.last_skipped])
        return torch.cat([self.losses, steps])

    def over_processes(self) -> Tensor:
        """Return `to_tensor` over all processes, on the CPU, as checkpoints contain it."""
        own = self.to_tensor()
        summed = distributed.all_reduce_sum(own[:-2])
        return torch.cat([summed, own[-2:].cpu()])  # all processes skip the same steps

    def load(self, values: Tensor) -> None:
        """Continue from what `over_processes` returned; raises ValueError for another shape."""
        if len(values) != len(self.losses) + 3:
            raise ValueError(f"{len(values)} sums of losses, not {len(self.losses) + 3}")
        if get_rank() == 0:  # the other processes continue with zeros
            self.losses.copy_(values[:-3])
            self.examples.copy_(values[-3])
        self.skipped.copy_(values[-2])
        self.last_skipped.copy_(values[-1])
