"""train.py: what a run writes and prints, and its training steps."""

import copy
import functools
import json
import os
import shutil
import subprocess

import pytest
import torch
from training_runs import assert_same_tensors, read_rows, read_weights

import dataset
import train
from modules import VQVAE
from mri import hipmri
from training.checkpoint import load_model, read_checkpoint
from training.config import TrainConfig, parse_train_flags, resolve_config
from training.progress import ProgressBar
from training.run import Run
from training.schedule import learning_rate
from training.step import clip_gradients, compile_with_fallback
from utils import UserError

COLUMNS = (
    "epoch,step,train_loss,train_recon,train_vq,val_loss,val_ssim,val_psnr,perplexity,codes_used,"
    "lr,seconds"
)

# ---------------------------------------------------------------- a run


def test_a_run_writes_its_files(finished_run):
    folder, printed = finished_run
    assert (folder / "metrics.csv").read_text().splitlines()[0] == COLUMNS
    rows = read_rows(folder)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [int(row["step"]) for row in rows] == [3, 6, 9]  # the last batch has 2 of 10 slices
    rates = [learning_rate(TrainConfig(), step, 9) for step in (2, 5, 8)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    plots = sorted(path.relative_to(folder).as_posix() for path in folder.glob("plots/*/*.png"))
    assert plots == [f"plots/epoch_{n}/epoch_{n}_images.png" for n in (1, 3)]
    assert (folder / "loss_ssim_plot.png").stat().st_size > 5000
    assert (folder / "report.html").exists()

    best, last = read_checkpoint(folder / "best.pt"), read_checkpoint(folder / "last.pt")
    assert best["best"] == last["best"] == max(float(row["val_ssim"]) for row in rows)
    assert last["epochs_done"] == 3
    assert not list(folder.glob(".*.tmp"))
    assert load_model(VQVAE, folder / "best.pt").arguments["codebook"] == "ema"
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["recipe"] == "tuned"
    assert config["arguments"]["num_embeddings"] == 16
    assert config["slices"] == {"train": 10, "validate": 3}
    assert config["bits_per_pixel"] == 0.25
    assert config["preprocessing"]["size"] == [256, 128]
    assert {"python", "torch", "torchmetrics", "commit"} <= config["versions"].keys()
    last_line = printed.splitlines()[-1]
    assert "predict.py" in last_line
    assert last_line.endswith(f"--run {folder}")


@pytest.mark.parametrize("recipe", ["document", "tuned"])
def test_each_recipe_learns(tmp_path, train_here, recipe):
    assert train_here(f"--epochs 6 --name a --recipe {recipe} --learning-rate 3e-3") == 0
    rows = read_rows(tmp_path / "runs/a")
    assert float(rows[-1]["train_recon"]) < 0.9 * float(rows[0]["train_recon"])
    assert float(rows[-1]["train_vq"]) > 0


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(tmp_path, train_here):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_here(f"--epochs 1 --name {name} --seed {seed}")
    a, b, c = (read_weights(tmp_path / "runs" / name) for name in "abc")
    assert_same_tensors(a, b)
    assert not torch.equal(a["encoder.conv1.weight"], c["encoder.conv1.weight"])


def test_the_best_checkpoint_is_that_of_the_best_epoch(tmp_path, train_here, monkeypatch):
    """The second of three scripted epochs has the highest SSIM."""
    real, script = train.validate, iter([0.5, 0.7, 0.6])

    def validate(*arguments):
        return real(*arguments) | {"val_ssim": next(script)}

    monkeypatch.setattr(train, "validate", validate)
    train_here("--epochs 3 --name a")
    best = read_checkpoint(tmp_path / "runs/a/best.pt")
    assert best["epochs_done"] == 2
    assert best["best"] == 0.7


def test_the_codebook_can_start_from_uniform_noise(tmp_path, train_here):
    train_here("--epochs 1 --name a --recipe document --codebook-init uniform --learning-rate 1e-9")
    embedding = read_weights(tmp_path / "runs/a")["vector_quantization.embedding.weight"]
    assert embedding.abs().max() <= 1 / 16 + 1e-6


def test_deterministic_mode_is_set_and_changes_nothing_on_a_cpu(
    tmp_path, train_here, at_step, monkeypatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    enabled, workspaces = [], []

    def record(images):
        enabled.append(torch.are_deterministic_algorithms_enabled())
        workspaces.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    at_step({1, 4}, record)  # the first step of each run
    for flag in ("--deterministic", ""):
        assert train_here(f"--epochs 1 --name a{flag} {flag}") == 0
    assert enabled == [True, False]
    assert workspaces == [":4096:8", None]
    assert not torch.are_deterministic_algorithms_enabled()  # a caller's process is unchanged
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    runs = tmp_path / "runs"
    assert_same_tensors(read_weights(runs / "a--deterministic"), read_weights(runs / "a"))


# ---------------------------------------------------------------- dry run, time, data


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, train_here, capsys):
    assert train_here("--epochs 5 --dry-run --name a") == 0
    printed = capsys.readouterr().out
    for part in ("10 training and 3 validation slices", "parameters", "0.2500 bits per pixel",
                 "5 epochs of 3 steps of 4", "15 steps left", "cpu", "min", "dry run"):  # fmt: skip
        assert part in printed
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_the_time_of_validation_once_per_epoch(train_here, capsys, monkeypatch):
    """At 60 s per validation and no time per step; the trial has done the first of 10 epochs."""
    seconds = 0.0

    def validate(*arguments):
        nonlocal seconds
        seconds += 60
        return {"val_loss": 1.0, "val_ssim": 0.5}

    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train.time, "perf_counter", lambda: seconds)
    train_here("--epochs 10 --dry-run")
    assert "takes about 9 min;" in capsys.readouterr().out


def test_a_run_that_takes_hours_on_a_cpu_says_so(train_here, capsys, monkeypatch):
    """The bar has measured 360 s per step when it warns, after 20 of 70 steps."""
    monkeypatch.setattr(ProgressBar, "seconds_per_step", lambda bar: 360.0)
    train_here("--epochs 7 --batch-size 1 --name a")
    warning = "will take about 5 hours on this CPU; --epochs 3 takes about one hour"
    assert capsys.readouterr().out.count(warning) == 1


def test_without_data_the_sample_is_made_once_and_the_printed_command_works(
    tmp_path, small, monkeypatch, capsys
):
    """A newcomer's first commands, with a smaller sample."""
    sizes = {"volumes": (1, 1, 1), "slices": 2, "workers": 1, "progress": False}
    write = functools.partial(train.phantom.write_phantom, **sizes)
    monkeypatch.setattr(train.phantom, "write_phantom", write)
    monkeypatch.setattr(train, "SAMPLE_EPOCHS", 2)
    monkeypatch.chdir(tmp_path)
    assert train.main([*small, "--name", "first"]) == 0
    assert len(read_rows(tmp_path / "runs/first")) == 2
    printed = capsys.readouterr().out
    assert "the sample" in printed
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sample_data/*/*")}
    assert len(times) == 12  # 6 slices and their masks
    assert train.main([*small, "--name", "second", "--epochs", "1"]) == 0
    assert len(read_rows(tmp_path / "runs/second")) == 1
    for path, modified in times.items():
        assert path.stat().st_mtime_ns == modified

    # As in a notebook whose packages are not installed for this Python, with a user's settings.
    monkeypatch.setenv("MPLBACKEND", "module://not_installed")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    command = printed.splitlines()[-1].strip()
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/first/test/metrics.json").exists()


def test_data_can_be_named_by_the_environment(tmp_path, blobs, monkeypatch, capsys, small):
    monkeypatch.setenv("HIPMRI_DATA", str(blobs))
    monkeypatch.chdir(tmp_path)
    assert train.main([*small, "--dry-run"]) == 0
    assert "$HIPMRI_DATA" in capsys.readouterr().out


def test_constant_validation_slices_are_an_error(tmp_path, train_here, write_nifti, blobs, small):
    data = shutil.copytree(blobs, tmp_path / "data")
    for path in data.glob("keras_slices_validate/*"):
        write_nifti(path, torch.ones(256, 128, dtype=torch.int16).numpy())
    with pytest.raises(UserError, match="all 3 validation slices are constant"):
        train_here(f"--epochs 1 --name a --data {data}")


# ---------------------------------------------------------------- a training step


def test_steps_crop_flip_and_clip_as_configured(train_here, monkeypatch, at_step):
    shapes, norms, flips = [], [], []

    def clip(modules, max_norm):
        norms.append(max_norm)
        return clip_gradients(modules, max_norm)

    def flip(images):
        flips.append(images)
        return images

    monkeypatch.setattr(train, "clip_gradients", clip)
    monkeypatch.setattr(dataset, "random_flip", flip)
    at_step({1}, lambda images: shapes.append(images.shape))
    train_here("--epochs 1 --name a --crop 32 --clip-grad-norm 0.01")
    assert shapes == [(4, 1, 32, 32)]
    assert norms == [0.01] * 3
    assert len(flips) == 3


def test_the_document_recipe_does_not_flip_slices(train_here, at_step, blobs):
    batches = []
    at_step({1}, batches.append)
    train_here("--epochs 1 --name a --recipe document --crop 0 --batch-size 10")
    slices = dataset.load_split(hipmri.find_hipmri(blobs), "train", progress=False)
    for image in batches[0]:
        assert any(torch.equal(image, slices[i]) for i in range(10))


def test_convolutions_compute_in_bfloat16_if_configured(tmp_path, train_here, monkeypatch):
    dtypes, real = set(), VQVAE.forward

    def forward(model, images):
        if model.training:
            dtypes.add(model.encoder(images).dtype)
        return real(model, images)

    monkeypatch.setattr(VQVAE, "forward", forward)
    assert train_here("--epochs 1 --name a --precision bfloat16") == 0
    assert dtypes == {torch.bfloat16}
    assert {value.dtype for value in read_weights(tmp_path / "runs/a").values()} == {torch.float32}


def test_training_and_validation_compute_float32_without_tf32(train_here, at_step, monkeypatch):
    settings, real = [], torch.backends.cudnn.allow_tf32
    at_step({1}, lambda images: settings.append(torch.backends.cudnn.allow_tf32))
    validate = train.validate

    def record(*arguments):
        settings.append(torch.backends.cudnn.allow_tf32)
        return validate(*arguments)

    monkeypatch.setattr(train, "validate", record)
    assert train_here("--epochs 1 --name a") == 0
    assert settings == [False, False]
    assert torch.backends.cudnn.allow_tf32 == real


def one_step(flags: list[str], compiled: bool = False, precision: str = "float32"):
    """Return losses, gradients and changes of weights of a step; only the arguments matter."""
    config = resolve_config(parse_train_flags([*flags, "--recipe", "document"], None))
    torch.manual_seed(0)
    names = train.inspect.signature(VQVAE).parameters
    model = VQVAE(**{name: getattr(config, name) for name in names})
    with torch.no_grad():  # codes as far apart as encoder outputs: few ties that rounding decides
        model.vector_quantization.embedding.weight.normal_()
    before = copy.deepcopy(model.state_dict())
    optimizer = train.make_optimizer(model, None, config)

    def compute(images):
        return train.compute_losses(model, None, images, precision, config)

    if compiled:
        compute = compile_with_fallback(compute, torch.device("cpu"))
    images = torch.randn(4, 1, 64, 64)
    losses, quantized = compute(images)
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    model.vector_quantization.update_codebook(quantized.vectors, quantized.indices)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    changes = {name: value - before[name] for name, value in model.state_dict().items()}
    return losses.detach(), gradients, changes


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_a_compiled_step_equals_an_eager_step(small, codebook, capsys):
    """Up to rounding, in losses, gradients, and changes of weights and of EMA statistics."""
    flags = [*small, "--codebook", codebook]
    losses, gradients, changes = one_step(flags)
    compiled_losses, compiled_gradients, compiled_changes = one_step(flags, compiled=True)
    assert "cannot be compiled" not in capsys.readouterr().out
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-5)
        clear = gradient.abs() > 1e-4  # Adam's first step does not depend on a gradient's size
        change = changes[name][clear]
        assert (change.abs() > 5e-5).all()
        torch.testing.assert_close(compiled_changes[name][clear], change, rtol=0.01, atol=1e-7)
    for name in changes.keys() - gradients.keys():
        assert changes[name].abs().max() > 1e-3
        torch.testing.assert_close(compiled_changes[name], changes[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_the_losses_of_tuned_are_one_graph(num_codebooks):
    """A graph break would cost a GPU more time than the break's operations."""
    config = resolve_config(parse_train_flags(["--num-codebooks", str(num_codebooks)], None))
    names = train.inspect.signature(VQVAE).parameters
    model = VQVAE(**{name: getattr(config, name) for name in names})
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compute(images):
        return train.compute_losses(model, None, images, "bfloat16", config)

    losses, quantized = torch.compile(compute, backend=backend)(torch.randn(2, 1, 32, 32))
    losses.sum().backward()
    assert len(graphs) == 1
    assert quantized.indices.shape[:3] == (2, 8, 8)


def test_a_step_in_bfloat16_is_close_to_one_in_float32(small):
    losses, gradients, _ = one_step([])
    other_losses, other_gradients, _ = one_step([], precision="bfloat16")
    torch.testing.assert_close(other_losses, losses, rtol=0.02, atol=0)
    one = torch.cat([gradient.flatten() for gradient in gradients.values()])
    other = torch.cat([gradient.flatten() for gradient in other_gradients.values()])
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.95


def test_a_run_that_cannot_be_compiled_equals_an_eager_run(
    tmp_path, train_here, monkeypatch, capsys
):
    train_here("--epochs 1 --name eager")

    def fail(function, **options):
        raise RuntimeError("no compiler here\nand more lines")

    monkeypatch.setattr(torch, "compile", fail)
    assert train_here("--epochs 1 --name compiled --compile") == 0
    assert capsys.readouterr().out.count("runs uncompiled: no compiler here\n") == 1
    runs = tmp_path / "runs"
    assert_same_tensors(read_weights(runs / "eager"), read_weights(runs / "compiled"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_step_waits_for_the_gpu(train_here, monkeypatch):
    """Check the second epoch's 10 steps: the first epoch may wait while it sets things up."""
    real_augment, real_record = dataset.augment, Run.record_step
    steps = 0

    def augment(*arguments):
        if steps == 10:
            torch.cuda.set_sync_debug_mode("error")
        return real_augment(*arguments)

    def record_step(run, losses, finite):
        nonlocal steps
        real_record(run, losses, finite)
        steps += 1
        if steps == 20:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(dataset, "augment", augment)
    monkeypatch.setattr(Run, "record_step", record_step)
    monkeypatch.setattr(ProgressBar, "update", lambda bar, examples: False)  # drawing it waits
    try:
        train_here("--epochs 2 --batch-size 1 --name a --device cuda --no-compile")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == 20
