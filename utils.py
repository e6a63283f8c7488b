"""Functions for all scripts: user errors, device, precision, atomic writes, locks."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import glob
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn

# ---------------------------------------------------------------- errors


class UserError(Exception):
    """A mistake that the user can correct.

    The message says what was found, what was expected, and what to do.
    """


class DataError(UserError):
    """Data that cannot be found, read or split."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit this version."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main()` as the only task of this process, and exit with its return code.

    For a `UserError`, or an OSError such as a full disk, print one message to stderr and exit with
    code 2. Any other exception is a bug in the program, so its traceback is shown.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # File names may contain undecodable bytes. For stderr, Python already escapes them.
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    # torchrun sets both variables. They are read here because torch.distributed forgets the rank
    # when the process group is destroyed.
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    try:
        code = main() or 0
    except (UserError, OSError) as error:
        prefix = f"process {rank}: " if rank else ""
        print(f"{prefix}error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:  # a usage error, or SIGTERM (see training/guards.py)
        code = error.code or 0
    if world_size > 1:
        # Skip the interpreter's shutdown. A gloo thread that still has a tensor would abort the
        # process. After an error, the shutdown could wait forever for the other processes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


# ---------------------------------------------------------------- device, precision, determinism


def pick_device(name: str, rank: int = 0, world_size: int = 1) -> torch.device:
    """Return the device that `--device` names; make it the current device if it is a CUDA GPU.

    Args:
        name: "auto" (the first available of cuda, mps, cpu), "cuda", "cuda:1", "mps" or "cpu".
        rank: rank of this process; if torchrun started several processes, process r uses GPU r.
        world_size: number of processes that torchrun started.

    Raises:
        UserError: if the device is not available, or there are fewer GPUs than processes.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [device_type for device_type, is_available in available.items() if is_available]
    if name == "auto":
        # Processes cannot exchange tensors through mps.
        name = next(kind for kind in usable if kind != "mps" or world_size == 1)
    if name.startswith(("cuda:", "mps")) and world_size > 1:
        raise UserError(
            f"--device is {name} for {world_size} processes; expected cuda (one GPU per process) "
            "or cpu"
        )
    if name == "cuda" and world_size > 1:
        if torch.cuda.device_count() < world_size:
            raise UserError(
                f"{world_size} processes share {torch.cuda.device_count()} GPUs; expected one GPU "
                "per process: lower --nproc-per-node, or train with --device cpu"
            )
        name = f"cuda:{rank}"
    elif name == "cuda" and available["cuda"]:
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not available.get(device.type, False):
        raise UserError(
            f"--device {name} is not usable here; torch {torch.__version__} can use: "
            f"{', '.join(usable)}"
        )
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError(f"--device is {name}; expected cuda:0 to cuda:{count - 1}")
        torch.cuda.set_device(device)  # otherwise torch also uses the first GPU
    return device


def to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to the device, in the layout in which its convolutions are fastest there."""
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last
    return module.to(device, memory_format=layout)


def pick_precision(name: str, device: torch.device) -> str:
    """Return the precision, "float32" or "bfloat16", that `--precision` selects.

    "auto" means bfloat16 on GPUs (CUDA) and CPUs that support it in hardware, otherwise float32.
    """
    if name != "auto":
        return name
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # added after torch 2.5
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    else:
        fast = device.type == "cuda" and _has_bfloat16(device)
    return "bfloat16" if fast else "float32"


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether a CUDA GPU supports bfloat16 in hardware."""
    current = torch.cuda.current_device()
    try:
        torch.cuda.set_device(device)  # the function below asks the current GPU
        return torch.cuda.is_bf16_supported(including_emulation=False)
    finally:
        torch.cuda.set_device(current)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products without TF32; also usable as a decorator.

    By default, convolutions on Ampere and later GPUs round their inputs to 10 bits of mantissa,
    which changes SSIM in the third decimal place.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    previous = []
    for backend in (cudnn, matmul):
        try:
            previous.append((backend, "allow_tf32", backend.allow_tf32))
            backend.allow_tf32 = False
        except RuntimeError:  # the caller has set the newer `fp32_precision`; don't mix the two
            for part in [cudnn.conv, cudnn.rnn] if backend is cudnn else [matmul]:
                previous.append((part, "fp32_precision", part.fp32_precision))
                part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for owner, name, value in previous:
            setattr(owner, name, value)


CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS requires it for deterministic algorithms


def set_deterministic(enabled: bool) -> None:
    """Switch torch's deterministic algorithms on or off; call this before any computation."""
    if enabled:
        os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")
    torch.use_deterministic_algorithms(enabled)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for reuse, instead of returning large blocks to the system.

    Returned memory must be mapped again, page by page, in the next training step. Keeping it saves
    about a third of the step's time on two CPU cores. The setting cannot be undone, so only scripts
    that own their process call this function. Other allocators are not affected.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # the C library is not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the maximum in older versions of glibc
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


# ---------------------------------------------------------------- commands


def format_command(script: str, *arguments: object) -> str:
    """Return a command line for one of our scripts, ready to paste into the user's shell.

    Args:
        script: name of a script in the folder of this file, such as "train.py".
        arguments: arguments of the script, in order.
    """
    python = sys.executable
    if shutil.which("python") == sys.executable:
        python = "python"
    words = [_relative(python) if os.sep in python else python]
    words += [_relative(Path(__file__).with_name(script)), *map(str, arguments)]
    if os.name != "nt":
        return shlex.join(words)
    call_operator = "& " if " " in words[0] else ""  # PowerShell needs it before a quoted path
    return call_operator + subprocess.list2cmdline(words)


def _relative(path: str | Path) -> str:
    """Make a path relative if it is inside the working directory; return other paths unchanged."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # on Windows: a different drive
        return str(path)
    return str(path) if relative.startswith("..") else relative


# ---------------------------------------------------------------- files


def make_folder(folder: Path) -> None:
    """Create an output folder and its parents, unless they exist.

    Raises:
        UserError: if one of these paths is a file or a broken link.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{folder} cannot be created, because it or a folder above it is a file or a broken "
            "link; choose another folder"
        ) from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)` and rename the result to `path`.

    After a crash, `path` contains either the old file or the complete new one.

    Raises:
        OSError: if the file cannot be written; no temporary file is left behind.
    """
    # Two processes may write to the same path. The process ID keeps their temporary files apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if time.time() - stale.stat().st_mtime > 86400:  # left a day ago by a killed process
                stale.unlink()
        write(temporary)
        with open(temporary, "r+b") as file:  # Windows can only sync files opened for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        unchanged = "; the previous file is unchanged" if path.exists() else ""
        raise OSError(
            f"cannot write {path} ({error.strerror or error}){unchanged}; free some space or fix "
            "the folder's permissions, then run the command again (train.py with --resume)"
        ) from error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a binary file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: dict) -> None:
    """Write a dictionary as JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def read_json(path: Path) -> dict:
    """Return the dictionary in a JSON file; raise UserError if it cannot be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path} ({error}); expected the JSON file that train.py writes"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} contains a {type(content).__name__}; expected the JSON object that train.py "
            "writes"
        )
    return content


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a CSV file atomically; each dictionary is a row, and all must have the same keys."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


@contextlib.contextmanager
def lock(path: Path, wait_message: str | None = None) -> Iterator[None]:
    """Hold a lock file for the duration of the block.

    The lock is also released if the process is killed. On a file system that does not support
    locks, the block runs without protection.

    Args:
        path: the lock file.
        wait_message: message to print before waiting for another process; None: do not wait.

    Raises:
        filelock.Timeout: if another process holds the lock and `wait_message` is None.
    """
    file_lock = FileLock(path)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:  # a subclass of OSError, so it is caught first
        if wait_message is None:
            raise
        print(wait_message, flush=True)
        with contextlib.suppress(OSError, NotImplementedError):
            file_lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        file_lock.release()
