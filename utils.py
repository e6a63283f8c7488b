"""What the scripts share: processes, devices, commands, run folders and their files."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import glob
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor


class UserError(Exception):
    """A mistake of the person's: the message says what was found, what was expected, and what to do."""


def run_script(main, *user_errors: type[Exception]) -> None:
    """Run `main()` and exit. What the person or the machine can mend is one message on stderr and exit code 2.

    That is a `UserError`, one of `user_errors`, an OSError (a full disk, a folder that can't be written), or that
    another process of the run has ended, which has its own message.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text; stderr does it anyway
    try:
        code = main()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            exit_at_once(code or 0)
        sys.exit(code)
    except (UserError, OSError, RuntimeError, *user_errors) as error:
        lost = lost_process(error)
        if isinstance(error, RuntimeError) and not lost:
            raise
        who = f"process {process_rank()}: " if process_rank() else ""
        what = f"another process of this run ended or hangs ({first_line(error)})" if lost else error
        print(f"{who}error: {what}", file=sys.stderr)
        if process_count() > 1:
            exit_at_once(2)  # taking leave of the others could wait for them forever
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def exit_at_once(code: int) -> None:
    """Without Python's own end, in which a thread of gloo's that still holds a tensor would abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# ---------------------------------------------------------------- several processes


def join_processes() -> None:
    """Join the others, where torchrun started several; only the first one prints from then on.

    GPU tensors travel by NCCL, all others by gloo, so that nothing about the run itself waits for a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):
        raise UserError("torchrun was started on several machines; expected one: leave out --nnodes")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """0 in the first process, or the only one: the one that writes files."""
    return dist.get_rank() if process_count() > 1 else 0


@contextlib.contextmanager
def first_process_first():
    """The first process goes through the block alone; the others then find what it has made."""
    if process_rank():
        sum_over_processes(torch.zeros(1))  # waits for the others
    yield
    if not process_rank():
        sum_over_processes(torch.zeros(1))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """On the CPU, a tensor that each process has its part of."""
    total = tensor.detach().cpu().clone()
    if process_count() > 1:
        dist.all_reduce(total)
    return total


def copy_from_first_process(tensors: dict[str, Tensor]) -> None:
    """In place, where there are several."""
    if process_count() > 1:
        for tensor in tensors.values():
            dist.broadcast(tensor, 0)


def from_first_process(value):
    """The first process's value, of any plain type, for all."""
    values = [value]
    if process_count() > 1:
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


def check_equal_processes(tensors: dict[str, Tensor]) -> None:
    """Raises RuntimeError where processes that should hold equal tensors don't: training would go on with nonsense."""
    if process_count() > 1:
        values = [tensor.detach().double().flatten().cpu() for tensor in tensors.values()]
        sums = torch.stack([value @ torch.linspace(1, 2, len(value)).double() for value in values])  # order counts
        first = sums.clone()
        dist.broadcast(first, 0)
        different = sum_over_processes((sums != first).long())
        if different.any():
            names = [name for name, count in zip(tensors, different.tolist(), strict=True) if count]
            raise RuntimeError(f"processes hold different {', '.join(names)}")


def lost_process(error: Exception) -> bool:
    """Whether it says that another process could not be reached."""
    if process_count() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error).lower()


def leave_processes() -> None:
    """At the end of what they did together."""
    if process_count() > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------- device, commands


def pick_device(name: str) -> torch.device:
    """The `--device`: cuda, mps or cpu; auto takes the first of them that is there. To each process its GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in available.items() if found)
    if name.startswith("cuda:") and process_count() > 1:
        raise UserError(f"--device is {name} for {process_count()} processes; expected cuda, a GPU for each, or cpu")
    if name == "cuda" and process_count() > 1:
        if torch.cuda.device_count() < process_count():
            here = f"{process_count()} processes have {torch.cuda.device_count()} GPUs"
            raise UserError(f"{here}; expected one each: lower --nproc-per-node, or train with --device cpu")
        name = f"cuda:{process_rank()}"
    elif name == "cuda" and available["cuda"]:
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(name)
        found = available.get(device.type, False)
    except RuntimeError:
        found = False
    if not found:
        usable = ", ".join(kind for kind, found in available.items() if found)
        raise UserError(f"--device {name} is not usable here; this torch {torch.__version__} can use: {usable}")
    return device


def be_deterministic(asked: bool) -> None:
    """For --deterministic, before anything is computed: on a GPU, equal runs give equal weights."""
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what matrix products on GPUs need for it
    torch.use_deterministic_algorithms(asked)


def describe_device(device: torch.device) -> str:
    """For people and result files: which machine computed this, and by how many processes if by several."""
    several = f"{process_count()} processes, " if process_count() > 1 else ""
    if device.type == "cuda":
        return f"{several or f'{device} '}({torch.cuda.get_device_name(device)})"
    return f"{several}{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def pick_precision(name: str, device: torch.device) -> str:
    """The `--precision`: auto is bfloat16 on GPUs and CPUs that compute in it, else float32."""
    if name != "auto":
        return name
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older torch can't tell
        found = torch.cpu.get_capabilities()
        fast = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, instead of handing each large activation back and faulting it in again.

    On two CPU cores a training step takes about two thirds of the time. Other systems' allocators are left alone.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # musl and others
            return
        # M_MMAP_THRESHOLD: blocks under 1 GiB come from the heap; older glibc takes 32 MiB at most.
        mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the heap's top is not given back


def command(script: str, *arguments) -> str:
    """A command to print, which can be pasted as it is: this Python, a script beside this file, its arguments."""

    def from_here(path) -> str:
        try:
            relative = os.path.relpath(path)
        except ValueError:  # Windows: another drive
            return str(path)
        return str(path) if relative.startswith("..") else relative

    python = "python" if shutil.which("python") == sys.executable else from_here(sys.executable)
    words = [python, from_here(Path(__file__).with_name(script)), *map(str, arguments)]
    if os.name != "nt":
        return shlex.join(words)
    return ("& " if " " in python else "") + subprocess.list2cmdline(words)  # PowerShell calls a quoted path so


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide the numbers, and the repository's commit."""
    import matplotlib
    import nibabel
    import numpy
    import torchmetrics
    import torchvision

    packages = (torch, torchvision, torchmetrics, nibabel, numpy, matplotlib)
    numbers = {package.__name__: str(package.__version__) for package in packages}
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--match=NeVeRmAtCh"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without git
        commit = "unknown"
    return {"python": sys.version.split()[0], **numbers, "commit": commit}


# ---------------------------------------------------------------- files of a run


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary path)`, then rename: a crash leaves the old file or the new one, never half of one.

    Raises OSError where it can't be written, and nothing is left of it then.
    """
    # The dot first: `write` may look at the suffix. The number: another process may be writing the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by processes that were killed
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink()
        write(temporary)
        with open(temporary, "r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = "; what was there before is as it was" if path.exists() else ""
        advice = "make room, or let the folder be written, and run the command again (train.py with --resume)"
        raise OSError(f"can't write {path} ({error.strerror or error}){kept}; {advice}") from error


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    content = io.BytesIO()  # torch's own writing doesn't tell a full disk from a mistake in the program
    torch.save(checkpoint, content)
    write_bytes(path, content.getbuffer())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


@contextlib.contextmanager
def alone_in(folder: Path):
    """Refuse, with UserError, where another process is in such a block for the same folder, which is created.

    The lock is let go when a process ends, however it does. On file systems that know no locks, nothing is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training {folder}; wait until it ends, or train another run") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def save_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8"))


def load_json(path: Path) -> dict:
    """A dictionary from a JSON file; raises `UserError` where it can't be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}); expected the JSON file that train.py writes") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected the JSON object that train.py writes")
    return content


def save_csv(path: Path, rows: list[dict]) -> None:
    """Rows with equal keys, the keys as header."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
