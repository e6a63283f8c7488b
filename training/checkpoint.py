"""Read and write checkpoints."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import torch

from utils import CheckpointError, write_bytes

CHECKPOINT_FORMAT = (
    3  # of runs: 1 and 2 can't go on, as they lack what a run counts by now; their models load
)


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    content = (
        io.BytesIO()
    )  # torch's own writing doesn't tell a full disk from a mistake in the program
    torch.save(checkpoint, content)
    write_bytes(path, content.getbuffer())


def load_model(cls, path, device: str | torch.device = "cpu"):
    checkpoint = read_checkpoint(path, device)
    try:
        arguments, state = checkpoint["model_args"], checkpoint["model"]
        most = {True: len(state), False: sum(tensor.numel() for tensor in state.values())}
        if any(
            tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
            for tensor in state.values()
        ):
            raise ValueError("its tensors claim more numbers than it holds")
        for name, value in arguments.items():
            if isinstance(value, int | float) and not -1 <= value <= most["layers" in name]:
                raise ValueError(f"it asks for {value} {name}, and holds {most[False]:,} numbers")
        # First without memory: what it asks for must be what it holds.
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in cls(**arguments).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError("its tensors are not those of its arguments")
        model = cls(**arguments)
        model.load_state_dict(state)
    except (
        AttributeError,
        KeyError,
        TypeError,
        RuntimeError,
        ValueError,
        ArithmeticError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} does not fit this version's {cls.__name__}: {reason}"
        ) from None
    return model.to(device).eval()


def read_checkpoint(path, device: str | torch.device = "cpu") -> dict:
    """A checkpoint's dictionary. Loads tensors and plain types only, never code. Raises `CheckpointError`."""
    try:
        with zipfile.ZipFile(
            path
        ) as archive:  # torch's older forms, and compressed ones, aren't written here
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(
                    f"{path} is compressed, which no checkpoint of this project is"
                )
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; train one with train.py") from None
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        if found := re.search(
            r"(?i)unsupported (?:global|class|operand):?\s+(?:global )?(\S+)", str(error)
        ):
            raise CheckpointError(
                f"{path} names {found[1]:.80}, which is more than tensors and plain values and could be code; nothing "
                "of it was run. Use a checkpoint of this project"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} can't be read as a checkpoint ({reason}); use another, or train again"
        ) from None
    if (
        not isinstance(checkpoint, dict)
        or not {"format", "model_args", "model"} <= checkpoint.keys()
    ):
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: it lacks format, model_args or model"
        )
    if checkpoint["format"] not in range(1, CHECKPOINT_FORMAT + 1):
        found = checkpoint["format"]
        raise CheckpointError(
            f"{path} has checkpoint format {found!r}; this version reads 1 to {CHECKPOINT_FORMAT}"
        )
    return checkpoint
