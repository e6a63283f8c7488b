"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate(args: dict, step: int, steps: int) -> float:
    """Of step 0..steps-1: a linear warm-up, then constant or a cosine down to zero."""
    warmup = round(args["warmup"] * steps)
    if step < warmup:
        return args["learning_rate"] * (step + 1) / warmup
    if args["schedule"] == "constant":
        return args["learning_rate"]
    return (
        args["learning_rate"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    )
