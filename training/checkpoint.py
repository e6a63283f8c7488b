"""Read and write checkpoints.

A checkpoint is a dictionary of tensors and plain values: "format", "model_args" (arguments of the
model's class), "model" (the model's state) and, if a run wrote it, the progress of training.

Checkpoints are shared between users, so reading one must neither run code nor exhaust the memory.
The comment at each check below names the attack that it stops.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import CheckpointError, first_line, write_bytes

# Models can still be loaded from formats 1 and 2. Their runs cannot be resumed, because these
# formats lack step counters.
CHECKPOINT_FORMAT = 3


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically."""
    # torch.save(checkpoint, path) would report a full disk as a RuntimeError, which would look like
    # a bug in the program. `write_bytes` raises an OSError.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_bytes(path, content.getbuffer())


def read_checkpoint(path: Path | str, device: str | torch.device = "cpu") -> dict:
    """Return the dictionary of a checkpoint, with keys renamed to those of this version.

    Raises:
        CheckpointError: if the file is missing, damaged, unsafe or not a checkpoint.
    """
    try:
        is_compressed = _is_compressed(path)
        if not is_compressed:
            # Attack: pickled code that runs when it is read. `weights_only` refuses it.
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path} does not exist; train.py (VQ-VAE) or train_prior.py (prior) "
            "creates it in the folder of a run, such as runs/seed0"
        ) from None
    except Exception as error:  # damaged bytes can make the unpickler raise any exception
        raise CheckpointError(_describe_failure(path, error)) from None
    if is_compressed:
        raise CheckpointError(
            f"{path} is compressed; expected the uncompressed file that train.py writes"
        )
    if not isinstance(checkpoint, dict) or not {"format", "model_args", "model"} <= set(checkpoint):
        raise CheckpointError(
            f"{path} is not a checkpoint of this project (it lacks format, model_args or model); "
            "use the best.pt or last.pt of a run"
        )
    number = checkpoint["format"]
    if not isinstance(number, int) or not 1 <= number <= CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {number!r}; expected 1 to {CHECKPOINT_FORMAT}. Use the "
            "version of this project that wrote it"
        )
    if isinstance(checkpoint["model"], dict):
        checkpoint["model"] = rename_codebooks(checkpoint["model"])
    return checkpoint


def _is_compressed(path: Path | str) -> bool:
    """Return whether any record of a checkpoint's zip file is compressed.

    Attack: a small file that unpacks to a thousand times its size. If the file is not a zip file,
    as in torch's older formats, an exception is raised.
    """
    with zipfile.ZipFile(path) as archive:
        return any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())


def _describe_failure(path: Path | str, error: Exception) -> str:
    """Return the error message for an exception that `torch.load` raised."""
    pattern = r"(?i)unsupported (?:global|class|operand):?\s+(?:global )?(\S+)"
    refused = re.search(pattern, str(error))
    if refused is None:
        return (
            f"{path} cannot be read as a checkpoint ({first_line(error)}); use another file, or "
            "train again"
        )
    return (
        f"{path} refers to {refused[1]:.80}, which is neither a tensor nor a plain value and could "
        "be code; it was not run. Use a checkpoint of this project"
    )


def rename_codebooks(state: dict) -> dict:
    """Return a model's state, with the codebooks' keys renamed to those of this version.

    Earlier versions nested several codebooks: `vector_quantization.X` was the first,
    `vector_quantization.rest.X` the second, `vector_quantization.rest.rest.X` the third. They are
    now `vector_quantization.quantizers.0.X`, `.1.X` and `.2.X`. An optimizer's state refers to the
    parameters by number, so it stays valid: the order of the parameters is the same.
    """
    if not any(str(key).startswith("vector_quantization.rest.") for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"vector_quantization\.((?:rest\.)*)(.*)", str(key), re.DOTALL)
        if match:
            number = len(match[1]) // len("rest.")
            key = f"vector_quantization.quantizers.{number}.{match[2]}"
        renamed[key] = value
    return renamed


def load_model(
    cls: type[nn.Module], path: Path | str, device: str | torch.device = "cpu"
) -> nn.Module:
    """Return the model of a checkpoint, in eval mode.

    Args:
        cls: class of the model, which is called with the checkpoint's "model_args".
        path: file of the checkpoint.
        device: the device to load the model to.

    Raises:
        CheckpointError: if the checkpoint cannot be read or does not fit the class.
    """
    checkpoint = read_checkpoint(path, device)
    arguments, state = checkpoint["model_args"], checkpoint["model"]
    try:
        _check_sizes(arguments, state)
        # Attack: a small checkpoint whose arguments ask for a huge model. On the meta device, the
        # model is built without allocating memory. The file must have exactly the model's tensors.
        with torch.device("meta"):
            expected = cls(**arguments).state_dict()
        if _shapes(expected) != _shapes(state):
            raise ValueError("its tensors do not match a model that is built from its model_args")
        model = cls(**arguments)
        model.load_state_dict(state)
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        RuntimeError,
        ValueError,
    ) as error:
        # Arguments or tensors of an unexpected type or size can raise any of these.
        raise CheckpointError(
            f"{path} does not fit this version's {cls.__name__} ({first_line(error)}); use the "
            "version that wrote it, or train again"
        ) from None
    return model.to(device).eval()


def _check_sizes(arguments: dict, state: dict[str, Tensor]) -> None:
    """Check that each tensor is stored completely, and that each argument fits the tensors.

    Raises:
        ValueError: if a tensor is larger than its storage, or an argument is out of range.
    """
    for tensor in state.values():
        # Attack: a tensor with strides of 0, which stores a few bytes but claims a large shape.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError("its tensors have more elements than the file stores")
    # Attack: so many layers that building them takes hours, even on the meta device. Each layer and
    # each codebook has a tensor, and no dimension exceeds the total number of weights.
    max_modules = len(state)
    max_size = sum(tensor.numel() for tensor in state.values())
    for name, value in arguments.items():
        if not isinstance(value, int | float):
            continue
        is_count_of_modules = "layers" in name or "codebooks" in name
        limit = max_modules if is_count_of_modules else max_size
        if not -1 <= value <= limit:
            unit = "tensors" if is_count_of_modules else "weights"
            raise ValueError(
                f"{name} is {value}; a checkpoint with {limit:,} {unit} allows -1 to {limit:,}"
            )


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return {name: shape} of a model's state."""
    return {name: tensor.shape for name, tensor in state.items()}
