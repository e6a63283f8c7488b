"""Make resources/pelvis.pt, the model that predict.py uses before any training: the weights alone of a `tuned` run.

    HIPMRI_REAL_DATA=... python resources/make_pelvis.py       # about half an hour on two CPU cores

It is trained on the sample (phantom.py) and on the training slices of prostatex/ in $HIPMRI_REAL_DATA, 86 T2 slices of
PROSTATEx patient 0218 (doi 10.7937/K9TCIA.2017.MURS5CL, CC BY 3.0; converted from DICOM to NIfTI, resampled and cut).
"""

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
from training.checkpoint import load_model, read_checkpoint, write_checkpoint

ROOT = Path(__file__).parents[1]
NAME, EPOCHS = "pelvis", 120
DATA = "the phantom (240 slices) and PROSTATEx patient 0218 (86 slices, CC BY 3.0, doi 10.7937/K9TCIA.2017.MURS5CL)"


def main() -> int:
    real = Path(os.environ.get("HIPMRI_REAL_DATA", "not set")) / "prostatex"
    if not real.is_dir():
        raise utils.UserError(
            f"$HIPMRI_REAL_DATA holds no prostatex/ ({real}); it is not shipped with the repository"
        )
    sample, both = ROOT / "sample_data", ROOT / "runs" / f"{NAME}_data"
    if not sample.exists():
        phantom.write_phantom(sample)
    for split in ("train", "validate", "test"):
        folder = both / f"keras_slices_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(
            path for source in (sample, real) for path in (source / folder.name).iterdir()
        ):
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())
    run = Path(os.path.relpath(ROOT / "runs" / NAME))
    where = ["--data", str(both), "--runs-dir", str(run.parent), "--name", NAME]
    if code := train.main([*where, "--epochs", str(EPOCHS), "--precision", "bfloat16"]):
        return code
    predict.main(["--run", str(run)])
    best, model = read_checkpoint(run / "best.pt"), load_model(VQVAE, run / "best.pt")
    kept = {"format": best["format"], "model_args": best["model_args"], "model": model.state_dict()}
    # Voxels of both kinds are as in training: the geometric mean is within a factor of 1.5 of each.
    parts = [dataset.load_split(hipmri.find_hipmri(folder), "train") for folder in (sample, real)]
    spacing = np.sqrt(np.prod([part.description["spacing"] for part in parts], 0)).tolist()
    kept |= {"slices": best["slices"] | {"spacing": spacing}, "trained_on": DATA}
    kept |= {"versions": utils.read_json(run / "config.json")["versions"]}
    write_checkpoint(ROOT / "resources" / f"{NAME}.pt", kept)
    print(f"written: resources/{NAME}.pt")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
