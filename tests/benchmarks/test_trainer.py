"""benchmarks/trainer.py: its training is that of train.py."""

import pytest
import torch
from trainer import Trainer

import train
from dataset import load_split
from mri.hipmri import find_hipmri
from training.checkpoint import read_checkpoint
from training.config import parse_train_flags, resolve_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("recipe", ["tuned", "document"])
def test_two_epochs_give_the_weights_of_train_py(write_slices, tmp_path, small, recipe):
    """The last batch of each epoch is smaller than the others."""
    data = write_slices(tmp_path / "data", train=6, validate=1)
    flags = ["--data", str(data), "--runs-dir", str(tmp_path), "--name", "a", "--epochs", "2"]
    flags += [*small, "--recipe", recipe, "--no-compile"]
    assert train.main(flags) == 0
    config = resolve_config(parse_train_flags(flags, None))
    slices = load_split(find_hipmri(data), "train", progress=False)
    trainer = Trainer(config, CPU)
    train.init_codebook(trainer.model, slices, config, CPU)
    for _ in range(2):
        trainer.train_epoch(slices)
    weights = read_checkpoint(tmp_path / "a" / "last.pt")["model"]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_step_reports_non_finite_gradients_and_changes_nothing(small):
    trainer = Trainer(resolve_config(parse_train_flags([*small, "--no-augment"], None)), CPU)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    losses, finite = trainer.step(torch.full((4, 1, 64, 64), torch.nan))
    assert not finite and not losses.isfinite().all()
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_it_rejects_gan():
    with pytest.raises(ValueError, match="gan is True"):
        Trainer(resolve_config({"gan": True}), CPU)
