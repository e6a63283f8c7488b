"""Train resources/pelvis_prior.pt, the prior that generate.py uses if none has been trained.

    python resources/make_prior.py        # half an hour on one core; continues if interrupted

The prior is a flow over the latents of resources/pelvis.pt, for the slices of 200 simulated
patients (mri/phantom.py). The file contains its weights in half precision, without the state of the
optimizer.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_prior
import utils
from mri import phantom
from training.checkpoint import read_checkpoint, write_checkpoint

ROOT = Path(__file__).parents[1]
DATA = ROOT / "phantom_data"
RUN = ROOT / "runs" / "pelvis_prior"
FLAGS = "--channels 36 --epochs 8 --plot-every 4"
TRAINED_ON = "the slices of 200 simulated patients; no real patient"


def main() -> int:
    if not DATA.exists():
        phantom.main(["--out", str(DATA), "--patients", "200", "40", "40"])
    RUN.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "resources" / "pelvis.pt", RUN / "best.pt")
    utils.write_json(RUN / "config.json", {"arguments": {"data": str(DATA)}})
    flags = ["--run", str(RUN), *FLAGS.split()]
    if (RUN / "prior" / "config.json").exists():
        flags.append("--resume")
    code = train_prior.main(flags)
    if code:
        return code
    best = read_checkpoint(RUN / "prior" / "best.pt")
    weights = {name: tensor.half() for name, tensor in best["model"].items()}
    kept = ("format", "model_args", "fingerprint", "slices", "versions")
    checkpoint = {name: best[name] for name in kept if name in best}
    checkpoint |= {"model": weights, "trained_on": TRAINED_ON}
    path = ROOT / "resources" / "pelvis_prior.pt"
    write_checkpoint(path, checkpoint)
    print(f"written: resources/{path.name}")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
