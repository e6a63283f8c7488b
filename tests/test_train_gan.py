"""train.py --gan: when the discriminator takes part, what its losses train, and resuming."""

import os
import signal

import pytest
import torch
from training_runs import assert_same_tensors, read_rows, read_weights, rows_without_seconds

import train
from modules import VQVAE
from training.adversarial import PatchDiscriminator
from training.checkpoint import load_model, read_checkpoint
from training.config import parse_train_flags, resolve_config

GAN_COLUMNS = ("train_adversarial", "train_discriminator", "adaptive_weight")


def test_the_discriminator_takes_part_in_the_second_half(tmp_path, train_here, monkeypatch):
    """Its columns are 0 before; best.pt is an epoch with it, although an earlier SSIM is higher."""
    real, script = train.validate, iter([0.9, 0.5, 0.7, 0.6])

    def validate(*arguments):
        return real(*arguments) | {"val_ssim": next(script)}

    monkeypatch.setattr(train, "validate", validate)
    assert train_here("--epochs 4 --name a --gan") == 0
    folder = tmp_path / "runs/a"
    rows = read_rows(folder)
    for row in rows[:2]:
        assert [float(row[name]) for name in GAN_COLUMNS] == [0, 0, 0]
    for row in rows[2:]:
        assert 0 < float(row["train_discriminator"]) < 4
        assert float(row["adaptive_weight"]) > 0
        vqvae_loss = float(row["train_recon"]) + float(row["train_vq"])
        assert float(row["train_loss"]) == pytest.approx(vqvae_loss, rel=1e-5)
    assert read_checkpoint(folder / "best.pt")["epochs_done"] == 3
    assert load_model(VQVAE, folder / "best.pt").arguments["codebook"] == "ema"
    best = read_weights(folder, "discriminator", "best.pt")
    last = read_weights(folder, "discriminator")
    assert any(not torch.equal(last[name], best[name]) for name in last)


def test_until_the_discriminator_starts_a_run_equals_one_without(tmp_path, train_here):
    """A run whose discriminator never starts still has a best.pt, of its last epoch."""
    train_here("--epochs 2 --name with --gan --gan-start 0.99")
    train_here("--epochs 2 --name without")
    runs = tmp_path / "runs"
    assert_same_tensors(read_weights(runs / "with"), read_weights(runs / "without"))
    assert read_checkpoint(runs / "with/best.pt")["epochs_done"] == 2


def test_a_run_with_a_discriminator_resumes_at_the_step(tmp_path, train_here, at_step):
    """After 2 of 3 steps of epoch 2, when it has started: both networks end bit-identical."""
    flags = "--epochs 3 --gan --gan-start 0.4"
    train_here(f"{flags} --name uninterrupted")
    at_step({5}, lambda images: os.kill(os.getpid(), signal.SIGTERM))
    assert train_here(f"{flags} --name a") == 128 + signal.SIGTERM
    one, other = tmp_path / "runs/a", tmp_path / "runs/uninterrupted"
    assert read_checkpoint(one / "last.pt")["steps_done"] == 2
    assert train_here("--resume --name a") == 0
    for module in ("model", "discriminator"):
        assert_same_tensors(read_weights(one, module), read_weights(other, module))
    assert rows_without_seconds(one) == rows_without_seconds(other)


def test_each_network_is_trained_by_its_own_losses(small):
    """The adversarial gradient is `gan_weight` times as long as that of the reconstruction loss."""
    config = resolve_config(parse_train_flags([*small, "--gan", "--gan-weight", "0.7"], None))
    torch.manual_seed(0)
    names = train.inspect.signature(VQVAE).parameters
    model = VQVAE(**{name: getattr(config, name) for name in names}).eval()
    discriminator = PatchDiscriminator()
    images = torch.randn(2, 1, 64, 64)
    losses, _ = train.compute_losses(model, discriminator, images, "float32", config)
    reconstruction_loss, vq_loss, adversarial_loss, discriminator_loss, weight = losses

    reconstruction = model(images)[0]
    score = -discriminator(reconstruction).mean()
    loss = model.reconstruction_loss(reconstruction, images)
    (loss_gradient,) = torch.autograd.grad(loss, reconstruction, retain_graph=True)
    (score_gradient,) = torch.autograd.grad(score, reconstruction, retain_graph=True)
    assert adversarial_loss.item() == pytest.approx(score.item(), rel=1e-4)
    length = 0.7 * loss_gradient.norm().item()
    assert (weight * score_gradient.norm()).item() == pytest.approx(length, rel=1e-3)

    last_layer = list(model.decoder.parameters())[-1]
    trained = reconstruction_loss + vq_loss + adversarial_loss
    (actual,) = torch.autograd.grad(trained, last_layer, retain_graph=True)
    pull = loss_gradient + weight.detach() * score_gradient
    (expected,) = torch.autograd.grad(reconstruction, last_layer, pull)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)

    def trains(loss, module):
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return any(gradient is not None and gradient.any() for gradient in gradients)

    assert trains(adversarial_loss, model.decoder)
    assert not trains(adversarial_loss, discriminator)
    assert not trains(discriminator_loss, model.decoder)
    assert trains(discriminator_loss, discriminator)
