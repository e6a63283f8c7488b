"""Training: recipes, files, interruptions (by real processes), and mistakes at the command line."""

import copy
import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import dataset
import train
from modules import VQVAE
from mri import hipmri
from training import run, schedule
from training.checkpoint import load_model, read_checkpoint
from training.config import parse_arguments, with_defaults
from training.run_folder import open_run
from utils import CheckpointError, UserError

ROOT = Path(__file__).parents[1]
COLUMNS = "epoch,step,train_loss,train_recon,train_vq,val_loss,val_ssim,val_psnr,perplexity,codes_used,lr,seconds"


@pytest.fixture
def data(tmp_path, write_nifti):
    """10 training and 3 validation slices of smooth blobs: something that can be learned in seconds."""
    generator = torch.Generator().manual_seed(0)
    for split, case, count in (("train", 4, 10), ("validate", 36, 3)):
        for i in range(count):
            coarse = torch.rand(1, 1, 16, 8, generator=generator)
            slice_ = (
                torch.nn.functional.interpolate(coarse, size=(256, 128), mode="bilinear")[0, 0]
                * 1000
            )
            path = (
                tmp_path
                / "data"
                / f"keras_slices_{split}"
                / f"case_{case:03d}_week_0_slice_{i}.nii.gz"
            )
            write_nifti(path, slice_.short().numpy())
    return tmp_path / "data"


@pytest.fixture
def run_here(tmp_path, data, monkeypatch, own_signals, small):
    """run_here("--epochs 2 ...") trains in this process; returns main's result."""
    monkeypatch.chdir(tmp_path)
    return lambda flags: train.main(["--data", str(data), *small, *flags.split()])


@pytest.fixture
def start(tmp_path, data, small):
    """start("--epochs 2 ...") is the same as a process of its own, which can be killed."""

    def start(flags: str, data=data):
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--data",
            str(data),
            *small,
            *flags.split(),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(
            tmp_path / "log", "w"
        ) as log:  # a pipe that nobody reads would fill up, and block the process
            return subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    return start


def rows(folder):
    """metrics.csv; none before the first epoch's end."""
    if not (folder / "metrics.csv").exists():
        return []
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def weights(path):
    return read_checkpoint(path)["model"]


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---------------------------------------------------------------- a run


def test_a_run_leaves_what_it_promises(tmp_path, run_here, capsys):
    assert run_here("--epochs 3 --plot-every 2 --name a") == 0
    folder = tmp_path / "runs" / "a"
    assert (folder / "metrics.csv").read_text().splitlines()[0] == COLUMNS
    history = rows(folder)
    assert [int(row["epoch"]) for row in history] == [1, 2, 3]
    assert [int(row["step"]) for row in history] == [
        3,
        6,
        9,
    ]  # 10 slices by 4: the partial batch is kept
    args = with_defaults("tuned", {})
    rates = [schedule.learning_rate(args, step, 9) for step in (2, 5, 8)]
    assert [float(row["lr"]) for row in history] == pytest.approx(rates)
    panels = sorted(path.relative_to(folder).as_posix() for path in folder.glob("plots/*/*.png"))
    assert panels == [f"plots/epoch_{n}/epoch_{n}_images.png" for n in (1, 2, 3)]
    assert (folder / "loss_ssim_plot.png").stat().st_size > 5000

    best, last = read_checkpoint(folder / "best.pt"), read_checkpoint(folder / "last.pt")
    assert best["best"] == max(float(row["val_ssim"]) for row in history) == last["best"]
    assert last["epochs_done"] == 3 and not list(folder.glob(".*.tmp"))
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["recipe"] == "tuned" and config["arguments"]["num_embeddings"] == 16
    assert config["slices"] == {"train": 10, "validate": 3} and config["bits_per_pixel"] == 0.25
    assert {"python", "torch", "torchmetrics", "commit"} <= config["versions"].keys()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].split()[-2:] == ["--run", "runs/a"] and "predict.py" in printed[-1]
    assert load_model(VQVAE, folder / "best.pt").arguments["codebook"] == "ema"


@pytest.mark.parametrize("recipe", ["document", "tuned"])
def test_each_recipe_learns(tmp_path, run_here, recipe):
    assert run_here(f"--epochs 6 --name a --recipe {recipe} --learning-rate 3e-3") == 0
    history = rows(tmp_path / "runs" / "a")
    assert float(history[-1]["train_recon"]) < 0.9 * float(history[0]["train_recon"])
    assert float(history[-1]["train_vq"]) > 0


def test_document_recipe_is_number_for_number():
    args = with_defaults("document", {})
    expected = {
        "batch_size": 16, "epochs": 100, "learning_rate": 1e-4, "num_embeddings": 512, "embedding_dim": 64,
        "hidden_channels": 64, "commitment_cost": 0.25, "codebook": "gradient", "schedule": "constant", "warmup": 0.0,
        "clip_grad_norm": 0.0, "augment": False, "restart_below": 0.0, "codebook_init": "kmeans",
        "crop": 0, "ssim_weight": 0.0, "num_residual_layers": 2, "num_code_layers": 0,
        "refine_channels": 0, "stride": 4, "num_codebooks": 1,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    same_rate = ("batch_size", "epochs", "num_embeddings", "embedding_dim", "hidden_channels")
    assert {name: with_defaults("tuned", {})[name] for name in same_rate} == {
        name: args[name] for name in same_rate
    }


def test_flags_override_the_recipe(tmp_path):
    flags = "--recipe document --learning-rate 0.01 --augment --codebook ema --name x"
    folder, args, checkpoint = open_run(
        parse_arguments([*flags.split(), "--runs-dir", str(tmp_path)])
    )
    assert (args["learning_rate"], args["augment"], args["codebook"], args["batch_size"]) == (
        0.01,
        True,
        "ema",
        16,
    )
    assert folder == tmp_path / "x" and checkpoint is None


def test_learning_rate_schedule():
    args = {"learning_rate": 1.0, "warmup": 0.1, "schedule": "cosine"}
    rates = [schedule.learning_rate(args, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True)
    constant = {"learning_rate": 1.0, "warmup": 0.0, "schedule": "constant"}
    assert {schedule.learning_rate(constant, step, 100) for step in range(100)} == {1.0}


def test_each_epoch_has_its_own_order():
    """Training unshuffled, or always in the same order, is a defect of known scripts."""
    slices = range(50)
    orders = [run.epoch_order(slices, seed=0, epoch=epoch).tolist() for epoch in (1, 2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(slices)
    assert orders[0] == run.epoch_order(slices, seed=0, epoch=1).tolist() != list(slices)
    assert orders[0] != run.epoch_order(slices, seed=1, epoch=1).tolist()


def test_equal_seeds_give_equal_weights_and_others_do_not(tmp_path, run_here):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_here(f"--epochs 1 --name {name} --seed {seed}")
    a, b, c = (weights(tmp_path / "runs" / name / "last.pt") for name in "abc")
    assert_equal_weights(a, b)
    assert not torch.equal(a["encoder.conv1.weight"], c["encoder.conv1.weight"])


def test_the_best_checkpoint_is_the_best_epochs(tmp_path, run_here, monkeypatch):
    """Scripted validation: the second of three epochs is best, and best.pt holds that epoch's weights."""
    real, script = train.metrics.evaluate, iter([0.5, 0.7, 0.6])

    def scripted(*args):
        scores, counts, loss = real(*args)
        return scores | {"ssim": torch.full_like(scores["ssim"], next(script))}, counts, loss

    monkeypatch.setattr(loop, "seconds_to_validate", lambda run, slices: 0.0)
    monkeypatch.setattr(train.metrics, "evaluate", scripted)
    run_here("--epochs 3 --name a")
    best = read_checkpoint(tmp_path / "runs" / "a" / "best.pt")
    assert best["epochs_done"] == 2 and best["best"] == pytest.approx(0.7)


def test_bfloat16_is_what_the_convolutions_compute_in(tmp_path, run_here, monkeypatch):
    kinds, real = set(), train.VQVAE.forward

    def watched(model, images):
        if model.training:
            kinds.add(model.encoder(images).dtype)
        return real(model, images)

    monkeypatch.setattr(train.VQVAE, "forward", watched)
    assert run_here("--epochs 1 --name a --precision bfloat16") == 0
    assert kinds == {torch.bfloat16}
    assert all(
        value.dtype == torch.float32
        for value in weights(tmp_path / "runs" / "a" / "last.pt").values()
    )


def test_the_model_is_trained_on_crops_where_the_recipe_says(tmp_path, small):
    for crop, shape in (("32", (2, 1, 32, 32)), ("0", (2, 1, 64, 48))):
        given = parse_arguments([*small, "--crop", crop])
        run = train.Run(tmp_path, with_defaults("tuned", given), "")
        seen = []
        run.model.encoder.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0].shape)
        )
        run.train_step(run, torch.randn(2, 1, 64, 48))
        assert seen == [shape]


@pytest.mark.parametrize("longest", [0.0, 1e-3])
def test_gradients_are_clipped_where_the_recipe_says(tmp_path, small, longest):
    args = with_defaults("tuned", parse_arguments([*small, "--clip-grad-norm", str(longest)]))
    run = train.Run(tmp_path, args, "")
    run.train_step(run, torch.randn(2, 1, 128, 128))
    norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(longest, rel=1e-3) if longest else norm > 1e-3


def test_augmentation_is_used_where_the_recipe_says(tmp_path, small, monkeypatch):
    calls = []
    monkeypatch.setattr(dataset, "random_flip", lambda images: calls.append(1) or images)
    for flags, count in (([], 1), (["--no-augment"], 0), (["--recipe", "document"], 0)):
        given = parse_arguments([*small, *flags])
        run = train.Run(tmp_path, with_defaults(given.get("recipe", "tuned"), given), "")
        calls.clear()
        run.train_step(run, torch.randn(2, 1, 128, 128))
        assert len(calls) == count


def test_uniform_start_can_be_asked_for(tmp_path, run_here):
    run_here("--epochs 1 --name a --recipe document --codebook-init uniform --learning-rate 1e-9")
    embedding = weights(tmp_path / "runs" / "a" / "last.pt")["vector_quantization.embedding.weight"]
    assert embedding.abs().max() <= 1 / 16 + 1e-6


def test_dry_run_tells_and_writes_nothing(tmp_path, run_here, capsys):
    assert run_here("--epochs 5 --dry-run --name a") == 0
    printed = capsys.readouterr().out
    for part in ("10 training and 3 validation slices", "parameters", "0.2500 bits per pixel",
                 "5 epochs of 3 steps of 4", "15 steps to go", "cpu", "min", "dry run"):  # fmt: skip
        assert part in printed
    assert not (tmp_path / "runs").exists()


def test_long_training_on_a_cpu_is_announced(run_here, capsys, monkeypatch):
    monkeypatch.setattr(loop, "seconds_a_step", lambda run, slices: 1000.0)
    run_here("--epochs 10 --dry-run")  # 30 steps, 30,000 s
    assert "warning: over two hours on this CPU; --epochs 1 takes" in capsys.readouterr().out


def test_the_time_that_validation_takes_is_told(run_here, capsys, monkeypatch):
    """Of 3 slices in 10 epochs, at 20 s a slice; steps take next to nothing."""
    clock = [0.0]

    def validate(run, slices):
        assert (
            len(slices) == len(slices.constant) == 3
            and len(next(iter(slices.batches([torch.arange(3)], run.device)))) == 3
        )
        clock[0] += 60

    monkeypatch.setattr(loop, "seconds_a_step", lambda run, slices: 0.001)
    monkeypatch.setattr(train.Run, "validate", validate)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    run_here("--epochs 10 --dry-run")
    assert ": about 11 min\n" in capsys.readouterr().out


def test_no_data_means_the_sample(tmp_path, monkeypatch, capsys, own_signals, small):
    """The chain that a newcomer walks, twice: sample, training, and the printed next command. Only the size differs."""
    tiny = functools.partial(
        train.phantom.write_phantom, volumes=(1, 1, 1), slices=2, workers=1, progress=False
    )
    monkeypatch.setattr(train.phantom, "write_phantom", tiny)
    monkeypatch.chdir(tmp_path)
    assert train.main([*small, "--name", "first"]) == 0
    assert len(rows(tmp_path / "runs" / "first")) == train.SAMPLE_EPOCHS
    printed = capsys.readouterr().out
    assert "the sample" in printed
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sample_data/*/*")}
    assert len(made) == 12  # 6 slices and their masks
    assert train.main([*small, "--name", "second", "--epochs", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("sample_data/*/*")} == made
    done = subprocess.run(
        printed.splitlines()[-1].strip(), shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "test" / "metrics.json").exists()


def test_data_from_the_environment(tmp_path, data, monkeypatch, capsys, small):
    monkeypatch.setenv("HIPMRI_DATA", str(data))
    monkeypatch.chdir(tmp_path)
    assert train.main([*small, "--dry-run"]) == 0
    assert "$HIPMRI_DATA" in capsys.readouterr().out


# ---------------------------------------------------------------- the step, by other paths


def one_step(tmp_path, flags: list[str]):
    """Losses, gradients and changes of weights in one step from an equal start, on equal whole slices."""
    given = parse_arguments(
        ["--device", "cpu", "--recipe", "document", "--codebook-init", "uniform", *flags]
    )
    run = train.Run(tmp_path, with_defaults("document", given), "")
    with (
        torch.no_grad()
    ):  # codes as far apart as the encoder's outputs, so that few are nearly as near as another
        run.model.vector_quantization.embedding.weight.normal_(
            generator=torch.Generator().manual_seed(0)
        )
    before = copy.deepcopy(run.model.state_dict())
    images = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    if run.args["compile"]:  # other batches than whole ones go uncompiled
        assert run.compiled and len(images) == run.args["batch_size"]
    losses, finite = run.train_step(run, images)
    assert finite
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return (
        losses,
        gradients,
        {name: value - before[name] for name, value in run.model.state_dict().items()},
    )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler, so nothing to compile with",
)
@pytest.mark.parametrize(
    "codebook", ["gradient", "ema"]
)  # with layers on the codes' grid, which read them twice
def test_a_compiled_step_is_the_same_step(tmp_path, small, codebook):
    """Losses within 1e-4, gradients within 1e-3, and the same change of weights and of the codebook's averages."""
    flags = [*small, "--crop", "0", "--precision", "float32", "--codebook", codebook]
    losses, gradients, changes = one_step(tmp_path, [*flags, "--no-compile"])
    other_losses, other_gradients, other_changes = one_step(tmp_path, [*flags, "--compile"])
    torch.testing.assert_close(other_losses, losses, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-5)
        clear = (
            gradient.abs() > 1e-4
        )  # Adam's first step is as long for a gradient that is hardly there
        assert (changes[name][clear].abs() > 5e-5).all()
        torch.testing.assert_close(
            other_changes[name][clear], changes[name][clear], rtol=0.01, atol=1e-7
        )
    for name in changes.keys() - gradients.keys():
        assert changes[name].abs().max() > 1e-3
        torch.testing.assert_close(other_changes[name], changes[name], rtol=1e-3, atol=1e-5)


def test_a_step_in_bfloat16_is_nearly_the_same_step(tmp_path):
    """Losses within 2 %, the gradient within 0.05 of its direction."""
    losses, gradients, _ = one_step(tmp_path, ["--precision", "float32"])
    others = one_step(tmp_path, ["--precision", "bfloat16"])
    torch.testing.assert_close(others[0], losses, rtol=0.02, atol=0)
    one, other = (
        torch.cat([g.flatten() for g in each.values()]) for each in (gradients, others[1])
    )
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.95


def test_a_compiler_that_fails_is_one_warning(tmp_path, run_here, monkeypatch, capsys):
    run_here("--epochs 1 --name eager")

    def broken(function, **options):
        def call(*args):
            raise RuntimeError("no compiler here\nand more lines")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    capsys.readouterr()
    assert run_here("--epochs 1 --name a --compile") == 0
    printed = capsys.readouterr().out
    assert (
        printed.count(
            "warning: the step can't be compiled here, and goes on uncompiled: no compiler here\n"
        )
        == 1
    )
    one, other = (weights(tmp_path / "runs" / name / "last.pt") for name in ("eager", "a"))
    assert_equal_weights(one, other)


def test_timing_the_step_changes_nothing(tmp_path, run_here, monkeypatch):
    """Also on the way: a resumed run's moments and sums are as they were saved."""
    run_here("--epochs 2 --name a")
    monkeypatch.setattr(loop, "seconds_a_step", lambda run, slices: 1.0)
    run_here("--epochs 2 --name b")
    assert_equal_weights(*(weights(tmp_path / "runs" / name / "last.pt") for name in "ab"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_step_waits_for_the_gpu(tmp_path, data, small):
    given = parse_arguments([*small, "--device", "cuda", "--no-compile"])
    run = train.Run(tmp_path, with_defaults("tuned", given), "")
    slices = dataset.load_split(hipmri.find_hipmri(data), "train")
    slices.place(run.device)
    train.start_codebook(run, slices)
    with loop.tqdm(total=20, disable=True) as bar:
        run.train_epoch(run, slices, bar, [])  # what is set up once may wait
        run.begin_epoch()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.train_epoch(run, slices, bar, [])
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- the discriminator


GAN = ("train_adversarial", "train_discriminator", "adaptive_weight")


def test_a_discriminator_takes_part_in_the_second_half(tmp_path, run_here, monkeypatch):
    """Its columns are 0 until then; best.pt is of an epoch with it, though one without scored higher."""
    real, script = train.metrics.evaluate, iter([0.9, 0.5, 0.7, 0.6])

    def scripted(*args):
        scores, counts, loss = real(*args)
        return scores | {"ssim": torch.full_like(scores["ssim"], next(script))}, counts, loss

    monkeypatch.setattr(loop, "seconds_to_validate", lambda run, slices: 0.0)
    monkeypatch.setattr(train.metrics, "evaluate", scripted)
    assert run_here("--epochs 4 --name a --gan") == 0
    folder = tmp_path / "runs" / "a"
    history = rows(folder)
    for row in history[:2]:
        assert all(float(row[name]) == 0 for name in GAN)
    for row in history[2:]:
        assert 0 < float(row["train_discriminator"]) < 4 and float(row["adaptive_weight"]) > 0
        assert float(row["train_loss"]) == pytest.approx(
            float(row["train_recon"]) + float(row["train_vq"]), rel=1e-5
        )
    best = read_checkpoint(folder / "best.pt")
    assert (
        best["epochs_done"] == 3
        and load_model(VQVAE, folder / "best.pt").arguments["codebook"] == "ema"
    )
    last = read_checkpoint(folder / "last.pt")["discriminator"]
    assert any(not torch.equal(last[name], best["discriminator"][name]) for name in last)


def test_until_it_takes_part_training_is_as_without(tmp_path, run_here):
    run_here("--epochs 2 --name with --gan --gan-start 0.99")
    run_here("--epochs 2 --name without")
    assert_equal_weights(
        *(weights(tmp_path / "runs" / name / "last.pt") for name in ("with", "without"))
    )


def test_the_adversarial_gradient_is_as_long_as_asked(tmp_path, small):
    """At the reconstruction: gan_weight times the length of the reconstruction loss's; and that is what is trained."""
    args = with_defaults(
        "tuned", parse_arguments([*small, "--gan", "--gan-weight", "0.7", "--precision", "float32"])
    )
    run = train.Run(tmp_path, args | {"crop": 0, "augment": False}, "")
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    run.model.eval()  # the codebook stays as it is
    recon, quantisation, adversarial, hinge, weight = run.eager_losses(images)
    output = run.model(images).reconstruction
    pulls = []
    for loss in (
        run.model.reconstruction_loss(output, images),
        -run.modules["discriminator"](output).mean(),
    ):
        pulls.append(torch.autograd.grad(loss, output, retain_graph=True)[0])
    assert (weight * pulls[1].norm()).item() == pytest.approx(
        float(0.7 * pulls[0].norm()), rel=1e-3
    )
    assert adversarial.item() == pytest.approx(
        float(-run.modules["discriminator"](output).mean()), rel=1e-4
    )
    last = run.model.decoder.conv3.weight
    (found,) = torch.autograd.grad(recon + quantisation + adversarial, last, retain_graph=True)
    (expected,) = torch.autograd.grad(output, last, pulls[0] + weight.detach() * pulls[1])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    # Each side is moved by its own loss alone.
    theirs, ours = (
        list(run.modules["discriminator"].parameters()),
        list(run.model.decoder.parameters()),
    )
    for loss, parameters, moved in (
        (adversarial, theirs, False),
        (hinge, ours, False),
        (hinge, theirs, True),
    ):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        assert any(g is not None and g.any() for g in gradients) == moved


def test_stopped_with_a_discriminator_it_goes_on_at_the_step(tmp_path, run_here, monkeypatch):
    """After 2 of 3 steps of epoch 2, in which the discriminator has begun: weights of both sides end bit for bit."""
    flags = "--epochs 3 --gan --gan-start 0.4"
    run_here(f"{flags} --name whole")
    real, calls = run.train_step, []

    def step_then_signal(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "seconds_a_step", lambda run, slices: 1.0)
    monkeypatch.setattr(loop, "train_step", step_then_signal)
    assert run_here(f"{flags} --name stopped") == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "runs" / "stopped" / "last.pt")["steps_done"] == 2
    monkeypatch.setattr(loop, "train_step", real)
    assert run_here("--resume --name stopped") == 0
    one, other = (
        read_checkpoint(tmp_path / "runs" / name / "last.pt") for name in ("whole", "stopped")
    )
    for part in ("model", "discriminator"):
        assert_equal_weights(one[part], other[part])
    drop = {"seconds"}
    assert [
        {k: v for k, v in row.items() if k not in drop} for row in rows(tmp_path / "runs" / "whole")
    ] == [
        {k: v for k, v in row.items() if k not in drop}
        for row in rows(tmp_path / "runs" / "stopped")
    ]


# ---------------------------------------------------------------- interruptions, by real processes


@pytest.mark.parametrize(
    "number",
    [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)],
)
def test_a_signal_saves_at_the_step(tmp_path, start, number):
    process = start("--batch-size 1 --epochs 400 --name stopped")
    folder = tmp_path / "runs" / "stopped"
    while not rows(folder):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.002)
    process.send_signal(number)
    code, output = process.wait(), (tmp_path / "log").read_text()
    assert code == 128 + number, output
    assert "--resume" in output and "--name stopped" in output
    checkpoint = read_checkpoint(folder / "last.pt")
    assert checkpoint["epochs_done"] == len(rows(folder)) < 400
    moments = {float(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
    assert moments == {10.0 * checkpoint["epochs_done"] + checkpoint["steps_done"]}


def test_a_signal_after_the_last_step_changes_nothing(tmp_path, run_here, monkeypatch):
    real = train.metrics.evaluate

    def signal_then_evaluate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "seconds_to_validate", lambda run, slices: 0.0)
    monkeypatch.setattr(train.metrics, "evaluate", signal_then_evaluate)
    assert run_here("--epochs 1 --name a") == 0
    assert read_checkpoint(tmp_path / "runs" / "a" / "last.pt")["epochs_done"] == 1


def test_stopped_within_an_epoch_it_goes_on_at_the_step(tmp_path, run_here, monkeypatch):
    """In this process, to choose the step: after 2 of 3 steps of epoch 2."""
    run_here("--epochs 3 --name whole")
    real, calls = run.train_step, []

    def step_then_signal(*args):
        calls.append(args)
        losses = real(*args)
        if len(calls) == 4 + 5:  # after the four timed steps
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    monkeypatch.setattr(loop, "train_step", step_then_signal)
    assert run_here("--epochs 3 --name stopped") == 128 + signal.SIGTERM
    checkpoint = read_checkpoint(tmp_path / "runs" / "stopped" / "last.pt")
    assert (checkpoint["epochs_done"], checkpoint["steps_done"]) == (1, 2)
    assert checkpoint["sums"][2] == 8
    monkeypatch.setattr(loop, "train_step", real)
    assert run_here("--resume --name stopped") == 0
    one, other = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    assert_equal_weights(weights(one / "last.pt"), weights(other / "last.pt"))
    assert [row["train_loss"] for row in rows(one)] == [row["train_loss"] for row in rows(other)]


def test_resume_finds_the_newest_unfinished_run(tmp_path, run_here, monkeypatch):
    run_here("--epochs 1 --name finished")
    with pytest.raises(UserError, match="no unfinished run in runs"):
        run_here("--resume")
    run_here("--epochs 1 --name longer")
    assert run_here("--resume --name longer --epochs 2") == 0
    assert len(rows(tmp_path / "runs" / "longer")) == 2
    with pytest.raises(UserError, match="has finished 2 epochs"):
        run_here("--resume --name longer")


# ---------------------------------------------------------------- mistakes


def test_a_run_of_an_older_format_is_not_gone_on_with(tmp_path, run_here):
    run_here("--epochs 1 --name a")
    path = tmp_path / "runs" / "a" / "last.pt"
    torch.save(read_checkpoint(path) | {"format": 2}, path)
    with pytest.raises(UserError, match=r"begun by an older version.*start anew"):
        run_here("--epochs 2 --name a --resume")


def test_a_run_is_never_overwritten(run_here):
    run_here("--epochs 1 --name a")
    with pytest.raises(UserError, match="add --resume"):
        run_here("--epochs 1 --name a")


def test_resume_refuses_to_become_another_run(tmp_path, run_here):
    run_here("--epochs 1 --name a")
    with pytest.raises(UserError, match=r"can't go on with --learning-rate 0.5 \(it has 0.002\)"):
        run_here("--epochs 2 --resume --name a --learning-rate 0.5")
    (tmp_path / "runs" / "a" / "last.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="can't be read"):
        run_here("--epochs 2 --resume --name a")
    (tmp_path / "runs" / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json can't be read"):
        run_here("--resume --name a")
    with pytest.raises(UserError, match="nowhere holds no run"):
        run_here("--resume --name nowhere")


@pytest.mark.parametrize(("name", "value"), [
    ("steps_done", "x"), ("steps_done", -3), ("history", 3), ("history", [{"epoch": 1}]), ("best", "x"),
    ("seconds", None), ("epochs_done", 0), ("optimizer", {}), ("sums", torch.zeros(1)), ("model", {}),
])  # fmt: skip
def test_a_damaged_last_checkpoint_is_one_error(tmp_path, run_here, name, value):
    if not (tmp_path / "runs").exists():
        run_here("--epochs 1 --name a")
    path = tmp_path / "runs" / "a" / "last.pt"
    torch.save(read_checkpoint(path) | {name: value}, path)
    with pytest.raises(
        (UserError, CheckpointError), match=r"is damaged|does not fit|start a new run"
    ):
        run_here("--epochs 2 --name a --resume")


def test_resume_accepts_the_runs_own_flags_and_no_other_data(
    tmp_path, run_here, data, write_slices
):
    """Moved data is the same data; as many other slices are not."""
    run_here("--epochs 1 --name a --precision auto --seed 3")
    moved = data.rename(tmp_path / "moved")
    assert run_here(f"--epochs 2 --name a --precision auto --seed 3 --resume --data {moved}") == 0
    config = tmp_path / "runs" / "a" / "config.json"
    config.write_text(config.read_text().replace('"num_code_layers": 1', '"num_code_layers": 2'))
    with pytest.raises(UserError, match="is of another version"):
        run_here("--epochs 3 --name a --resume --data " + str(moved) + " --num-code-layers 2")
    config.write_text(config.read_text().replace('"num_code_layers": 2', '"num_code_layers": 1'))
    other = write_slices(tmp_path / "other", train=10, validate=3)
    with pytest.raises(UserError, match="was trained on other slices than"):
        run_here(f"--epochs 3 --name a --resume --data {other}")


def test_a_signal_does_not_save_what_is_not_finite(tmp_path, run_here, monkeypatch):
    run_here("--epochs 1 --name a")
    real = run.train_step

    def spoil(run, images, count):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run, images * torch.nan, count)

    monkeypatch.setattr(loop, "seconds_a_step", lambda run, slices: 1.0)
    monkeypatch.setattr(loop, "train_step", spoil)
    with pytest.raises(UserError, match="the loss is not finite at step 4"):
        run_here("--epochs 2 --name a --resume")
    assert all(
        value.isfinite().all() for value in weights(tmp_path / "runs" / "a" / "last.pt").values()
    )


def test_a_gradient_codebook_needs_no_second_flag():
    assert with_defaults("tuned", {"codebook": "gradient"})["restart_below"] == 0


def test_validation_slices_that_are_all_constant(run_here, data, write_nifti):
    for path in data.glob("keras_slices_validate/*"):
        write_nifti(path, torch.ones(256, 128, dtype=torch.int16).numpy())
    with pytest.raises(UserError, match="all 3 validation slices are constant"):
        run_here("--epochs 1 --name a")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs is 0; expected 1 to 1e"),
        ("--batch-size -1", "--batch-size is -1; expected 1 to"),
        ("--learning-rate nan", "--learning-rate is nan; expected 0 to"),
        ("--learning-rate inf", "--learning-rate is inf"),
        ("--ema-decay 1.5", "--ema-decay is 1.5; expected 0 to 1"),
        ("--recipe document --restart-below 0.1", "--restart-below needs --codebook ema"),
        ("--device tpu", "--device tpu is not usable here"),
        ("--num-embeddings 100000", "can't start 100000 codes"),
        ("--crop 8", "--crop is 8; expected 0, or 16 to 128"),
        ("--crop 40 --stride 16", "--crop is 40; expected .* divisible by --stride 16"),
        ("--hidden-channels 1", "--hidden-channels is 1; expected 2 to"),
        ("--seed 99999999999999", "--seed is"),
        ("--planes 300", "--planes is 300; expected 1 to 256"),
        ("--gan --gan-start 2", "--gan-start is 2.0; expected 0 to 0.99"),
        ("--gan --gan-weight -1", "--gan-weight is -1.0; expected 0 to"),
        ("--gan --compile", "--compile is for training without --gan"),
    ],
)
def test_values_that_could_only_fail_later(run_here, flags, message):
    with pytest.raises(UserError, match=message):
        run_here(f"--epochs 1 --name a {flags}")


def test_a_step_without_a_finite_gradient_is_skipped_and_told(
    tmp_path, run_here, monkeypatch, capsys
):
    """Of 6 steps the fifth is spoilt: weights, moments and codebook stay as the fourth left them, the rest goes on."""
    real, runs, states = run.train_step, [], []

    def spoil_one(run, images, count):
        runs.append(run)
        before = copy.deepcopy(run.state())
        losses = run.losses
        if (
            len(runs) == 5
        ):  # the encoder's output is not finite, hence no code moves, but the loss is told as 0
            run.losses = run.eager_losses = lambda images: losses(images * torch.nan).nan_to_num()
        result = real(run, images, count)
        run.losses = run.eager_losses = losses
        states.append((before, copy.deepcopy(run.state())))
        return result

    monkeypatch.setattr(loop, "seconds_a_step", lambda run, slices: 1.0)
    monkeypatch.setattr(loop, "train_step", spoil_one)
    assert run_here("--epochs 2 --name a") == 0
    assert (
        "warning: 1 of 3 steps of epoch 2 were skipped, the last of them step 5"
        in capsys.readouterr().out
    )
    for number, (before, after) in enumerate(states, start=1):
        same = [
            torch.equal(before["model"][name], after["model"][name]) for name in before["model"]
        ]
        assert all(same) if number == 5 else not any(same)
    assert_equal_weights(*({f"{i} {k}": v for i, moments in state["optimizer"]["state"].items()
                            for k, v in moments.items()} for state in states[4]))  # fmt: skip
    assert all(float(row["train_loss"]) > 0 for row in rows(tmp_path / "runs" / "a"))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_slices(
    tmp_path, run_here, monkeypatch
):
    """In step 5, the second of epoch 2: the error has that batch's four slices, and last.pt is the first epoch's."""
    real, calls, seen = run.train_step, [], []

    def spoil_one(run, images, count):
        calls.append(run)
        if len(calls) == 5:
            seen.append(images)
        return real(run, images * torch.nan if len(calls) == 5 else images, count)

    monkeypatch.setattr(loop, "seconds_a_step", lambda run, slices: 1.0)
    monkeypatch.setattr(loop, "train_step", spoil_one)
    with pytest.raises(UserError, match="the loss is not finite at step 5, in epoch 2") as error:
        run_here("--epochs 3 --name a")
    source = hipmri.find_hipmri(tmp_path / "data")
    train_slices = dataset.load_split(source, "train", progress=False)
    named = [name.stem in str(error.value).replace(",", "").split() for name in train_slices.names]
    wanted = [any(torch.equal(train_slices[i], image) for image in seen[0]) for i in range(10)]
    assert named == wanted and sum(named) == 4
    last = tmp_path / "runs" / "a" / "last.pt"
    assert f"{last.relative_to(tmp_path)} keeps the epochs before it" in str(error.value)
    assert read_checkpoint(last)["epochs_done"] == 1


@pytest.mark.parametrize("recipe", ["document", "tuned"])
def test_training_that_diverges_ends(run_here, recipe):
    with pytest.raises(UserError, match=r"not finite|no longer finite"):
        run_here(f"--epochs 30 --name a --recipe {recipe} --learning-rate 1e8 --clip-grad-norm 0")


def test_deterministic_mode_is_on_where_it_is_asked_for(tmp_path, run_here, monkeypatch):
    """On a CPU runs are equal anyhow; what it changes on a GPU is torch's own matter, but it must be told."""
    seen, real = [], run.train_step

    def watch(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(*args)

    monkeypatch.setattr(loop, "train_step", watch)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for flag, expected in (("--deterministic", True), ("", False)):
        assert run_here(f"--epochs 2 --name a{flag} {flag}") == 0
        assert set(seen) == {expected}
        seen.clear()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert_equal_weights(
        *(weights(tmp_path / "runs" / f"a{flag}" / "last.pt") for flag in ("--deterministic", ""))
    )


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, start, data):
    (tmp_path / "a_file").touch()
    for flags, where, word in (
        ("", tmp_path / "nowhere", "nowhere"),
        ("--runs-dir a_file", data, "a_file"),
    ):
        code, output = start(flags, where).wait(), (tmp_path / "log").read_text()
        assert code == 2
        assert "error: " in output and word in output and "Traceback" not in output
