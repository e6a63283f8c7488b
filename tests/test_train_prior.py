"""train_prior.py: what a prior's training writes, repeats and resumes; mistakes."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
from training_runs import assert_same_tensors, read_rows, read_weights, rows_without_seconds

import train
import train_prior
import utils
from modules import VQVAE
from prior import causal_training, flow_training
from prior.config import PriorConfig
from prior.flow import FlowPrior
from prior.model import CodePrior
from training.checkpoint import load_model, read_checkpoint
from training.run_folder import load_run_data
from training.run_names import PRIORS
from utils import CheckpointError, UserError

FLAGS = ["--device", "cpu", "--precision", "float32", "--batch-size", "4", "--learning-rate",
         "5e-3", "--channels", "24"]  # fmt: skip
CAUSAL_FLAGS = ["--model", "causal", "--num-layers", "1"]
CPU = torch.device("cpu")
both_models = pytest.mark.parametrize("model", ["flow", "causal"])


@pytest.fixture(scope="module")
def vqvae_runs(tmp_path_factory, small, write_slices) -> Path:
    """The parent of runs/a: a VQ-VAE trained for one epoch on 6 slices, with 3 for validation."""
    folder = tmp_path_factory.mktemp("vqvae")
    data = write_slices(folder / "data", train=6, validate=3)
    flags = ["--data", data, "--cache-dir", folder / "cache", "--runs-dir", folder / "runs"]
    flags += [*small, "--stride", "8", "--epochs", "1", "--name", "a"]  # 32 x 16 codes
    assert train.main(list(map(str, flags))) == 0
    return folder


@pytest.fixture
def run(vqvae_runs, tmp_path, monkeypatch) -> Path:
    """A copy of the VQ-VAE's run in the test's folder, without plots of its prior."""
    shutil.copytree(vqvae_runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_prior, "plot_epoch", lambda *arguments: None)
    return tmp_path / "runs" / "a"


def model_flags(model: str) -> list[str]:
    """Return the flags of a small prior that trains in seconds."""
    return [*FLAGS, *CAUSAL_FLAGS] if model == "causal" else FLAGS


def start(run: Path, flags: str, model: str = "causal") -> int:
    return train_prior.main(["--run", str(run), *model_flags(model), *flags.split()])


def assert_same_priors(one: Path, other: Path) -> None:
    """Check that two priors have equal checkpoints and equal tables."""
    for file in ("last.pt", "best.pt"):
        assert_same_tensors(read_weights(one, file=file), read_weights(other, file=file))
    if "trained" in read_checkpoint(one / "last.pt"):
        assert_same_tensors(read_weights(one, "trained"), read_weights(other, "trained"))
    assert rows_without_seconds(one) == rows_without_seconds(other)


def prepare_causal(run: Path, split: str = "validate"):
    """Return the VQ-VAE, the slices of a split, an untrained causal prior, and the codes."""
    vqvae = load_model(VQVAE, run / "best.pt")
    slices, _ = load_run_data(run, split)
    config = PriorConfig(channels=16)
    prior, codes, _ = causal_training.prepare(vqvae, slices, slices, config)
    return vqvae, slices, prior, codes


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize(
    ("model", "flags", "metric"), [("flow", "", "velocity"), ("causal", "--mirrored 0.75", "bits")]
)
def test_a_run_writes_its_files(vqvae_runs, tmp_path, capsys, model, flags, metric):
    run = shutil.copytree(vqvae_runs / "runs", tmp_path / "runs") / "a"
    assert start(run, f"--epochs 3 --keep-every 2 {flags}", model) == 0
    folder = run / PRIORS[model]
    assert sorted(path.name for path in folder.glob("*.pt")) == ["best.pt", "epoch_2.pt", "last.pt"]
    assert read_checkpoint(folder / "epoch_2.pt")["epochs_done"] == 2
    rows = read_rows(folder)
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    columns = ["epoch", "step", "train_loss", "val_loss", f"val_{metric}", "lr", "seconds"]
    assert list(rows[0]) == columns
    scores = [float(row[f"val_{metric}"]) for row in rows]
    assert scores[-1] < scores[0]
    assert scores == [float(row["val_loss"]) for row in rows]
    best = read_checkpoint(folder / "best.pt")["best"]
    assert best == min(scores)
    assert (folder / f"{metric}_plot.png").stat().st_size > 5000
    plots = sorted(path.name for path in folder.glob("plots/*/*.png"))
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["model"] == model
    assert config["slices"] == {"train": 6, "validate": 3}
    results = json.loads((folder / "metrics.json").read_text())["validation"]
    printed = capsys.readouterr().out
    if model == "flow":
        assert plots == [f"epoch_{n}_samples.png" for n in (1, 3)]
        assert results["flow"]["velocity_error"] == pytest.approx(best, rel=1e-5)
        texts = ("4 of 4 principal components, with 100.0%", "velocity error", "generate.py --run")
    else:
        assert plots == []
        assert set(results) == {"prior", "fixed_length", "empirical_entropy", "gzip"}
        assert results["fixed_length"] == {"bits_per_code": 4.0, "bits_per_pixel": 4 / 64}
        assert results["prior"]["bits_per_code"] == pytest.approx(best, rel=1e-5)
        assert results["prior"]["bits_per_pixel"] == pytest.approx(best / 64, rel=1e-5)
        assert config["arguments"]["mirrored"] == 0.75
        texts = ("bits per code", "empirical entropy", "gzip")
        assert "generate.py" not in printed
    for text in texts:
        assert text in printed


@both_models
def test_a_dry_run_writes_nothing(run, capsys, model):
    assert start(run, "--dry-run", model) == 0
    assert "dry run" in capsys.readouterr().out
    assert not (run / PRIORS[model]).exists()


def test_a_checkpoint_has_the_average_and_the_trained_weights(run):
    """After one step, whose decay is 0.1, the average is almost equal to the weights."""
    start(run, "--epochs 1 --batch-size 6", "flow")
    checkpoint = read_checkpoint(run / "prior" / "best.pt")
    average, trained = checkpoint["model"], checkpoint["trained"]
    flow = load_model(FlowPrior, run / "prior" / "best.pt")
    torch.manual_seed(0)
    initial = FlowPrior(**flow.arguments).state_dict()
    changed = [name for name in trained if not torch.equal(trained[name], average[name])]
    assert "unet.last.weight" in changed
    for name in changed:
        torch.testing.assert_close(average[name], trained[name].lerp(initial[name], 0.1))


# ---------------------------------------------------------------- parts


def test_validation_counts_the_bits_per_code(run):
    _, _, prior, data = prepare_causal(run)
    torch.nn.init.normal_(prior.last.weight)
    codes = data.encoded[:, 0].long()
    with torch.no_grad():
        logits = prior(codes, data.positions, torch.zeros(3, dtype=torch.long))
    nats = -logits.log_softmax(-1).gather(-1, codes[..., None]).sum()
    bits = causal_training.validate(prior, data, PriorConfig(batch_size=2), CPU)
    assert bits == pytest.approx(float(nats) / math.log(2) / (3 * 512), rel=1e-4)


def test_codes_of_mirrored_slices_are_those_of_the_mirrored_images(run):
    vqvae, slices, _, codes = prepare_causal(run, "train")
    images = slices.batch(torch.arange(6))
    with torch.no_grad():
        for view, axes in enumerate(((), (2,), (3,), (2, 3))):
            assert torch.equal(codes.encoded[:, view].long(), vqvae.encode(images.flip(axes)))
    torch.testing.assert_close(codes.positions, torch.linspace(0, 1, 6))


@pytest.mark.parametrize("mirrored", [0.0, 0.6])
def test_views_and_unknown_positions_are_drawn_at_the_configured_rates(mirrored):
    """A stub takes the prior's place; the codes are the numbers of their views."""
    calls = []

    def prior(codes, position, view):
        calls.append((codes, position, view))
        return torch.zeros(*codes.shape, 4)

    codes = torch.arange(4).view(1, 4, 1, 1).expand(2000, 4, 2, 2)
    config = PriorConfig(mirrored=mirrored)
    torch.manual_seed(0)
    loss = causal_training.compute_loss(prior, codes, torch.zeros(2000), "float32", config)
    assert float(loss) == pytest.approx(2)  # bits
    ((codes, position, view),) = calls
    assert torch.equal(codes[:, 0, 0], view)
    rates = torch.bincount(view, minlength=4) / 2000
    expected = torch.tensor([1 - mirrored, *[mirrored / 3] * 3])
    torch.testing.assert_close(rates, expected, atol=0.04, rtol=0)
    assert position.isnan().float().mean() == pytest.approx(0.1, abs=0.03)


# ---------------------------------------------------------------- interruptions


def before_step(monkeypatch, model, number, action):
    """Call `action()` before the step with this number, counted from 1 over all runs."""
    module = train_prior.MODELS[model]
    real, count = module.compute_loss, 0

    def compute_loss(*arguments):
        nonlocal count
        count += 1
        if count == number:
            action()
        return real(*arguments)

    monkeypatch.setattr(module, "compute_loss", compute_loss)


@both_models
def test_a_signal_saves_at_the_step_and_resume_gives_the_same_prior(
    tmp_path, run, monkeypatch, capsys, model
):
    """After one of the two steps of the second epoch."""
    assert start(run, "--epochs 3", model) == 0
    (run / PRIORS[model]).rename(tmp_path / "uninterrupted")
    before_step(monkeypatch, model, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start(run, "--epochs 3", model) == 128 + signal.SIGTERM
    assert read_checkpoint(run / PRIORS[model] / "last.pt")["steps_done"] == 1
    assert f"train_prior.py --resume --run {run}" in capsys.readouterr().out.splitlines()[-1]
    assert train_prior.main(["--run", "runs/a", "--resume", "--model", model]) == 0
    assert_same_priors(run / PRIORS[model], tmp_path / "uninterrupted")


@both_models
def test_an_epoch_that_ended_in_a_crash_is_repeated_by_resume(tmp_path, run, monkeypatch, model):
    assert start(run, "--epochs 3", model) == 0
    (run / PRIORS[model]).rename(tmp_path / "uninterrupted")

    def crash():
        raise RuntimeError("crash in the second step of epoch 2")

    before_step(monkeypatch, model, 4, crash)
    with pytest.raises(RuntimeError, match="crash"):
        start(run, "--epochs 3", model)
    assert train_prior.main(["--run", str(run), "--resume", "--model", model]) == 0
    assert_same_priors(run / PRIORS[model], tmp_path / "uninterrupted")


def test_a_report_that_a_kill_prevented_is_written_by_resume(run):
    """Without --run, the newest prior is resumed."""
    start(run, "--epochs 1")
    path = run / "causal_prior" / "metrics.json"
    report = path.read_text()
    path.unlink()
    assert train_prior.main(["--resume", "--model", "causal"]) == 0
    assert path.read_text() == report
    with pytest.raises(UserError, match="has finished 1 epochs"):
        train_prior.main(["--resume", "--model", "causal"])
    with pytest.raises(UserError, match="nowhere contains no flow prior to resume"):
        train_prior.main(["--resume", "--runs-dir", "nowhere"])


@both_models
def test_two_processes_train_as_one(tmp_path, run, monkeypatch, model):
    """Without random draws. Of the last of 5 slices in batches of 4, one process has none."""
    data = shutil.copytree(Path(read_config(run)["data"]), tmp_path / "data")
    (data / "keras_slices_train" / "case_004_week_0_slice_5.nii.gz").unlink()
    flags = ["--epochs", "2", "--plot-every", "9", "--data", str(data)]
    flags += ["--mirrored", "0"] if model == "causal" else []
    monkeypatch.setattr(PriorConfig, "unknown_position", 0)
    monkeypatch.setattr(flow_training, "compute_loss", flow_training.compute_loss)
    remove_random_draws()
    start(run, " ".join(flags), model)
    (run / PRIORS[model]).rename(tmp_path / "one")
    flags = ["--run", run, *model_flags(model), *flags]
    ranks = processes.start_ranks(tmp_path, "train_prior.py", *flags, before=remove_random_draws)
    assert [processes.wait(rank) for rank in ranks] == [0, 0], (tmp_path / "log_0").read_text()
    one, two = read_rows(tmp_path / "one"), read_rows(run / PRIORS[model])
    for row, other in zip(one, two, strict=True):
        for name in row.keys() - {"seconds"}:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name


def remove_random_draws() -> None:
    """Replace what is drawn at random by fixed values, because draws differ between processes."""
    PriorConfig.unknown_position = 0

    def compute_loss(model, components, position, precision, config):
        x = components[:, 0].float()
        time, given = torch.full((len(x),), 0.5), torch.zeros(len(x), dtype=torch.long)
        return model.loss(x, x.roll(1, -1), time, position, given).mean()

    flow_training.compute_loss = compute_loss


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["arguments"]


# ---------------------------------------------------------------- mistakes


def test_a_prior_is_neither_overwritten_nor_turned_into_another(run):
    start(run, "--epochs 1")
    with pytest.raises(
        UserError, match="causal_prior exists; add --resume to continue it, or move it"
    ):
        start(run, "--epochs 1")
    resume = ["--run", str(run), "--resume", "--model", "causal"]
    with pytest.raises(UserError, match="has finished 1 epochs"):
        train_prior.main(resume)
    with pytest.raises(UserError, match=r"cannot be resumed with --dropout 0.5 \(was 0.0\)"):
        train_prior.main([*resume, "--epochs", "2", "--dropout", "0.5"])
    checkpoint = read_checkpoint(run / "best.pt")
    checkpoint["model"]["vector_quantization.embedding.weight"] *= -1
    torch.save(checkpoint, run / "best.pt")
    with pytest.raises(UserError, match=r"of a different model: .*best\.pt has changed"):
        train_prior.main([*resume, "--epochs", "2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs is 0; expected 1 to"),
        ("--channels 30", "--channels is 30; expected a multiple of 12"),
        ("--model causal --dropout 1", "--dropout is 1.0; expected 0 to 0.99"),
        ("--model causal --mirrored 2", "--mirrored is 2.0; expected 0 to 1"),
        (
            "--num-layers 1",
            "--num-layers does not apply to the flow prior; omit it, or train with ",
        ),
        ("--model causal --components 4", "--components does not apply to the causal prior"),
        ("--learning-rate nan", "--learning-rate is nan"),
        ("--batch-size 0", "--batch-size is 0"),
        ("--seed -1", "--seed is -1"),
        ("--data /nowhere", "cannot open the data that --data names"),
    ],
)
def test_values_that_cannot_work_are_errors_before_training(run, flags, message):
    with pytest.raises(UserError, match=message):
        train_prior.main(["--run", str(run), "--device", "cpu", *flags.split()])
    assert not list(run.glob("*prior"))


def test_runs_without_a_usable_vqvae_are_errors(tmp_path, run):
    with pytest.raises(UserError, match=r"no run in .* has a best\.pt"):
        train_prior.main(["--runs-dir", str(tmp_path / "none")])
    with pytest.raises(CheckpointError, match="none"):
        train_prior.main(["--run", str(tmp_path / "none")])
    model = VQVAE(num_codebooks=2, num_embeddings=4)
    checkpoint = read_checkpoint(run / "best.pt")
    changes = {"model_args": model.arguments, "model": model.state_dict()}
    torch.save(checkpoint | changes, run / "best.pt")
    with pytest.raises(UserError, match="has 2 codebooks; a causal prior needs one"):
        train_prior.main(["--runs-dir", "runs", "--device", "cpu", "--model", "causal"])


def test_a_prior_of_an_earlier_version_is_an_error(run):
    """Its config.json has no model."""
    (run / "prior").mkdir()
    utils.write_json(run / "prior" / "config.json", {"arguments": {"num_grids": 2}})
    for flags in ([], ["--resume"]):
        with pytest.raises(UserError, match="prior was trained by an earlier version; move it"):
            train_prior.main(["--run", str(run), "--device", "cpu", *flags])


def test_a_run_has_a_flow_and_a_causal_prior(run):
    start(run, "--epochs 1", "flow")
    start(run, "--epochs 1", "causal")
    assert train_prior.main(["--resume", "--epochs", "2"]) == 0
    assert len(read_rows(run / "prior")) == 2
    assert len(read_rows(run / "causal_prior")) == 1
    assert train_prior.main(["--resume", "--epochs", "3", "--model", "causal"]) == 0
    assert len(read_rows(run / "causal_prior")) == 3


def test_the_report_is_that_of_the_best_checkpoint(run, monkeypatch):
    """Not of the last one: here the first epoch is scripted to be the best."""
    real, calls = causal_training.validate, []

    def validate(*arguments):
        calls.append(1)
        return real(*arguments) + 10 * (len(calls) == 2)

    monkeypatch.setattr(causal_training, "validate", validate)
    start(run, "--epochs 2")
    best = load_model(CodePrior, run / "causal_prior" / "best.pt")
    *_, codes = prepare_causal(run)
    bits = real(best, codes, PriorConfig(batch_size=4), CPU)
    report = json.loads((run / "causal_prior" / "metrics.json").read_text())
    assert report["validation"]["prior"]["bits_per_code"] == pytest.approx(bits, rel=1e-6)
    assert read_checkpoint(run / "causal_prior" / "best.pt")["epochs_done"] == 1
