"""Train resources/pelvis.pt, the model that predict.py uses if no run has been trained.

    HIPMRI_REAL_DATA=... python resources/make_pelvis.py       # about half an hour on two CPU cores

The file contains the weights of a run with the recipe `tuned`, but no optimiser state. The run is
trained on the sample data (mri/phantom.py) and on the training slices of prostatex/ in
$HIPMRI_REAL_DATA. These are 86 T2 slices of PROSTATEx patient 0218 (doi
10.7937/K9TCIA.2017.MURS5CL, CC BY 3.0), converted from DICOM to NIfTI, resampled and cropped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import dataset
import predict
import train
import utils
from modules import VQVAE
from mri import hipmri, phantom
from mri.files import SPLITS
from training.checkpoint import load_model, read_checkpoint, write_checkpoint

ROOT = Path(__file__).parents[1]
NAME = "pelvis"
EPOCHS = 120
TRAINED_ON = (
    "the phantom (240 slices) and PROSTATEx patient 0218 (86 slices, CC BY 3.0, "
    "doi 10.7937/K9TCIA.2017.MURS5CL)"
)


def main() -> int:
    real = Path(os.environ.get("HIPMRI_REAL_DATA", "not set")) / "prostatex"
    if not real.is_dir():
        raise utils.UserError(
            f"{real} is not a folder; set $HIPMRI_REAL_DATA to the folder that contains "
            "prostatex/, which is not part of the repository"
        )
    sample = ROOT / "sample_data"
    if not sample.exists():
        phantom.write_phantom(sample)
    data = ROOT / "runs" / f"{NAME}_data"
    link_slices([sample, real], data)

    run = Path(os.path.relpath(ROOT / "runs" / NAME))
    flags = ["--data", str(data), "--runs-dir", str(run.parent), "--name", NAME]
    code = train.main([*flags, "--epochs", str(EPOCHS), "--precision", "bfloat16"])
    if code:
        return code
    predict.main(["--run", str(run)])
    path = ROOT / "resources" / f"{NAME}.pt"
    write_weights(run, [sample, real], path)
    print(f"written: resources/{path.name}")
    return 0


def link_slices(sources: list[Path], data: Path) -> None:
    """Merge several data sets into one in HipMRI's 2D layout, using symbolic links."""
    for split in SPLITS:
        folder = data / f"keras_slices_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            for file in (source / folder.name).iterdir():
                if not (folder / file.name).exists():
                    (folder / file.name).symlink_to(file.resolve())


def write_weights(run: Path, sources: list[Path], path: Path) -> None:
    """Write the weights of a run's best checkpoint, without the optimiser state.

    The stored voxel spacing is the geometric mean of the data sets' spacings. It differs from each
    of them by a factor of less than 1.5.
    """
    best = read_checkpoint(run / "best.pt")
    model = load_model(VQVAE, run / "best.pt")
    spacings = []
    for source in sources:
        slices = dataset.load_split(hipmri.find_hipmri(source), "train")
        spacings.append(slices.description["spacing"])
    spacing = np.sqrt(np.prod(spacings, axis=0)).tolist()  # of the two sources
    checkpoint = {
        "format": best["format"],
        "model_args": best["model_args"],
        "model": model.state_dict(),
        "slices": best["slices"] | {"spacing": spacing},
        "trained_on": TRAINED_ON,
        "versions": utils.read_json(run / "config.json")["versions"],
    }
    write_checkpoint(path, checkpoint)


if __name__ == "__main__":
    utils.run_script(main)
