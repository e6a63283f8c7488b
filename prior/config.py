"""Configure the training of a prior: the flags of train_prior.py, and both models' defaults.

flags = parse_prior_flags(argv, __doc__)         # only the flags that were typed
config = resolve_prior_config(flags)             # flags override the defaults of the model
check_prior_config(config, flags, world_size)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from training.config import RunConfig, check_processes
from training.options import check_bounds, flag_name, option, parse_flags
from utils import UserError

PRIOR_GROUP = "prior (defaults: flow | causal)"
GROUPS_OF_MODELS = {"flow": "only with --model flow", "causal": "only with --model causal"}
_prior = partial(option, group=PRIOR_GROUP)
_flow = partial(option, group=GROUPS_OF_MODELS["flow"])
_causal = partial(option, group=GROUPS_OF_MODELS["causal"])


@dataclass(frozen=True, kw_only=True)
class PriorConfig(RunConfig):
    """The configuration of train_prior.py. The defaults are those of the flow."""

    run: str | None = option(
        None,
        "folder of the VQ-VAE's run (default: the newest run in --runs-dir)",
        group="run",
        metavar="DIR",
        resumable=True,
    )
    model: str = option(
        "flow",
        "rectified flow over latents, which samples slices; or causal network over codes, which "
        "gives code lengths (default: flow)",
        group="run",
        choices=("flow", "causal"),
    )

    # Both models
    epochs: int = _prior(200, "passes over the training split", low=1, resumable=True)
    batch_size: int = _prior(16, "slices per step", low=1)
    learning_rate: float = _prior(4e-3, "peak learning rate", low=0, high=1)
    weight_decay: float = _prior(0.01, "weight decay of all matrices", low=0, high=10)
    channels: int = _prior(
        48,
        "width of the network. Flow: channels on the finest grid, a multiple of 12; causal: "
        "channels of every layer (on a GPU with thousands of slices, try 96 | 256)",
        low=1,
    )

    keep_every: int = option(
        0,
        "keep a checkpoint epoch_<n>.pt after every N epochs, to compare samples; 0: none "
        "(default: 0)",
        group="run",
        metavar="N",
        low=0,
        resumable=True,
    )

    # Flow
    components: int = _flow(
        8, "maximum number of principal components of the latents (default: 8)", low=1, high=1024
    )

    # Causal network
    dropout: float = _causal(0.0, "fraction of dropped activations (default: 0)", low=0, high=0.99)
    mirrored: float = _causal(
        0.5, "fraction of training slices that are mirrored (default: 0.5)", low=0, high=1
    )
    num_layers: int = _causal(6, "residual blocks of the causal network (default: 6)", low=1)

    # Fixed values, which are not flags
    warmup = 0.05
    clip_grad_norm = 1.0
    unknown_position = 0.1  # probability that a training slice's position is hidden
    completed = 0.2  # probability that one half of a training slice is given

    @property
    def schedule(self) -> str:
        return "cosine" if self.model == "causal" else "linear"


# The fields in which the defaults of the causal network differ from those of the flow.
CAUSAL = {
    "model": "causal",
    "epochs": 30,
    "batch_size": 2,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "channels": 128,
}


def parse_prior_flags(argv: list[str] | None, description: str | None) -> dict:
    """Return only the flags of train_prior.py that were typed; `--help` shows both defaults."""
    return parse_flags(PriorConfig, argv, description, alternatives=(PRIOR_GROUP, CAUSAL))


def resolve_prior_config(flags: dict) -> PriorConfig:
    """Build the configuration; flags override the defaults of the model."""
    return PriorConfig(**(CAUSAL | flags if flags.get("model") == "causal" else flags))


def check_prior_config(config: PriorConfig, flags: dict, world_size: int) -> None:
    """Raise UserError if a value is invalid, or if a typed flag is for the other model."""
    check_bounds(config)
    check_processes(config, world_size)
    if config.model == "flow" and config.channels % 12:
        raise UserError(f"--channels is {config.channels}; expected a multiple of 12 for the flow")
    for field in dataclasses.fields(config):
        for model, group in GROUPS_OF_MODELS.items():
            if field.name in flags and field.metadata["group"] == group and model != config.model:
                raise UserError(
                    f"{flag_name(field.name)} does not apply to the {config.model} prior; omit it, "
                    f"or train with --model {model}"
                )
