"""Entropy-coded files: predict.py --export-codes --entropy-coded, and --from-codes."""

import io
import shutil
import zlib

import numpy as np
import pytest
import torch
from models import make_formula_prior, make_prior, save_model

import predict
from evaluation.codec import read_codes, write_codes
from modules import VQVAE
from mri import nifti
from prior import coding
from prior.coding import EntropyCoder, load_prior
from training.checkpoint import load_model
from utils import DataError, UserError

pytestmark = pytest.mark.skipif(coding.constriction is None, reason="constriction is missing")


@pytest.fixture
def run(untrained_run, tmp_path):
    """A copy of `untrained_run` with a causal prior for slices of up to 20 x 28 pixels."""
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    prior = make_prior(16, 4, (5, 7))
    embedding = load_model(VQVAE, run / "best.pt").vector_quantization.embedding.weight
    prior.initialize(embedding, torch.randint(16, (9, 5, 7)))
    save_model(run / "causal_prior" / "best.pt", prior)
    return run


@pytest.fixture
def call(run, tmp_path):
    """call(path, "--flags", out="out"): call predict.py with the run; returns the output folder."""

    def call(path, flags="", out="out"):
        command = [str(path), "-o", str(tmp_path / out), "--run", str(run), "--device", "cpu"]
        assert predict.main([*command, *flags.split()]) == 0
        return tmp_path / out

    return call


@pytest.fixture
def scan(tmp_path, write_nifti, noise):
    return write_nifti(tmp_path / "scan.nii.gz", noise((20, 6, 28)))


def test_coded_files_restore_the_same_file(tmp_path, scan, call, read_scores):
    first = call(scan, "--export-codes --entropy-coded --axis 1")
    coded = first / "scan_codes.vqc"
    assert int(read_scores(first)[0]["vqc_bytes"]) == coded.stat().st_size
    call(scan, "--export-codes --axis 1")
    fixed = first / "scan_codes.npz"
    assert coded.stat().st_size < fixed.stat().st_size
    name = "scan_reconstruction.nii.gz"
    for path in (coded, fixed):
        folder = call(path, "--from-codes", path.suffix[1:])
        assert (folder / name).read_bytes() == (first / name).read_bytes()
    assert len(list((call(first, "--from-codes", "both")).glob("*.nii.gz"))) == 2


def test_slices_that_do_not_fit_the_prior_are_reported(tmp_path, write_nifti, noise, call):
    scan = write_nifti(tmp_path / "large.nii.gz", noise((32, 6, 28)))
    with pytest.raises(UserError, match=r"8 x 7 codes, but the causal prior is for 5 x 7; add --r"):
        call(scan, "--export-codes --entropy-coded --axis 1")
    assert not list(tmp_path.glob("out/large*"))


def test_what_is_missing_is_reported(scan, run, call, monkeypatch):
    flags = "--export-codes --entropy-coded --axis 1"
    path = call(scan, flags) / "scan_codes.vqc"
    monkeypatch.setattr(coding, "constriction", None)
    with pytest.raises(UserError, match="run pip install constriction"):
        call(path, "--from-codes")
    shutil.rmtree(run / "causal_prior")
    with pytest.raises(UserError, match="run has no causal prior, which entropy coding needs"):
        call(scan, flags)


def test_damaged_files_are_reported(scan, run, call):
    path = call(scan, "--export-codes --entropy-coded --axis 1") / "scan_codes.vqc"
    model = load_model(VQVAE, run / "best.pt")
    coder = EntropyCoder(load_prior(run, model))
    content = path.read_bytes()
    with np.load(io.BytesIO(zlib.decompress(content))) as file:
        arrays = dict(file)

    def damaged(**changes) -> bytes:
        file = io.BytesIO()
        np.savez(file, **(arrays | changes))
        return zlib.compress(file.getvalue())

    middle = len(content) // 2
    cases = {
        "is not an .npz or .vqc file from --export-codes": [
            b"",
            b"text",
            content[:-3],
            content + b"0",
            content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            zlib.compress(bytes(nifti.MAX_VOXELS + 1), 1),
            zlib.compress(b"text"),
        ],
        "is damaged": [
            damaged(words=arrays["words"][::-1]),
            damaged(lengths=arrays["lengths"][:-1]),
            damaged(mean=arrays["mean"][:-1]),
            damaged(shape=[20, 7, 28]),
            damaged(checksum="0"),
        ],
        "was made by model": [damaged(model="0")],
        "was encoded with causal prior": [
            damaged(prior=EntropyCoder(make_formula_prior()).fingerprint)
        ],
        "has format 9": [damaged(format=9)],
    }
    for message, contents in cases.items():
        for damaged_content in contents:
            path.write_bytes(damaged_content)
            with pytest.raises(DataError, match=message):
                read_codes(path, model, coder)
    path.write_bytes(content)
    coded, original = read_codes(path, model, coder)
    assert write_codes(path, model, coded, original, coder) == len(content)
    assert path.read_bytes() == content
