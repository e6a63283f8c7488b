"""The model: its structure, its quantiser, and the defects of well-known implementations.

A defect's test is a check that ours passes and that fails on the defect, written out here as a subclass.
"""

import torch
import torch.nn.functional as F

from training import adversarial

SMALL = {"hidden_channels": 16, "residual_channels": 8, "embedding_dim": 8, "num_embeddings": 32}


def images(count=2, size=(32, 32), seed=0):
    """Smooth random images, z-scored like real ones."""
    noise = torch.randn(
        count, 1, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(seed)
    )
    smooth = F.interpolate(noise, size=size, mode="bicubic")
    return (smooth - smooth.mean()) / smooth.std()


def fails(check, *args):
    """True if the check's assertions fail."""
    try:
        check(*args)
    except AssertionError:
        return True
    return False


# ---------------------------------------------------------------- structure


def test_the_discriminator_judges_patches_and_sees_the_finest_detail():
    torch.manual_seed(0)
    discriminator = adversarial.PatchDiscriminator()
    images = torch.randn(2, 1, 128, 128)
    judged = discriminator(images)
    assert judged.shape == (2, 1, 16, 16) and judged.dtype == torch.float32
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    seen = []
    discriminator.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    discriminator(images)
    torch.testing.assert_close(seen[0], torch.cat([images, 4 * (images - blurred)], 1))


def test_the_hinge_loss_is_two_where_nothing_is_seen_and_zero_where_all_is():
    discriminator = adversarial.PatchDiscriminator()
    discriminator.forward = lambda images: images
    for value, expected in ((0.0, 2.0), (1.0, 0.0), (5.0, 0.0), (-1.0, 4.0)):
        images = torch.full((2, 1, 8, 8), value)
        assert discriminator.hinge_loss(images, -images) == expected
