"""The model: its structure, its quantiser, and the defects of well-known implementations.

A defect's test is a check that ours passes and that fails on the defect, written out here as a subclass.
"""

import pytest
import torch
import torch.nn.functional as F

from modules import VQVAE
from training.checkpoint import CHECKPOINT_FORMAT, load_model, read_checkpoint
from utils import CheckpointError

SMALL = {"hidden_channels": 16, "residual_channels": 8, "embedding_dim": 8, "num_embeddings": 32}


def images(count=2, size=(32, 32), seed=0):
    """Smooth random images, z-scored like real ones."""
    noise = torch.randn(
        count, 1, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(seed)
    )
    smooth = F.interpolate(noise, size=size, mode="bicubic")
    return (smooth - smooth.mean()) / smooth.std()


def fails(check, *args):
    """True if the check's assertions fail."""
    try:
        check(*args)
    except AssertionError:
        return True
    return False


# ---------------------------------------------------------------- structure


def checkpoint_of(trained, **changes):
    return {
        "format": CHECKPOINT_FORMAT,
        "model_args": trained.arguments,
        "model": trained.state_dict(),
    } | changes


def test_from_checkpoint_gives_the_same_model(tmp_path):
    model = VQVAE(**SMALL, codebook="ema", restart_below=0.02).eval()
    torch.save(checkpoint_of(model), tmp_path / "best.pt")
    loaded = load_model(VQVAE, tmp_path / "best.pt")
    assert not loaded.training and loaded.arguments == model.arguments
    x = images()
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint"),
        (b"", "can't be read as a checkpoint"),
        (b"text, not a checkpoint", "can't be read as a checkpoint"),
        ([1, 2], "not a checkpoint of this project"),
        ({"model": {}}, "lacks format, model_args or model"),
        (checkpoint_of(VQVAE(**SMALL), format=99), "checkpoint format 99"),
        (checkpoint_of(VQVAE(**SMALL), model_args={"depth": 3}), "does not fit this version"),
        (checkpoint_of(VQVAE(**SMALL), model={}), "does not fit this version"),
        (
            checkpoint_of(VQVAE(**SMALL), extra=Payload()),
            r"names (builtins\.)?exec, which .* could be code; nothing of it was run",
        ),
    ],
)
def test_checkpoints_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "best.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_model(VQVAE, path)


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "best.pt"
    torch.save(checkpoint_of(VQVAE(**SMALL)), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="can't be read"):
        read_checkpoint(path)


@pytest.mark.parametrize("number", [1, 2])
def test_models_of_older_formats_load(tmp_path, number):
    model = VQVAE(**SMALL)
    torch.save(checkpoint_of(model, format=number), tmp_path / "best.pt")
    loaded = load_model(VQVAE, tmp_path / "best.pt")
    assert all(
        torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()
    )
