"""benchmarks/ms_ssim.py: multi-scale SSIM with four scales."""

import pytest
import torch
from ms_ssim import MS_SSIM_WEIGHTS, ms_ssim
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure


@pytest.fixture
def images() -> torch.Tensor:
    """Return (3, 1, 256, 128) smooth images."""
    coarse = torch.rand(3, 1, 12, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (256, 128), mode="bicubic") * 30000


def test_the_weights_add_up_to_1():
    assert len(MS_SSIM_WEIGHTS) == 4
    assert sum(MS_SSIM_WEIGHTS) == pytest.approx(1)


def test_identical_images_score_1(images):
    assert torch.equal(ms_ssim(images, images), torch.ones(3))


def test_slices_are_scored_one_by_one_on_the_images_of_ssim(images):
    noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) * 1000
    scores = ms_ssim(images, noisy)
    for i in range(3):
        low, high = images[i].min(), images[i].max()
        expected = multiscale_structural_similarity_index_measure(
            ((noisy[i : i + 1] - low) / (high - low)).clamp(0, 1),
            (images[i : i + 1] - low) / (high - low),
            data_range=1.0,
            betas=MS_SSIM_WEIGHTS,
        )
        assert scores[i].item() == pytest.approx(expected.item(), abs=1e-5)
    assert scores.min() > 0 and scores.max() < 1
