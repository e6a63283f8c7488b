"""Tests of reading and writing checkpoints: damaged, hostile and old ones."""

import re
import time

import pytest
import torch
from models import save_compressed

from modules import VQVAE
from training.checkpoint import CHECKPOINT_FORMAT, load_model, read_checkpoint, write_checkpoint
from utils import CheckpointError

SMALL = {"hidden_channels": 16, "residual_channels": 8, "embedding_dim": 8, "num_embeddings": 32}


def make_checkpoint(trained, **changes):
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model_args": trained.arguments,
        "model": trained.state_dict(),
    }
    return checkpoint | changes


def nest_codebooks(state):
    """Return a state with the keys that earlier versions gave to several codebooks."""

    def old_key(match):
        return "vector_quantization." + "rest." * int(match[1])

    pattern = r"^vector_quantization\.quantizers\.(\d+)\."
    return {re.sub(pattern, old_key, key): value for key, value in state.items()}


def assert_equal_states(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# ---------------------------------------------------------------- round trips


def test_a_loaded_model_equals_the_saved_one(tmp_path):
    model = VQVAE(**SMALL, codebook="ema", restart_below=0.02)
    write_checkpoint(tmp_path / "best.pt", make_checkpoint(model))
    loaded = load_model(VQVAE, tmp_path / "best.pt")
    assert not loaded.training and loaded.arguments == model.arguments
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images)[0], model.eval()(images)[0])


@pytest.mark.parametrize("number", [1, 2])
def test_models_of_older_formats_load(tmp_path, number):
    model = VQVAE(**SMALL)
    torch.save(make_checkpoint(model, format=number), tmp_path / "best.pt")
    loaded = load_model(VQVAE, tmp_path / "best.pt")
    assert_equal_states(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("num_codebooks", [2, 3])
@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_nested_codebooks_of_earlier_versions_load(tmp_path, num_codebooks, codebook):
    model = VQVAE(**SMALL, num_codebooks=num_codebooks, codebook=codebook)
    nested = nest_codebooks(model.state_dict())
    first, last = "vector_quantization.", "vector_quantization." + "rest." * (num_codebooks - 1)
    assert {f"{first}embedding.weight", f"{last}embedding.weight"} <= set(nested)
    torch.save(make_checkpoint(model, model=nested), tmp_path / "best.pt")
    loaded = load_model(VQVAE, tmp_path / "best.pt")
    assert_equal_states(loaded.state_dict(), model.state_dict())
    state = read_checkpoint(tmp_path / "best.pt")["model"]  # as a resumed run reads it
    assert_equal_states(state, model.state_dict())


def test_a_key_with_a_million_levels_is_read_quickly(tmp_path):
    state = {"vector_quantization." + "rest." * 1_000_000 + "x": torch.zeros(1)}
    torch.save(make_checkpoint(VQVAE(**SMALL), model=state), tmp_path / "best.pt")
    start = time.perf_counter()
    assert list(read_checkpoint(tmp_path / "best.pt")["model"]) == [
        "vector_quantization.quantizers.1000000.x"
    ]
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------- damaged and hostile files


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "best.pt does not exist; train.py"),
        (b"", "cannot be read as a checkpoint"),
        (b"text, not a checkpoint", "cannot be read as a checkpoint"),
        ([1, 2], "not a checkpoint of this project"),
        ({"model": {}}, "lacks format, model_args or model"),
        (make_checkpoint(VQVAE(**SMALL), format=99), "checkpoint format 99"),
        (make_checkpoint(VQVAE(**SMALL), format=torch.zeros(2)), "checkpoint format tensor"),
        (make_checkpoint(VQVAE(**SMALL), model_args={"depth": 3}), "does not fit this version"),
        (make_checkpoint(VQVAE(**SMALL), model_args=None), "does not fit this version"),
        (make_checkpoint(VQVAE(**SMALL), model={}), "does not fit this version"),
        (make_checkpoint(VQVAE(**SMALL), model=[1]), "does not fit this version"),
        (
            make_checkpoint(VQVAE(**SMALL), extra=Payload()),
            r"refers to (builtins\.)?exec, which .* could be code; it was not run",
        ),
    ],
)
def test_unusable_checkpoints_are_refused(tmp_path, content, message):
    path = tmp_path / "best.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_model(VQVAE, path)


def test_truncated_checkpoints_are_refused(tmp_path):
    path = tmp_path / "best.pt"
    torch.save(make_checkpoint(VQVAE(**SMALL)), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(path)


def test_compressed_checkpoints_are_refused(tmp_path):
    save_compressed(tmp_path / "b.pt", make_checkpoint(VQVAE(**SMALL)))
    with pytest.raises(CheckpointError, match="is compressed"):
        read_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_channels", 10**6),
        ("num_residual_layers", 1000),
        ("num_codebooks", 1000),
        ("num_embeddings", 10**12),
    ],
)
def test_a_model_larger_than_its_file_is_never_built(tmp_path, name, value):
    model = VQVAE(**SMALL)
    arguments = model.arguments | {name: value}
    torch.save(make_checkpoint(model, model_args=arguments), tmp_path / "best.pt")

    def build(**arguments):
        raise AssertionError("the model was built")

    with pytest.raises(CheckpointError, match=f"{name} is {value}; a checkpoint with .* allows"):
        build.__name__ = "VQVAE"
        load_model(build, tmp_path / "best.pt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    model = VQVAE(**SMALL)
    name = "vector_quantization.embedding.weight"
    state = model.state_dict() | {name: torch.zeros(1).expand(1 << 21, 8)}  # 4 bytes in the file
    arguments = model.arguments | {"num_embeddings": 1 << 21}
    checkpoint = make_checkpoint(model, model=state, model_args=arguments)
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="more elements than the file stores"):
        load_model(VQVAE, tmp_path / "best.pt")
