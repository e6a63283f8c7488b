"""Damaged files by the thousand: each must end in a slice or a model, or in the one clear error that was meant for it.

    python benchmarks/fuzz.py                    # 24,000 NIfTI files, 2,000 checkpoints, 2,000 config.json
    python benchmarks/fuzz.py --count 300        # a tenth of it and less, to try it out

What is damaged: small phantom slices and, where $HIPMRI_REAL_DATA is set, slices of its prostatex/; a volume; the
checkpoints of a small model; a run's config.json. Every file is read in each way that the scripts read it. A crash is
any other exception, an error that nobody foresaw ("can't be decoded"), over 5 seconds, or over 1 GiB of memory.
Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import dataset
import train
import utils
from modules import VQVAE
from mri import cache, preprocessing, splits
from prior.model import CodePrior
from training import run
from training.config import check_arguments, with_defaults
from training.run_folder import last_checkpoint, open_run, read_arguments
from utils import CheckpointError, UserError

SECONDS, MEMORY = 5, 1 << 30  # bounds of one file
SMALL = {
    "hidden_channels": 8, "residual_channels": 4, "num_residual_layers": 1, "num_code_layers": 1, "refine_channels": 2,
    "embedding_dim": 4, "num_embeddings": 16,
}  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    255,
    1 << 15,
    -(1 << 15),
    1 << 31,
    1 << 40,
    10**12,
    1 << 62,
    -(1 << 63),
)
WEIRD = (
    None,
    True,
    "",
    "x" * 999,
    [],
    {},
    [[1]],
    -1,
    0,
    10**9,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    {"a": 1},
)


# ---------------------------------------------------------------- what is damaged, and how


def whole_files() -> list[bytes]:
    """Uncompressed NIfTI files: each kind of number, both versions and byte orders; slices, volumes and real ones."""
    generator, files = np.random.default_rng(0), []
    for shape in ((24, 16), (16, 24, 12), (300, 20, 1)):
        for kind in ("u1", "<i2", ">i2", "<f4", ">f8", "<i4"):
            for form in (nib.Nifti1Image, nib.Nifti2Image):
                array = generator.integers(0, 200, shape).astype(kind)
                image = form(
                    array,
                    np.diag([2.0, 1.5, 3.0, 1.0]),
                    form.header_class(endianness=kind[0].strip("u") or "<"),
                )
                files.append(image.to_bytes())
    real = Path(os.environ.get("HIPMRI_REAL_DATA", "")) / "prostatex"
    return files + [
        gzip.decompress(path.read_bytes()) for path in sorted(real.glob("*/*.nii.gz"))[:40:4]
    ]


def damaged_header(chance: random.Random, file: bytes) -> bytes:
    """One to four fields or bytes of the header changed; half of the time compressed again."""
    kind = (
        nib.Nifti2Header
        if 540 in (*struct.unpack("<i", file[:4]), *struct.unpack(">i", file[:4]))
        else nib.Nifti1Header
    )
    fields, content = kind.template_dtype.fields, bytearray(file)
    for _ in range(chance.randint(1, 4)):
        if chance.random() < 0.3:
            content[chance.randrange(kind.template_dtype.itemsize)] = chance.randrange(256)
            continue
        field = chance.choice(["dim", "dim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "pixdim",
                               "qform_code", "sform_code", "quatern_b", "srow_x", "srow_y", "magic", "sizeof_hdr",
                               "descrip", "intent_code"])  # fmt: skip
        dtype, offset = fields[field][:2]
        item = dtype.base.newbyteorder(chance.choice("<>"))
        at = offset + chance.randrange(dtype.itemsize // item.itemsize) * item.itemsize
        if item.kind == "f":
            value = chance.choice(
                [
                    np.nan,
                    np.inf,
                    -np.inf,
                    0,
                    -1,
                    1e-45,
                    1e38,
                    3.4e38,
                    348,
                    chance.uniform(-1e3, 1e3),
                ]
            )
        elif item.kind == "i":
            limits = np.iinfo(item)
            value = max(
                limits.min, min(limits.max, chance.choice([*NUMBERS, chance.randint(-70, 3000)]))
            )
        else:
            value = bytes(chance.randrange(256) for _ in range(item.itemsize))
        with np.errstate(all="ignore"):
            content[at : at + item.itemsize] = np.array(value).astype(item).tobytes()
    return gzip.compress(bytes(content), 1) if chance.random() < 0.5 else bytes(content)


def damaged_stream(chance: random.Random, file: bytes) -> bytes:
    """A gzip stream with bytes changed, cut out, put in or appended, or one that goes on for gigabytes."""
    content = bytearray(gzip.compress(file, 1))
    for _ in range(chance.randint(1, 3)):
        at, way = chance.randrange(len(content) + 1), chance.randrange(6)
        if way == 0:
            del content[at:]
        elif way == 1:
            del content[at : at + chance.randint(1, 99)]
        elif way == 2:
            content[at:at] = chance.randbytes(chance.randint(1, 99))
        elif way == 3:
            content += chance.choice(
                [chance.randbytes(50), b"\0" * 999, gzip.compress(file[:400]), BOMB]
            )
        elif way == 4:
            content = bytearray(gzip.compress(bytes(content), 1))
        elif content:
            content[at % len(content)] ^= 1 << chance.randrange(8)
        content = content or bytearray(b"\x1f\x8b")
    return bytes(content)


BOMB = gzip.compress(gzip.compress(b"\0" * (1 << 26), 9), 9) + gzip.compress(b"\0" * (1 << 28), 9)


def odd_shape(chance: random.Random, file: bytes) -> bytes:
    """A header of 0 to 7 dimensions of any size, as many pixels as it likes, or the file's own."""
    is_2, order = chance.random() < 0.5, chance.choice("<>")
    header = (nib.Nifti2Header if is_2 else nib.Nifti1Header)(endianness=order)
    content = bytearray(header.binaryblock)
    dtype, offset = header.template_dtype.fields["dim"][:2]
    item = dtype.base.newbyteorder(order)
    sizes = [
        chance.choice([*NUMBERS[: 9 + 5 * is_2], chance.randint(1, 300), chance.randint(8, 40)])
        for _ in range(8)
    ]
    sizes[0] = chance.choice([2, 2, 3, 3, 4, 5, 7, 0, chance.randint(-9, 99)])
    limits = np.iinfo(item)
    dims = np.clip(np.array(sizes, object), limits.min, limits.max).astype(item)
    content[offset : offset + dtype.itemsize] = dims.tobytes()
    for name, value in (
        ("datatype", chance.choice([2, 4, 8, 16, 64, 128, 32, 1792, 2304, 1, 0, 768])),
        ("bitpix", 16),
    ):
        dtype, offset = header.template_dtype.fields[name][:2]
        content[offset : offset + 2] = np.array(value).astype(dtype.newbyteorder(order)).tobytes()
    whole = (
        bytes(content)
        + b"\0" * 4
        + chance.choice([file[352:], chance.randbytes(5000), b"\0" * 500_000, b""])
    )
    return gzip.compress(whole, 1) if chance.random() < 0.5 else whole


def damaged_bytes(chance: random.Random, content: bytes) -> bytes:
    """Any file, with bytes changed, cut out or put in."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 5)):
        at, way = chance.randrange(len(content) + 1), chance.randrange(4)
        if way == 0 and chance.random() < 0.3:
            del content[at:]
        elif way == 1:
            del content[at : at + chance.randint(1, 9)]
        elif way == 2:
            content[at:at] = chance.randbytes(chance.randint(1, 9))
        elif content:
            content[at % len(content)] = chance.randrange(256)
        content = content or bytearray(b" ")
    return bytes(content)


def damaged_values(chance: random.Random, content: dict) -> dict:
    """A dictionary with one to three values, of any depth, replaced or left out."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        inside, key = content, chance.choice(list(content) or [None])
        while isinstance(inside.get(key), dict) and inside[key] and chance.random() < 0.8:
            inside, key = inside[key], chance.choice(list(inside[key]))
        value = inside.get(key)
        if chance.random() < 0.15:
            inside.pop(key, None)
        elif isinstance(value, torch.Tensor) and chance.random() < 0.7:
            inside[key] = chance.choice(
                [value[..., :1], value.double(), value.flatten(), value * torch.nan, value.bool()]
            )
        else:
            inside[key] = chance.choice([*WEIRD, *NUMBERS])
    return content


# ---------------------------------------------------------------- reading them


def read_nifti(path: Path) -> bool:
    """Whether it is a slice or a volume; raises what nobody foresaw."""
    good = False
    for form in ("2D", "3D"):
        slices, reason = cache.decode_file(path, preprocessing.Preprocessing(form, "resize", 4))
        if reason.startswith("can't be decoded"):
            raise AssertionError(reason)
        good |= bool(slices)
        for _, pixels, numbers in slices:
            assert (
                pixels.shape == preprocessing.SIZE
                and np.isfinite([float(x) for x in numbers]).all()
            )
        with contextlib.suppress(utils.DataError):
            assert np.isfinite(preprocessing.slice_affine(path, form)).all()
    with contextlib.suppress(utils.DataError):
        assert dataset.read_slice(path).isfinite().all()
    return good


def read_checkpoint(path: Path, run: run.Run) -> bool:
    """As a model, as a prior, and as where a run goes on from."""
    good = False
    for kind in (VQVAE, CodePrior):
        try:
            kind.from_checkpoint(path)
            good = True
        except CheckpointError as error:
            if re.search("(?i)memory|allocate", str(error)):
                raise AssertionError(str(error)) from None
    with contextlib.suppress(CheckpointError, UserError):
        if checkpoint := last_checkpoint(path.parent):
            run.restore(checkpoint)
    return good


def read_config(path: Path) -> bool:
    """As --resume and as predict.py read it."""
    try:
        asked = {
            "resume": True,
            "name": path.parent.name,
            "runs_dir": str(path.parent.parent),
            "epochs": 10**6,
        }
        _, arguments, _ = open_run(asked)
        check_arguments(arguments, 1)
        splits.find_data(read_arguments(path.parent, with_defaults("tuned", {})).get("data"))
    except (UserError, CheckpointError, utils.DataError):
        return False
    return True


class Exceeded(BaseException):
    """No Exception: what is being tried must not take it for one of its own."""


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """Over SECONDS, or over MEMORY beyond what the process has, is an exception."""

    def too_long(*_):
        raise Exceeded(f"over {SECONDS} s")

    before, (soft, hard) = (
        signal.signal(signal.SIGALRM, too_long),
        resource.getrlimit(resource.RLIMIT_AS),
    )
    status = Path("/proc/self/statm")
    if status.exists():
        size = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(
    name: str, count: int, make: Callable[[], bytes], path: Path, read: Callable[[Path], bool]
) -> dict:
    """Read `count` damaged files, and a row of the table; the same seed makes the file of a crash's number again."""
    found, slowest, crashes = Counter(), 0.0, []
    for number in range(count):
        path.write_bytes(make())
        start = time.perf_counter()
        try:
            with bounds():
                found["read" if read(path) else "refused"] += 1
        except (Exception, Exceeded) as error:
            crashes.append(f"file {number}: {error!r:.300}")
        slowest = max(slowest, time.perf_counter() - start)
    row = {"damaged": name, "files": count, "read": found["read"], "refused": found["refused"]}
    print(
        row | {"crashes": len(crashes), "slowest": round(slowest, 3)},
        *crashes[:10],
        sep="\n    ",
        flush=True,
    )
    return row | {"crashes": crashes, "slowest_seconds": round(slowest, 3)}


def fuzz(count: int, seed: int, folder: Path) -> list[dict]:
    """`count` damaged headers, gzip streams and shapes each; checkpoints and config.json an eighth as many, twice."""
    chance, files, rows = random.Random(seed), whole_files(), []
    for name, damage in (
        ("header", damaged_header),
        ("gzip stream", damaged_stream),
        ("shape", odd_shape),
    ):
        file = folder / "case_004_week_0_slice_0.nii.gz"
        rows.append(
            attempt(
                name,
                count,
                lambda damage=damage: damage(chance, chance.choice(files)),
                file,
                read_nifti,
            )
        )

    args = with_defaults("tuned", {"data": ".", "device": "cpu", "precision": "float32", **SMALL})
    torch.manual_seed(seed)
    run = train.Run(folder, args, "fingerprint")
    run.save("last.pt")
    path, quarter = folder / "last.pt", -(-count // 8)
    whole = torch.load(path, weights_only=True)
    prior = CodePrior(16, 4, 8, 8, channels=16, num_layers=1, num_heads=2)
    priors = {"format": 3, "model_args": prior.arguments, "model": prior.state_dict()}

    def changed() -> bytes:
        torch.save(damaged_values(chance, chance.choice([whole, priors])), path)
        return path.read_bytes()

    contents = path.read_bytes()
    rows.append(attempt("checkpoint, bytes", quarter, lambda: damaged_bytes(chance, contents), path,
                        lambda file: read_checkpoint(file, run)))  # fmt: skip
    rows.append(
        attempt(
            "checkpoint, values", quarter, changed, path, lambda file: read_checkpoint(file, run)
        )
    )
    path.write_bytes(contents)  # --resume reads it beside the config
    config = {"name": "x", "arguments": args}
    rows.append(attempt("config.json, bytes", quarter, lambda: damaged_bytes(chance, json.dumps(config).encode()),
                        folder / "config.json", read_config))  # fmt: skip
    rows.append(attempt("config.json, values", quarter, lambda: json.dumps(damaged_values(chance, config)).encode(),
                        folder / "config.json", read_config))  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count", type=int, default=8000, help="files of each of three kinds of damage (8000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "fuzz",
        help="without ending",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = fuzz(args.count, args.seed, Path(folder))
    real = "and real slices" if os.environ.get("HIPMRI_REAL_DATA") else "no real slices"
    result = {
        "seed": args.seed,
        "files": f"synthetic {real}",
        "rows": rows,
        "versions": utils.versions(),
    }
    utils.write_json(args.out.with_suffix(".json"), result)
    lines = [
        f"Seed {args.seed}, synthetic {real}; bounds {SECONDS} s and {MEMORY >> 30} GiB a file.\n",
        "| damaged | files | read all the same | refused with its error | crashes | slowest (s) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        crashes = len(row["crashes"])
        cells = (
            row["damaged"],
            row["files"],
            row["read"],
            row["refused"],
            crashes,
            f"{row['slowest_seconds']:.2f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    crashes = sum(len(row["crashes"]) for row in rows)
    print(
        f"{sum(row['files'] for row in rows):,} files, {crashes} crashes; written: {args.out}.json, {args.out}.md"
    )
    return int(crashes > 0)


if __name__ == "__main__":
    sys.exit(main())
