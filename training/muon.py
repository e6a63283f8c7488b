"""Muon: an optimizer for the weights of convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.step import decay_groups

MOMENTUM = 0.95
SCALE = 0.2  # the root mean square of an update, divided by the learning rate; about that of AdamW


class Muon(torch.optim.AdamW):
    """Muon for the hidden weights, AdamW for all other parameters (Jordan et al. 2024).

    Muon replaces the momentum of each weight by the nearest orthogonal matrix, so that all
    directions are learned equally fast (https://kellerjordan.github.io/posts/muon). Updates are
    scaled as by Liu et al. 2025, arXiv 2502.16982, section 2.2, so that both methods use the same
    learning rate and weight decay. `torch.optim.Muon` needs torch 2.9, and rejects convolutions.

    Args:
        hidden: weights of at least two dimensions, (out_channels, ...). Weights of the first and
            the last layer are better updated by AdamW.
        others: all other parameters.
        learning_rate: learning rate of all parameters.
        weight_decay: decoupled weight decay of all parameters of at least two dimensions.
    """

    def __init__(
        self,
        hidden: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
    ):
        super().__init__(
            [{"params": list(hidden)}, *decay_groups(others)],
            lr=learning_rate,
            weight_decay=weight_decay,
            betas=(0.9, 0.95),
            fused=True,
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters, unless the tensor `found_inf`, (), is 1."""
        hidden = self.param_groups[0]
        found_inf = getattr(self, "found_inf", torch.zeros((), device=hidden["params"][0].device))
        for parameter in hidden["params"]:
            if parameter.grad is not None:
                self._update(parameter, hidden["lr"], hidden["weight_decay"], 1 - found_inf)
                parameter.grad = None  # AdamW skips parameters without a gradient
        super().step()

    def _update(
        self, parameter: nn.Parameter, rate: float, weight_decay: float, is_finite: Tensor
    ) -> None:
        state = self.state[parameter]
        if not state:  # with the names that AdamW expects in a checkpoint
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
        gradient = parameter.grad.nan_to_num(0, 0, 0)
        momentum = state["exp_avg"]
        momentum.lerp_(gradient, (1 - MOMENTUM) * is_finite)
        direction = gradient.lerp(momentum, MOMENTUM)  # Nesterov momentum
        matrix = orthogonalize(direction.flatten(1))
        size = SCALE * max(matrix.shape) ** 0.5
        parameter.mul_(1 - rate * weight_decay * is_finite)
        parameter.sub_(rate * size * is_finite * matrix.view_as(parameter))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return (M, N), about the nearest matrix with orthogonal rows or columns, whichever are fewer.

    Five Newton-Schulz iterations, x <- (a + b x x^T + c (x x^T)^2) x, bring the singular values to
    between about 0.7 and 1.2. The coefficients are those of Jordan et al. Most matrices have many
    more columns than rows. To multiply by x only twice, the polynomials are computed for x x^T
    alone, with which they commute.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    square = x @ x.T
    product = identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = 3.4445 * identity - 4.7750 * square + 2.0315 * square @ square
        product = factor @ product
        square = factor @ square @ factor
    return product @ x
