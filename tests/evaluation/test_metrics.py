"""The measures against scikit-image, hand computation and golden values."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.metrics import structural_similarity

from evaluation import metrics
from evaluation.metrics import SCORE_NAMES, body_mask, code_usage, slice_scores
from modules import VQVAE
from mri import phantom


@pytest.fixture
def pair():
    """Four textured slices in scanner-like units, and blurred reconstructions of them: (4, 1, 64, 48) twice."""
    rng = np.random.default_rng(0)
    images = ndimage.gaussian_filter(
        rng.gamma(2.0, 100.0, (4, 64, 48)), (0, 1.5, 1.5)
    ) * np.hanning(48)
    images += 5 * rng.standard_normal(images.shape)
    blurred = ndimage.gaussian_filter(images, (0, 1, 1)) + 3
    return torch.tensor(images[:, None]).float(), torch.tensor(blurred[:, None]).float()


def to_range(x, low, high):
    return np.clip((x - low) / (high - low), 0, 1)


def reference_scores(original, reconstruction):
    """One slice's scores by scikit-image and scipy, written straight from the protocol's table; float64."""
    gaussian = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 1.0,
    }
    low, high = original.min(), original.max()
    a, b = to_range(original, low, high), to_range(reconstruction, low, high)
    mean, std = original.mean(), original.std()
    low, high = np.percentile(original, [0.5, 99.5])
    c, d = to_range(original, low, high), to_range(reconstruction, low, high)
    log = np.log1p(50 * c)
    body, _ = ndimage.label(log > threshold_otsu(log, 256))
    body = body == np.bincount(body.ravel())[1:].argmax() + 1
    body = ndimage.binary_fill_holes(body)
    return {
        "ssim": structural_similarity(a, b, **gaussian),
        "ssim_zscore": structural_similarity(
            (original - mean) / std, (reconstruction - mean) / std, **gaussian
        ),
        "ssim_uniform": structural_similarity(
            a, b, win_size=7, use_sample_covariance=False, data_range=1.0
        ),
        "ssim_body": structural_similarity(c, d, full=True, **gaussian)[1][5:-5, 5:-5][
            body[5:-5, 5:-5]
        ].mean(),
        "psnr": -10 * np.log10(((a - b) ** 2).mean()),
    }


def test_scores_agree_with_scikit_image(pair):
    scores = slice_scores(*pair)
    assert set(scores) == set(SCORE_NAMES)
    for i, (original, reconstruction) in enumerate(zip(*pair, strict=True)):
        expected = reference_scores(
            original[0].double().numpy(), reconstruction[0].double().numpy()
        )
        for name, value in expected.items():
            # The body's border differs where a pixel lies on Otsu's threshold: bins are placed differently.
            assert scores[name][i].item() == pytest.approx(
                value, abs=2e-3 if name == "ssim_body" else 2e-4
            ), name


def test_golden_values(pair):
    """Guards against a library's change of convention; computed with torchmetrics 1.9 and checked as above."""
    golden = {
        "ssim": 0.94757,
        "ssim_zscore": 0.90354,
        "ssim_uniform": 0.95995,
        "ssim_body": 0.94405,
        "psnr": 33.47776,
    }
    for name, values in slice_scores(*pair).items():
        assert values.mean().item() == pytest.approx(golden[name], abs=2e-4), name


def test_ssim_by_hand():
    """A constant difference leaves the structure alone: SSIM is the luminance term, with C1 = (0.01 x 1)^2."""
    original = torch.full((1, 1, 32, 32), 0.4)
    original[..., 0, 0], original[..., 0, 1] = (
        0.0,
        1.0,
    )  # the range; far from the pixels that are read below
    reconstruction = original.clone()
    reconstruction[..., 8:, 8:] = 0.6
    c1 = 0.01**2
    expected = (2 * 0.4 * 0.6 + c1) / (0.4**2 + 0.6**2 + c1)
    constants = metrics.ssim_map(reconstruction, original)[
        ..., 8:, 8:
    ]  # windows of 8:18 onwards see only constants
    assert constants.mean().item() == pytest.approx(expected, abs=5e-4)
    assert slice_scores(original, original)["ssim"].item() == pytest.approx(1.0)


def test_a_bright_voxel_lifts_ssim_but_not_ssim_body(pair):
    """Why ssim_body exists: one voxel at three times the maximum squeezes everything else towards black."""
    original = pair[0][:1].clone()
    reconstruction = torch.nn.functional.avg_pool2d(pair[1][:1], 7, stride=1, padding=3)
    before = slice_scores(original, reconstruction)
    original[0, 0, 32, 24] = 3 * original.max()
    reconstruction[0, 0, 32, 24] = original[0, 0, 32, 24]
    after = slice_scores(original, reconstruction)
    assert after["ssim"] > before["ssim"] + 0.05
    assert abs(after["ssim_body"] - before["ssim_body"]) < 0.02


def test_scores_do_not_depend_on_the_batch(pair):
    """With torchmetrics' default data_range, each slice's score depends on its neighbours."""
    together = slice_scores(*pair)
    for i in range(4):
        alone = slice_scores(pair[0][i : i + 1], pair[1][i : i + 1])
        for name in SCORE_NAMES:
            torch.testing.assert_close(alone[name][0], together[name][i], rtol=0, atol=1e-5)
    pooled = metrics.torchmetrics_ssim(pair[1], pair[0], reduction="none")
    by_one = metrics.torchmetrics_ssim(pair[1][:1], pair[0][:1], reduction="none")
    assert abs(pooled[0] - by_one.squeeze()) > 1e-4  # the defect is real


def test_scores_do_not_depend_on_the_unit(pair):
    scaled = slice_scores(*(x * 7.5 - 100 for x in pair))
    for name, values in slice_scores(*pair).items():
        torch.testing.assert_close(scaled[name], values, rtol=0, atol=1e-3)


def test_unknown_score_is_refused(pair):
    with pytest.raises(ValueError, match="unknown scores"):
        slice_scores(*pair, names=("ssim", "ms_ssim"))


def test_body_mask_is_the_largest_component_filled():
    image = torch.zeros(2, 1, 64, 48)
    image[0, 0, 10:50, 5:40] = 0.8  # the body, with gas in it
    image[0, 0, 20:30, 15:25] = 0.0
    image[0, 0, 58:62, 42:47] = 0.9  # a tube outside
    image[1, 0, :, :20] = 0.7  # touches the border
    expected = torch.zeros_like(image)
    expected[0, 0, 10:50, 5:40] = 1
    expected[1, 0, :, :20] = 1
    assert torch.equal(body_mask(image), expected.bool())


def test_body_mask_finds_the_body_of_a_pelvis():
    """Not the strip of bright fat that Otsu's threshold on plain intensities finds."""
    image, labels = phantom.make_volume(5, 0, slices=3)
    slices = torch.from_numpy(image.astype(np.float32)).movedim(2, 0)[:, None]
    body = torch.from_numpy(labels > 0).movedim(2, 0)[:, None]
    mask = body_mask(
        metrics.rescale(
            slices, slices.amin((1, 2, 3)), torch.quantile(slices.flatten(1), 0.995, dim=1)
        )
    )
    overlap = (mask & body).sum((1, 2, 3)) / (mask | body).sum((1, 2, 3))
    assert overlap.min() > 0.9


def test_code_use():
    used, perplexity = code_usage(torch.tensor([10, 10, 10, 10, 0, 0]))
    assert used == 4 and perplexity == pytest.approx(4)
    assert code_usage(torch.tensor([7, 0]))[1] == pytest.approx(1)


class Split:
    """A split as evaluate needs it."""

    def __init__(self, count=7, size=32):
        self.images = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1))
        self.images[2] = 0
        self.constant = torch.arange(count) == 2

    def __len__(self):
        return len(self.images)

    def batches(self, groups, device):
        return (self.images[group].to(device) for group in groups)


def test_evaluate_covers_the_whole_split_whatever_the_batch_size():
    torch.manual_seed(0)
    model = VQVAE(
        hidden_channels=16, residual_channels=8, embedding_dim=8, num_embeddings=32
    ).train()
    data = Split()
    scores, counts, loss = metrics.evaluate(model, data, 3, torch.device("cpu"), SCORE_NAMES)
    assert model.training
    assert counts.sum() == 7 * 8 * 8  # every position of every batch, not the last batch's
    codes = model.encode(data.images)
    assert torch.equal(counts, torch.bincount(codes.flatten(), minlength=32))
    assert scores["ssim"].isnan().tolist() == data.constant.tolist()
    one_by_one = metrics.evaluate(model, data, 1, torch.device("cpu"), SCORE_NAMES)
    for name in SCORE_NAMES:
        torch.testing.assert_close(
            scores[name], one_by_one[0][name], rtol=0, atol=1e-4, equal_nan=True
        )
    assert loss == pytest.approx(one_by_one[2], rel=1e-5)


def test_power_ratio_is_of_its_octave_alone():
    """Waves of one frequency each: halving one of them quarters the power of its octave, and of no other."""
    x, y = torch.meshgrid(torch.arange(256.0), torch.arange(128.0), indexing="ij")
    fine, coarse = (
        torch.sin(2 * torch.pi * f * (x + y) / 2**0.5)[None, None] for f in (0.35, 0.18)
    )
    for octave, weights in ((0, (0.5, 1.0)), (1, (1.0, 0.5))):
        changed = weights[0] * fine + weights[1] * coarse
        ratios = [
            float(metrics.power_ratio(fine + coarse, changed, n)) for n in (octave, 1 - octave)
        ]
        assert ratios == pytest.approx([0.25, 1.0], rel=0.01)
    blurred = torch.nn.functional.avg_pool2d(fine, 3, 1, 1)
    assert metrics.power_ratio(fine, blurred) < 0.2 and metrics.power_ratio(
        fine, fine
    ) == pytest.approx(1)
