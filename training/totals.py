"""Sum losses, examples and skipped steps over an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from training import distributed
from training.distributed import get_rank


class EpochTotals:
    """Totals over the steps of an epoch, kept on the device so that steps need not wait for it."""

    def __init__(self, num_losses: int, device: torch.device):
        self.losses = torch.zeros(num_losses, device=device)  # summed over examples
        self.examples = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)  # steps with non-finite gradients
        self.last_skipped = torch.zeros((), device=device)  # number of the last such step, from 1
        # Number (from 1) of the first step of this process with a non-finite loss; 0: none so far.
        self.nonfinite_step = torch.zeros((), device=device)

    def add(self, losses: Tensor, finite: Tensor, examples: int, step: int) -> None:
        """Add a step.

        Args:
            losses: (n,) mean losses over this process's examples.
            finite: () bool, true if all gradients were finite.
            examples: number of this process's examples.
            step: number of the step within the run, counted from 1.
        """
        self.losses += (losses * examples).masked_fill(~finite, 0)
        self.examples += finite * examples
        self.skipped += ~finite
        self.last_skipped.masked_fill_(~finite, step)
        first = (self.nonfinite_step == 0) & ~losses.isfinite().all()
        self.nonfinite_step.masked_fill_(first, step)

    def to_tensor(self) -> Tensor:
        """Return this process's totals, (n + 3,): n losses, examples, skipped and last_skipped."""
        steps = torch.stack([self.examples, self.skipped, self.last_skipped])
        return torch.cat([self.losses, steps])

    def over_processes(self) -> Tensor:
        """Combine the totals of all processes, (n + 3,), on the CPU in the order of `to_tensor`."""
        own = self.to_tensor()
        summed = distributed.all_reduce_sum(own[:-2])
        return torch.cat([summed, own[-2:].cpu()])  # not summed: all processes skip the same steps

    def load(self, values: Tensor) -> None:
        """Restore the result of `over_processes`; raise ValueError if its length is wrong."""
        if len(values) != len(self.losses) + 3:
            raise ValueError(
                f"the checkpoint has {len(values)} epoch totals; expected {len(self.losses) + 3}"
            )
        if get_rank() == 0:  # other ranks continue from 0, because the totals are summed
            self.losses.copy_(values[:-3])
            self.examples.copy_(values[-3])
        self.skipped.copy_(values[-2])
        self.last_skipped.copy_(values[-1])
