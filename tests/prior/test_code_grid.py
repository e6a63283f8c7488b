"""Tests of prior/code_grid.py: convolutions, biases and outlines."""

import pytest
import torch
from models import make_prior

from prior.code_grid import CausalConv2d
from prior.model import CodePrior


@pytest.mark.parametrize(("kernel_size", "itself"), [(3, True), (7, False)])
def test_one_position_of_a_causal_convolution_equals_the_whole(kernel_size, itself):
    torch.manual_seed(0)
    conv = CausalConv2d(4, 5, kernel_size, itself)
    x = torch.randn(2, 4, 6, 8)
    margin = kernel_size // 2
    padded = torch.nn.functional.pad(x, (margin, margin, margin, 0))
    with torch.no_grad():
        expected = conv(x)
        for row, column in ((0, 0), (2, 7), (5, 3)):
            result = conv.at(padded, row, column)
            torch.testing.assert_close(result, expected[:, :, row, column])


def test_an_untrained_prior_predicts_the_frequencies(inputs):
    """Those of the outline, near a place and in a part of the volume; of codes, by outline code."""
    prior = make_prior(2)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(20, (400, 8, 16), generator=generator).square() // 20  # not uniform
    positions = torch.linspace(0, 1, 400)
    prior.initialize(torch.randn(20, 5), torch.randn(20), codes, positions)
    outline, _ = prior.to_grids(codes)
    test_codes, test_positions, view = inputs
    test_grids = prior.to_grids(test_codes)
    outline_logits, code_logits = prior(test_grids, test_positions, view)

    def check(logits: torch.Tensor, counted: torch.Tensor, all_codes: torch.Tensor) -> None:
        size = logits.numel()
        overall = torch.bincount(all_codes.flatten(), minlength=size) + 0.1
        counts = torch.bincount(counted.flatten(), minlength=size) + 20 * overall / overall.sum()
        torch.testing.assert_close(logits.softmax(0), counts / counts.sum(), rtol=1e-4, atol=1e-6)

    near = outline[:, 1:4, 2:5]  # the neighbourhood of (2, 3); the outline is 4 x 8
    first_part = near[positions < 0.2]
    last_part = near[positions >= 0.8]
    check(outline_logits[0, 2, 3], first_part, outline)  # position 0.1, as it is
    check(outline_logits[1, 4 - 1 - 2, 3], last_part, outline)  # 0.9, mirrored left-right
    check(outline_logits[2, 4 - 1 - 2, 8 - 1 - 3], near, outline)  # unknown, mirrored both ways
    same_outline = outline == test_grids[0][0, 2, 5]
    check(code_logits[0, 4, 11], codes[:, 0::2, 1::2][same_outline], codes)


def test_an_outline_holds_the_brightness_of_blocks_of_codes():
    """If the means of 2 x 2 codes take few values, each has its own level."""
    prior = CodePrior(4, 3, 8, 16, channels=16, num_heads=2, num_outlines=4, num_grids=3).eval()
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(4, (50, 4, 8), generator=generator)
    codes = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    brightness = torch.tensor([-1.0, 2.0, 0.5, 0.0])
    prior.initialize(torch.eye(4, 3), brightness, codes, torch.zeros(50), generator)
    coarse, outline, same = prior.to_grids(codes)
    assert torch.equal(same, codes)
    torch.testing.assert_close(prior.grids[1].brightness, torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    level_of_code = torch.tensor([0, 3, 2, 1])
    assert torch.equal(outline, level_of_code[blocks])

    means = torch.nn.functional.avg_pool2d(brightness[blocks], 2)
    nearest = (means[..., None] - prior.grids[0].brightness).abs().argmin(-1)
    assert torch.equal(coarse, nearest)
    assert len(coarse.unique()) == 4

    # An outline code's embedding starts with the mean of those that it stands for: here, of one.
    expected = prior.grids[2].embedding
    result = prior.grids[1].embedding[level_of_code][:, :3]
    correlation = torch.corrcoef(torch.stack([expected.flatten(), result.flatten()]))[0, 1]
    assert correlation == pytest.approx(1.0, abs=1e-5)
