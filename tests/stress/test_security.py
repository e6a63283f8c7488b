"""Test hostile checkpoints, private header fields, and hostile file names."""

import ast
import gzip
import os
from pathlib import Path

import fuzz
import nibabel as nib
import numpy as np
import pytest
import torch
from models import save_compressed

import generate
import predict
import train
import train_prior
from modules import VQVAE
from training.checkpoint import load_model, read_checkpoint
from utils import CheckpointError

ROOT = Path(__file__).parents[2]
HEADER_FIELDS = ("descrip", "db_name", "aux_file", "intent_name")
SECRET = b"DOE^JANE"


# ---------------------------------------------------------------- checkpoints


def small_checkpoint() -> dict:
    model = VQVAE(hidden_channels=4, residual_channels=2, num_embeddings=4, embedding_dim=2)
    return {"format": 3, "model_args": model.arguments, "model": model.state_dict()}


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("key", ["model", "model_args", "extra"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, key):
    path = tmp_path / "best.pt"
    torch.save(small_checkpoint() | {key: Payload(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match="could be code; it was not run"):
        load_model(VQVAE, path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the payload works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_channels", 10**6),
        ("num_residual_layers", 10**7),
        ("num_embeddings", 10**12),
    ],
)
def test_a_checkpoint_that_asks_for_a_larger_model_is_refused(tmp_path, name, value):
    checkpoint = small_checkpoint()
    checkpoint["model_args"] = checkpoint["model_args"] | {name: value}
    torch.save(checkpoint, tmp_path / "best.pt")
    with fuzz.limits(), pytest.raises(CheckpointError, match="does not fit"):
        load_model(VQVAE, tmp_path / "best.pt")


def test_a_checkpoint_with_tensors_larger_than_their_storage_is_refused(tmp_path):
    checkpoint = small_checkpoint()
    checkpoint["model_args"] = checkpoint["model_args"] | {"num_embeddings": 1 << 21}
    weight = torch.zeros(1).expand(1 << 21, 2)  # four bytes in the file
    checkpoint["model"]["vector_quantization.embedding.weight"] = weight
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="more elements than the file stores"):
        load_model(VQVAE, tmp_path / "best.pt")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A compressed zip file may unpack to a thousand times its size."""
    save_compressed(tmp_path / "b.pt", small_checkpoint())
    with pytest.raises(CheckpointError, match="is compressed"):
        read_checkpoint(tmp_path / "b.pt")


# ---------------------------------------------------------------- source code


FORBIDDEN_MODULES = {"pickle", "shelve", "marshal", "dill", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "__import__"}


def source_files() -> list[Path]:
    """Return all Python files outside tests/ and hidden folders."""
    files = []
    for path in ROOT.rglob("*.py"):
        folders = path.relative_to(ROOT).parts[:-1]
        is_hidden = any(folder.startswith(".") for folder in folders)
        if not is_hidden and "tests" not in folders and "runs" not in folders:
            files.append(path)
    return files


def test_the_source_files_of_all_packages_are_checked():
    names = {str(path.relative_to(ROOT)) for path in source_files()}
    assert {"train.py", "mri/nifti.py", "training/checkpoint.py", "prior/model.py"} <= names


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_can_run_what_it_reads(path):
    """Forbid eval, pickle and shells, and loading of arrays or checkpoints that would unpickle."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert function not in FORBIDDEN_CALLS
            assert keywords.get("shell", "False") == "False"
            assert keywords.get("allow_pickle", "False") == "False"
            if function == "torch.load":
                assert keywords.get("weights_only") == "True"


# ---------------------------------------------------------------- headers and file names


@pytest.fixture
def private_data(tmp_path) -> list[str]:
    """Write data with private headers and odd file names, and return the names."""
    names = ["case_004_$x^$_\\frac{", "=cmd|' !A0", "na\udcffme", "line\nbreak", "a" * 200]
    for split in ("train", "validate", "test"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            array = np.random.default_rng(i).integers(0, 900, (256, 128)).astype(np.int16)
            image = nib.Nifti1Image(array, np.diag([2, 3, 4, 1]))
            for field in HEADER_FIELDS:
                image.header[field] = SECRET
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET))
            (folder / f"{name}.nii").write_bytes(image.to_bytes())
    return names


def test_odd_names_and_private_headers_do_not_leave_the_data(
    tmp_path, private_data, monkeypatch, small
):
    """Run all scripts: they write only to their folders, and no header field of the input."""
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    run_flags = ["--run", "runs/a"]
    prior_flags = ["--epochs", "1", "--channels", "24"]
    slice_path = os.fsdecode(os.fsencode(f"data/train/{private_data[0]}.nii"))
    train_flags = ["--size", "64", "64", "--epochs", "1", "--name", "a"]
    assert train.main(["--data", "data", *small, *train_flags]) == 0
    assert predict.main(run_flags) == 0
    assert train_prior.main([*run_flags, *prior_flags]) == 0
    assert generate.main([*run_flags, "--count", "1"]) == 0
    assert generate.main([*run_flags, "--complete", slice_path, "--count", "1"]) == 0

    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    folders = {path.relative_to(tmp_path).parts[0] for path in written}
    assert folders == {"runs", "default_cache"}
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        assert SECRET not in content, path

    generated = tmp_path / "runs" / "a" / "generated"
    for path in generated.glob("*.nii.gz"):
        header = nib.load(path).header
        assert not any(header[name].item() for name in HEADER_FIELDS)
        assert not header.extensions
    completed = nib.load(generated / "completion_000.nii.gz")
    voxel_sizes = nib.affines.voxel_sizes(completed.affine).tolist()
    assert voxel_sizes == [8, 6, 4]  # 2, 3 and 4 mm, resized from 256 x 128 to 64 x 64
    table = (tmp_path / "runs" / "a" / "test" / "slices.csv").read_text("utf-8")
    assert len(table.splitlines()) == 1 + len(private_data)
    assert "na\\udcffme" in table
    assert "line\\nbreak" in table
