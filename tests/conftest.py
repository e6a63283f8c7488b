"""Fixtures that more than one test file uses."""

import contextlib
import gzip
import io
import os
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import dataset
from mri.hipmri import find_hipmri
from mri.preprocessing import Preprocessing


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """No test reads the user's data folder or writes to the user's cache."""
    monkeypatch.delenv("HIPMRI_DATA", raising=False)
    monkeypatch.setenv("HIPMRI_CACHE", str(tmp_path / "default_cache"))


@pytest.fixture(autouse=True)
def own_torch_settings():
    """No test changes settings of torch for the tests that follow in the same process."""
    before = torch_settings()
    yield
    assert torch_settings() == before


def torch_settings() -> dict:
    return {
        "threads": torch.get_num_threads(),
        "data type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "TF32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
    }


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Flags of a model that trains in seconds, with 4 slices per step."""
    flags = {
        "hidden-channels": 8,
        "residual-channels": 4,
        "embedding-dim": 4,
        "num-embeddings": 16,
        "batch-size": 4,
    }
    flags |= {"num-residual-layers": 1, "num-code-layers": 1, "refine-channels": 2, "crop": 64}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))] + [
        "--device",
        "cpu",
    ]


@pytest.fixture
def real_data() -> Path:
    """$HIPMRI_REAL_DATA, which contains prostatex/: real slices in HipMRI's 2D layout."""
    folder = Path(os.environ.get("HIPMRI_REAL_DATA") or "not set")
    if not (folder / "prostatex").is_dir():
        pytest.skip(
            f"$HIPMRI_REAL_DATA is {folder}; expected a folder that contains prostatex/ "
            "(real slices are not in the repository)"
        )
    return folder


@pytest.fixture(scope="session")
def write_nifti():
    """write(path, array, affine=identity, compress=by name): write a NIfTI file and its folders."""

    def write(path: Path, array: np.ndarray, affine=None, compress: bool | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_bytes()
        compress = path.name.endswith(".gz") if compress is None else compress
        path.write_bytes(gzip.compress(data, 1) if compress else data)
        return path

    return write


@pytest.fixture(scope="session")
def write_slices(write_nifti):
    """write(root, train=4, validate=2, test=2): write noise in HipMRI's 2D layout; returns root."""

    def write(root: Path, shape=(256, 128), prefix="keras_slices_", **counts: int) -> Path:
        rng = np.random.default_rng(0)
        cases = {"train": 4, "validate": 36, "test": 40}
        for split, count in ({"train": 4, "validate": 2, "test": 2} | counts).items():
            for i in range(count):
                name = f"case_{cases[split]:03d}_week_0_slice_{i}.nii.gz"
                write_nifti(
                    root / f"{prefix}{split}" / name, rng.integers(0, 900, shape).astype(np.int16)
                )
        return root

    return write


@pytest.fixture(scope="session")
def blobs(tmp_path_factory, write_nifti) -> Path:
    """HipMRI's layout with 10 training and 3 validation slices that can be learned in seconds."""
    root = tmp_path_factory.mktemp("blobs")
    generator = torch.Generator().manual_seed(0)
    for split, case, count in (("train", "004", 10), ("validate", "036", 3)):
        for i in range(count):
            coarse = torch.rand(1, 1, 16, 8, generator=generator)
            smooth = torch.nn.functional.interpolate(coarse, size=(256, 128), mode="bilinear")
            path = root / f"keras_slices_{split}" / f"case_{case}_week_0_slice_{i}.nii.gz"
            write_nifti(path, (1000 * smooth[0, 0]).short().numpy())
    return root


@pytest.fixture
def train_here(tmp_path, blobs, small, monkeypatch):
    """train_here("--epochs 2 ..."): run train.py in this process and in the test's folder.

    Plots and report take most of the time of so small a run, so they are left out.
    """
    import train  # slow, and most tests do not need it

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_epoch", lambda run, model, val_slices: None)
    monkeypatch.setattr(train.report, "write_report", lambda folder: "none")
    return lambda flags: train.main(["--data", str(blobs), *small, *flags.split()])


@pytest.fixture
def at_step(monkeypatch):
    """at_step({5}, action): before train.py's 5th step, of all runs, call `action(images)`.

    The step uses the images that it returns, or the original ones if it returns None.
    """
    import train

    real, count = train.compute_losses, 0

    def install(numbers, action):
        def compute_losses(model, discriminator, images, precision, config):
            nonlocal count
            count += 1
            if count in numbers:
                changed = action(images)
                images = images if changed is None else changed
            return real(model, discriminator, images, precision, config)

        monkeypatch.setattr(train, "compute_losses", compute_losses)

    return install


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, blobs, small) -> tuple[Path, str]:
    """The folder of a run of three epochs, which no test may change, and what the run printed."""
    import train

    folder = tmp_path_factory.mktemp("finished")
    flags = ["--data", blobs, "--cache-dir", folder / "cache", "--runs-dir", folder / "runs"]
    flags += [*small, "--epochs", "3", "--name", "a"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train.main(list(map(str, flags))) == 0
    return folder / "runs" / "a", printed.getvalue()


@pytest.fixture
def run_copy(finished_run, tmp_path, monkeypatch) -> Path:
    """A copy of the finished run in the test's folder: runs/a."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished_run[0], "runs/a"))


@pytest.fixture
def study(tmp_path, write_nifti) -> Path:
    """A BIDS folder: five subjects with two scans of 20 x 24 x 28, whose outer planes are empty."""
    scan = np.random.default_rng(0).integers(50, 950, (20, 24, 28)).astype(np.int16)
    scan[:4] = 0
    scan[:, :5] = 0
    scan[:, :, :6] = 0
    affine = np.array([[1.7, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1]])
    for subject in "ABCDE":
        for session in (1, 2):
            folder = tmp_path / "study" / f"sub-{subject}" / f"ses-{session}" / "anat"
            scan[10, 12, 14] = 100 * session + ord(subject)  # no scan is a copy of another
            write_nifti(folder / f"sub-{subject}_ses-{session}_T2w.nii.gz", scan, affine)
    return tmp_path / "study"


@pytest.fixture
def load(tmp_path):
    """load(source, split, preprocessing): `load_split` with its cache in the test's folder."""
    return partial(dataset.load_split, cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def load_images(tmp_path, write_nifti, load):
    """load_images(*images, **options): a training split of these images as 2D files, in order.

    The options are those of `Preprocessing.resolve`.
    """

    def load_images(*images: np.ndarray, **options) -> dataset.SliceDataset:
        folder = tmp_path / "images"
        shutil.rmtree(folder, ignore_errors=True)
        for i, image in enumerate(images):
            write_nifti(folder / "train" / f"case_004_week_0_slice_{i}.nii", image)
        source = find_hipmri(folder)
        return load(source, "train", Preprocessing.resolve(source, **options))

    return load_images
