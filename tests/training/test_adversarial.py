"""Tests of the patch discriminator and of the adversarial losses."""

import pytest
import torch
import torch.nn.functional as F

from training.adversarial import PatchDiscriminator, adversarial_losses


def test_discriminator_sees_slices_and_their_fine_detail():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    images = torch.randn(2, 1, 128, 128)
    inputs = []
    discriminator.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits = discriminator(images)
    assert logits.shape == (2, 1, 16, 16) and logits.dtype == torch.float32
    mean = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(inputs[0], torch.cat([images, 4 * (images - mean)], 1))


@pytest.mark.parametrize(("logit", "expected"), [(0.0, 2.0), (1.0, 0.0), (5.0, 0.0), (-1.0, 4.0)])
def test_hinge_loss_is_2_without_and_0_with_a_clear_distinction(logit, expected):
    discriminator = PatchDiscriminator()
    discriminator.forward = lambda images: images
    images = torch.full((2, 1, 8, 8), logit)
    assert discriminator.hinge_loss(images, -images) == expected


def test_adversarial_gradient_has_the_chosen_norm():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    generator = torch.nn.Conv2d(1, 1, kernel_size=3, padding=1)
    images = torch.randn(2, 1, 32, 32)
    reconstruction = generator(images)
    generator_loss, discriminator_loss, weight = adversarial_losses(
        discriminator, images, reconstruction, F.mse_loss, gan_weight=0.7
    )
    adversarial = -discriminator(reconstruction).mean()
    torch.testing.assert_close(generator_loss, adversarial)
    expected = discriminator.hinge_loss(images, reconstruction)
    torch.testing.assert_close(discriminator_loss, expected)

    # At the reconstruction, its gradient is 0.7 times as long as that of the reconstruction loss.
    (gradient,) = torch.autograd.grad(generator_loss, reconstruction, retain_graph=True)
    mse = F.mse_loss(reconstruction, images)
    (mse_gradient,) = torch.autograd.grad(mse, reconstruction, retain_graph=True)
    (direction,) = torch.autograd.grad(adversarial, reconstruction, retain_graph=True)
    torch.testing.assert_close(gradient.norm(), 0.7 * mse_gradient.norm())
    torch.testing.assert_close(gradient, weight * direction)

    # Each side is trained by its own loss only.
    for loss, module, is_trained in (
        (generator_loss, generator, True),
        (generator_loss, discriminator, False),
        (discriminator_loss, generator, False),
        (discriminator_loss, discriminator, True),
    ):
        gradients = torch.autograd.grad(
            loss, list(module.parameters()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and g.any() for g in gradients) == is_trained
