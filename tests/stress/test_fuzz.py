"""Damaged, hostile and odd input: a file ends in a slice or in one clear error, and nothing in it is run or repeated.
benchmarks/fuzz.py is the long form of the first test."""

# ruff: noqa: E402 (what is not on every system is looked for first)
import ast
import gzip
import os
import struct
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
import utils
from modules import VQVAE
from mri import hipmri, preprocessing
from training.checkpoint import load_model, read_checkpoint
from training.config import with_defaults
from training.run_folder import read_arguments
from utils import CheckpointError, UserError

pytest.importorskip("resource", reason="limits of memory are Unix's")

import generate
import predict
import train
import train_prior

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz

SHAPE = (24, 16)
FLOATS = st.floats(
    width=32, allow_subnormal=False
)  # older torch takes those from the whole process


def nifti(array=None, **fields) -> bytes:
    """A whole file, of which header fields are changed afterwards."""
    image = nib.Nifti1Image(
        np.arange(384, dtype=np.int16).reshape(SHAPE) if array is None else array, np.eye(4)
    )
    content = bytearray(image.to_bytes())
    for name, value in fields.items():
        dtype, offset = nib.Nifti1Header.template_dtype.fields[name][:2]
        content[offset : offset + dtype.itemsize] = (
            np.array(value).astype(dtype.base).tobytes().ljust(dtype.itemsize)
        )
    return bytes(content)


# ---------------------------------------------------------------- by chance


def test_damaged_files_end_in_a_slice_or_the_one_error(tmp_path):
    rows = fuzz.fuzz(200, 1, tmp_path)
    assert sum(row["files"] for row in rows) == 700
    for row in rows:
        assert row["crashes"] == [] and row["refused"] > 0, row
    for row in (
        rows[0],
        rows[-1],
    ):  # headers, values of config.json: neither all hopeless nor all harmless
        assert row["read"] > 5 and row["refused"] > 5, row


def test_what_the_long_form_counts_as_a_crash(tmp_path):
    """The check itself: exceptions, time and memory."""

    def slow(path):
        while True:
            pass

    def swallowing(path):
        try:
            slow(path)
        except Exception:
            return False

    def greedy(path):
        return bool(np.ones(1 << 28).sum())  # 2 GiB

    tries = (
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (slow, "over 1 s"),
        (swallowing, "over 1 s"),
    )
    for read, message in (*tries, (greedy, "MemoryError")):
        seconds, fuzz.SECONDS = fuzz.SECONDS, 1
        try:
            row = fuzz.attempt("x", 1, lambda: b"", tmp_path / "file", read)
        finally:
            fuzz.SECONDS = seconds
        assert len(row["crashes"]) == 1 and message in row["crashes"][0]


@settings(max_examples=300, deadline=None)
@given(
    dims=st.lists(st.integers(-3, 40) | st.integers(-(1 << 15), (1 << 15) - 1), min_size=8, max_size=8),
    datatype=st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1792, 2304]) | st.integers(0, 3000),
    slope=FLOATS, inter=FLOATS, offset=FLOATS | st.just(352.0),
    order=st.sampled_from("<>"), compress=st.booleans(), pixels=st.binary(max_size=2000),
)  # fmt: skip
def test_any_header_ends_in_a_slice_or_the_one_error(tmp_path_factory, dims, datatype, slope, inter, offset, order,
                                                     compress, pixels):  # fmt: skip
    header = nib.Nifti1Header(endianness=order)
    with np.errstate(all="ignore"):
        header["dim"], header["scl_slope"], header["scl_inter"], header["vox_offset"] = (
            dims,
            slope,
            inter,
            offset,
        )
    header["datatype"] = datatype
    content = header.binaryblock + b"\0" * 4 + pixels
    path = tmp_path_factory.getbasetemp() / "any.nii.gz"
    path.write_bytes(gzip.compress(content) if compress else content)
    with fuzz.bounds():
        fuzz.read_nifti(path)


# ---------------------------------------------------------------- by name


def special_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (content, what is said of it; "": it is a slice)."""
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    big = bytes(nib.Nifti1Header(endianness=">").binaryblock)
    huge = nib.Nifti2Header()
    huge["dim"], huge["datatype"], huge["bitpix"] = [3, 10**4, 10**4, 10**4, 1, 1, 1, 1], 4, 16
    big = nib.Nifti1Image(
        np.ones(SHAPE, ">i2") * np.arange(16), np.eye(4), nib.Nifti1Header(big)
    ).to_bytes()
    whole, unfilled = nifti(), nifti(dim=[2, 11000, 11000, 1, 1, 1, 1, 1])
    return {
        "10^12 voxels": (huge.binaryblock + b"\0" * 999, "10000 x 10000 x 10000, expected at most 134,217,728"),
        "gzip bomb": (gzip.compress(whole) + gzip.compress(b"\0" * (1 << 28)), ""),  # what lies behind is not read
        "bomb of a slice": (gzip.compress(unfilled), "its header tells of 242,000,352"),
        "dims of 0": (nifti(dim=[2, 0, 16, 1, 1, 1, 1, 1]), "has shape 0 x 16"),
        "negative dims": (nifti(dim=[2, -24, 16, 1, 1, 1, 1, 1]), "has shape -24 x 16"),
        "no dims": (nifti(dim=[0] * 8), "has shape"),
        "NaN slope": (nifti(scl_slope=np.nan), ""),  # by the standard, no scaling
        "NaN intercept": (nifti(scl_slope=1.0, scl_inter=np.nan), "Valid slope but invalid intercept nan"),
        "5-D": (nifti(np.zeros((9, 9, 1, 2, 3), np.int16)), "has shape 9 x 9 x 1 x 2 x 3, expected a 2D slice"),
        "complex": (nifti(np.zeros(SHAPE, np.complex64)), "holds complex64 values"),
        "RGB": (nifti(rgb), "expected one real number a pixel"),
        "pair": (nifti(magic=b"ni1\0"), "is the header of a pair of files"),
        "big-endian": (big, ""),
        "pixels far away": (nifti(vox_offset=3e9), "has its pixels at byte"),
        "extension of a gigabyte": (whole[:348] + struct.pack("<4bii", 1, 0, 0, 0, 1 << 30, 6) + whole[360:], ""),
    }  # fmt: skip


@pytest.mark.parametrize("name", special_files())
def test_special_files(tmp_path, name):
    content, message = special_files()[name]
    path = tmp_path / "case_004_week_0_slice_0.nii.gz"
    path.write_bytes(content)
    with fuzz.bounds():
        fuzz.read_nifti(path)
        if message:
            with pytest.raises(utils.DataError) as error:
                dataset.read_slice(path)
            assert message in str(error.value) and "can't be decoded" not in str(error.value)
        else:
            assert dataset.read_slice(path).shape == (1, 256, 128)


@pytest.mark.parametrize("kind", ["fifo", "loop", "device", "folder"])
def test_what_is_no_file(tmp_path, write_slices, kind):
    """Beside good slices: named in the error, with its reason, and nothing waits for it."""
    data = write_slices(tmp_path / "d")
    path = data / "keras_slices_train" / "odd.nii.gz"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    reasons = {
        "fifo": "is no regular file",
        "loop": "Too many levels",
        "device": "is no regular file",
        "folder": "is a folder",
    }
    with pytest.raises(utils.DataError, match=f"odd.nii.gz.*{reasons[kind]}"):
        dataset.load_split(
            hipmri.find_hipmri(data), "train", cache_dir=tmp_path / "cache", progress=False
        )
    with pytest.raises(
        utils.DataError, match=f"odd.nii.gz {reasons[kind] if kind != 'loop' else ''}"
    ):
        preprocessing.slice_affine(path)


def test_pairs_of_hdr_and_img_are_told_what_to_do(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("a.hdr", "a.img"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(utils.DataError, match=r"no slices found(?s:.*)1 \.hdr file\(s\).*convert"):
        hipmri.find_hipmri(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\xff", '{"arguments": 3}',
                                  '{"arguments": {"stride": "4"}}', '{"arguments": {"epochs": true}}',
                                  '{"arguments": {"data": [1]}}'])  # fmt: skip
def test_a_config_that_cannot_be_used(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_arguments(tmp_path, with_defaults("tuned", {}))


# ---------------------------------------------------------------- security


def small_checkpoint(**more) -> dict:
    model = VQVAE(hidden_channels=4, residual_channels=2, num_embeddings=4, embedding_dim=2)
    return {"format": 3, "model_args": model.arguments, "model": model.state_dict()} | more


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("where", ["model", "model_args", "extra"])
def test_a_checkpoint_with_code_does_not_run_it(tmp_path, where):
    torch.save(small_checkpoint(**{where: Payload(tmp_path / "ran")}), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="could be code; nothing of it was run"):
        load_model(VQVAE, tmp_path / "best.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "best.pt", weights_only=False)  # what others would do
    assert (tmp_path / "ran").exists()


def test_a_checkpoint_that_asks_for_more_than_it_holds(tmp_path):
    for name, value in (
        ("hidden_channels", 10**6),
        ("num_residual_layers", 10**7),
        ("num_embeddings", 10**12),
    ):
        checkpoint = small_checkpoint()
        checkpoint["model_args"] = checkpoint["model_args"] | {name: value}
        torch.save(checkpoint, tmp_path / "best.pt")
        with fuzz.bounds(), pytest.raises(CheckpointError, match="does not fit"):
            load_model(VQVAE, tmp_path / "best.pt")
    checkpoint = small_checkpoint()
    checkpoint["model_args"] = checkpoint["model_args"] | {"num_embeddings": 1 << 21}
    name = "vector_quantization.embedding.weight"
    checkpoint["model"][name] = torch.zeros(1).expand(1 << 21, 2)  # eight bytes in the file
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="claim more numbers than it holds"):
        load_model(VQVAE, tmp_path / "best.pt")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """Zip files may hold a thousand times their size."""
    torch.save(small_checkpoint(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as one,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for record in one.infolist():
            other.writestr(record.filename, one.read(record))
    with pytest.raises(CheckpointError, match="is compressed"):
        read_checkpoint(tmp_path / "b.pt")


def test_no_script_can_run_what_it_reads():
    """No eval, exec, pickle, shell, and no loading of arrays or checkpoints that would unpickle."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "shelve", "marshal", "dill", "joblib"}, path
            if isinstance(node, ast.Call):
                called, keywords = (
                    ast.unparse(node.func),
                    {k.arg: ast.unparse(k.value) for k in node.keywords},
                )
                assert called not in (
                    "eval",
                    "exec",
                    "compile",
                    "os.system",
                    "os.popen",
                    "__import__",
                ), path
                assert (
                    keywords.get("shell", "False") == "False"
                    and keywords.get("allow_pickle", "False") == "False"
                )
                assert called != "torch.load" or keywords.get("weights_only") == "True", path


def test_names_and_headers_stay_where_they_belong(tmp_path, monkeypatch, small, own_signals):
    """Odd file names do no harm and write nowhere else; header fields appear in nothing that is written."""
    secret = b"DOE^JANE"
    names = ["case_004_$x^$_\\frac{", "=cmd|' !A0", "na\udcffme", "line\nbreak", "a" * 200]
    for split in ("train", "validate", "test"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            array = np.random.default_rng(i).integers(0, 900, (256, 128)).astype(np.int16)
            image = nib.Nifti1Image(array, np.diag([2, 3, 4, 1]))
            for field in ("descrip", "db_name", "aux_file", "intent_name"):
                image.header[field] = secret
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", secret))
            (folder / f"{name}.nii").write_bytes(image.to_bytes())
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert train.main(["--data", "data", *small, "--epochs", "1", "--name", "a"]) == 0
    assert predict.main(["--run", "runs/a"]) == 0
    assert (
        train_prior.main(
            ["--run", "runs/a", "--epochs", "1", "--channels", "8", "--num-layers", "1"]
        )
        == 0
    )
    assert generate.main(["--run", "runs/a", "--count", "1"]) == 0
    given = os.fsdecode(os.fsencode("data/train/" + names[0] + ".nii"))
    assert generate.main(["--run", "runs/a", "--complete", given, "--count", "1"]) == 0
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.relative_to(tmp_path).parts[0] for path in written} == {"runs", "default_cache"}
    for path in written:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert secret not in content, path
    for path in (tmp_path / "runs" / "a" / "generated").glob("*.nii.gz"):
        header = nib.load(path).header
        fields = ("descrip", "db_name", "aux_file", "intent_name")
        assert not any(header[name].item() for name in fields) and not header.extensions
    completed = nib.load(tmp_path / "runs" / "a" / "generated" / "completion_000.nii.gz")
    assert nib.affines.voxel_sizes(completed.affine).tolist() == [2, 3, 4]
    table = (tmp_path / "runs" / "a" / "test" / "slices.csv").read_text("utf-8")
    assert (
        len(table.splitlines()) == 1 + len(names)
        and "na\\udcffme" in table
        and "line\\nbreak" in table
    )
