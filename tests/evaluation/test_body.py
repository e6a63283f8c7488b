"""The body mask of `ssim_body`."""

import numpy as np
import torch

from evaluation.body import body_mask, rescale
from mri import phantom


def test_mask_is_the_largest_component_with_its_holes_filled():
    images = torch.zeros(2, 1, 64, 48)
    images[0, 0, 10:50, 5:40] = 0.8  # the body, with gas in it
    images[0, 0, 20:30, 15:25] = 0.0
    images[0, 0, 58:62, 42:47] = 0.9  # a tube outside
    images[1, 0, :, :20] = 0.7  # a body at the slice's border
    expected = torch.zeros_like(images)
    expected[0, 0, 10:50, 5:40] = 1
    expected[1, 0, :, :20] = 1
    assert torch.equal(body_mask(images), expected.bool())


def test_mask_is_the_body_of_a_pelvis():
    """And not the strip of bright fat that Otsu's threshold finds on plain intensities."""
    volume, labels = phantom.make_volume(5, 0, slices=3)
    slices = torch.from_numpy(volume.astype(np.float32)).movedim(2, 0)[:, None]
    body = torch.from_numpy(labels > 0).movedim(2, 0)[:, None]
    low = slices.amin((1, 2, 3))
    high = torch.quantile(slices.flatten(1), 0.995, dim=1)
    mask = body_mask(rescale(slices, low, high))
    overlap = (mask & body).sum((1, 2, 3)) / (mask | body).sum((1, 2, 3))
    assert overlap.min() > 0.9
