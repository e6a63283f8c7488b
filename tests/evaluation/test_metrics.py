"""Scores against scikit-image, hand computation and golden values."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation import metrics
from evaluation.metrics import SCORE_NAMES, slice_scores
from evaluation.organs import ORGANS, organ_scores
from modules import VQVAE

CPU = torch.device("cpu")


@pytest.fixture
def pair():
    """Textured slices in the units of a scanner, and blurred copies: (4, 1, 64, 48) twice."""
    generator = np.random.default_rng(0)
    speckle = generator.gamma(2.0, 100.0, (4, 64, 48))
    images = ndimage.gaussian_filter(speckle, (0, 1.5, 1.5)) * np.hanning(48)
    images += 5 * generator.standard_normal(images.shape)
    blurred = ndimage.gaussian_filter(images, (0, 1, 1)) + 3
    return torch.tensor(images[:, None]).float(), torch.tensor(blurred[:, None]).float()


@pytest.fixture
def tf32(monkeypatch):
    """Round the inputs of convolutions as GPUs do by default, to 10 bits of mantissa."""
    real = torch.nn.functional.conv2d

    def round_mantissa(x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    def conv2d(x, weight, *arguments, **options):
        if torch.backends.cudnn.allow_tf32:
            x, weight = round_mantissa(x), round_mantissa(weight)
        return real(x, weight, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)


# ---------------------------------------------------------------- the protocol


def scale(image, low, high):
    return np.clip((image - low) / (high - low), 0, 1)


def reference_scores(original, reconstruction) -> dict[str, float]:
    """Score one slice (H, W), float64, by the table in evaluation/metrics.py, with scikit-image."""
    uniform = {"use_sample_covariance": False, "data_range": 1.0}
    gaussian = uniform | {"gaussian_weights": True, "sigma": 1.5}
    low, high = original.min(), original.max()
    original_01 = scale(original, low, high)
    reconstruction_01 = scale(reconstruction, low, high)
    mean, std = original.mean(), original.std()
    original_z = (original - mean) / std
    reconstruction_z = (reconstruction - mean) / std
    low, high = np.percentile(original, [0.5, 99.5])
    original_window = scale(original, low, high)
    reconstruction_window = scale(reconstruction, low, high)
    _, similarity = structural_similarity(
        original_window, reconstruction_window, full=True, **gaussian
    )
    logarithm = np.log1p(50 * original_window)
    components, _ = ndimage.label(logarithm > threshold_otsu(logarithm, 256))
    largest = np.bincount(components.ravel())[1:].argmax() + 1
    body = ndimage.binary_fill_holes(components == largest)
    return {
        "ssim": structural_similarity(original_01, reconstruction_01, **gaussian),
        "ssim_zscore": structural_similarity(original_z, reconstruction_z, **gaussian),
        "ssim_uniform": structural_similarity(
            original_01, reconstruction_01, win_size=7, **uniform
        ),
        "ssim_body": similarity[5:-5, 5:-5][body[5:-5, 5:-5]].mean(),
        "psnr": -10 * np.log10(((original_01 - reconstruction_01) ** 2).mean()),
    }


def test_scores_agree_with_scikit_image(pair):
    scores = slice_scores(*pair)
    assert set(scores) == set(SCORE_NAMES)
    for i in range(4):
        original, reconstruction = (images[i, 0].double().numpy() for images in pair)
        for name, expected in reference_scores(original, reconstruction).items():
            # Otsu's bins are placed differently, so the body's border differs by some pixels.
            tolerance = 2e-3 if name == "ssim_body" else 2e-4
            assert scores[name][i].item() == pytest.approx(expected, abs=tolerance), name


def test_golden_values(pair):
    """Guard against a library that changes its convention; computed with torchmetrics 1.9."""
    golden = {
        "ssim": 0.94757,
        "ssim_zscore": 0.90354,
        "ssim_uniform": 0.95995,
        "ssim_body": 0.94405,
        "psnr": 33.47776,
    }
    for name, values in slice_scores(*pair).items():
        assert values.mean().item() == pytest.approx(golden[name], abs=2e-4), name


def test_ssim_of_constant_windows_is_the_luminance_term():
    """A constant difference leaves the structure unchanged; C1 = (0.01 x 1)^2."""
    original = torch.full((1, 1, 32, 32), 0.4)
    original[..., 0, 0] = 0.0  # the range is 0 to 1; far from the windows below
    original[..., 0, 1] = 1.0
    reconstruction = original.clone()
    reconstruction[..., 8:, 8:] = 0.6
    c1 = 0.01**2
    expected = (2 * 0.4 * 0.6 + c1) / (0.4**2 + 0.6**2 + c1)
    similarity = metrics.ssim_map(original, reconstruction)[..., 8:, 8:]
    assert similarity.mean().item() == pytest.approx(expected, abs=5e-4)
    assert slice_scores(original, original)["ssim"].item() == pytest.approx(1.0)


def test_a_bright_voxel_raises_ssim_but_not_ssim_body(pair):
    """The reason for ssim_body: a voxel at three times the maximum darkens all others."""
    original = pair[0][:1].clone()
    reconstruction = torch.nn.functional.avg_pool2d(pair[1][:1], 7, stride=1, padding=3)
    before = slice_scores(original, reconstruction)
    original[0, 0, 32, 24] = 3 * original.max()
    reconstruction[0, 0, 32, 24] = original[0, 0, 32, 24]
    after = slice_scores(original, reconstruction)
    assert after["ssim"] > before["ssim"] + 0.05
    assert abs(after["ssim_body"] - before["ssim_body"]) < 0.02


def test_scores_do_not_depend_on_the_batch(pair):
    """With the default data_range of torchmetrics, a slice's score depends on the others."""
    together = slice_scores(*pair)
    for i in range(4):
        alone = slice_scores(pair[0][i : i + 1], pair[1][i : i + 1])
        for name in SCORE_NAMES:
            torch.testing.assert_close(alone[name][0], together[name][i], rtol=0, atol=1e-5)
    pooled = structural_similarity_index_measure(pair[1], pair[0], reduction="none")
    alone = structural_similarity_index_measure(pair[1][:1], pair[0][:1], reduction="none")
    assert abs(pooled[0] - alone.squeeze()) > 1e-4  # the defect is real


def test_scores_do_not_depend_on_the_unit(pair):
    original, reconstruction = pair
    scaled = slice_scores(original * 7.5 - 100, reconstruction * 7.5 - 100)
    for name, values in slice_scores(original, reconstruction).items():
        torch.testing.assert_close(scaled[name], values, rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e-6, 1e6, 1e20])
def test_scores_do_not_depend_on_the_order_of_magnitude(pair, factor):
    """Absolute thresholds would turn every score of small intensities into a perfect one."""
    scaled = [(images.double() * factor).float() for images in pair]
    for name, values in slice_scores(*pair).items():
        torch.testing.assert_close(slice_scores(*scaled)[name], values, rtol=1e-5, atol=1e-5)
    labels = torch.zeros(4, 64, 48, dtype=torch.long)
    labels[:, 16:48, 8:40] = ORGANS.index("bone")
    expected = organ_scores(*pair, labels)["bone"]
    for name, values in organ_scores(*scaled, labels)["bone"].items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)


def test_unknown_score_is_an_error(pair):
    with pytest.raises(ValueError, match="unknown scores"):
        slice_scores(*pair, names=("ssim", "ms_ssim"))


def test_power_ratio_measures_its_octave_only():
    """Halving a wave quarters the power of its octave, and leaves the other octave unchanged."""
    x, y = torch.meshgrid(torch.arange(256.0), torch.arange(128.0), indexing="ij")
    diagonal = 2 * torch.pi * (x + y) / 2**0.5
    fine = torch.sin(0.35 * diagonal)[None, None]
    coarse = torch.sin(0.18 * diagonal)[None, None]
    for octave, weights in ((0, (0.5, 1.0)), (1, (1.0, 0.5))):
        changed = weights[0] * fine + weights[1] * coarse
        ratio = metrics.power_ratio(fine + coarse, changed, octave)
        other_ratio = metrics.power_ratio(fine + coarse, changed, 1 - octave)
        assert float(ratio) == pytest.approx(0.25, rel=0.01)
        assert float(other_ratio) == pytest.approx(1.0, rel=0.01)
    blurred = torch.nn.functional.avg_pool2d(fine, 3, 1, 1)
    assert metrics.power_ratio(fine, blurred) < 0.2
    assert metrics.power_ratio(fine, fine) == pytest.approx(1)


# ---------------------------------------------------------------- a split


def test_code_usage_counts_codes_and_their_perplexity():
    used, perplexity = metrics.code_usage(torch.tensor([10, 10, 10, 10, 0, 0]))
    assert used == 4
    assert perplexity == pytest.approx(4)
    assert metrics.code_usage(torch.tensor([7, 0]))[1] == pytest.approx(1)


def test_interval_is_that_of_the_mean_over_cases():
    values = [0.8 + 0.01 * i for i in range(12)]
    low, high = metrics.bootstrap_interval(values)
    standard_error = np.std(values) / 12**0.5
    assert (low + high) / 2 == pytest.approx(0.855, abs=0.001)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)


def test_scores_are_computed_without_tf32(tf32):
    """The rounding of TF32 changes the small variances of smooth tissue, and therefore scores."""
    generator = np.random.default_rng(0)
    image = ndimage.gaussian_filter(generator.gamma(2.0, 100.0, (64, 48)), 8)
    noisy = image + 0.3 * generator.standard_normal(image.shape)
    pair = [torch.tensor(slices)[None, None].float() for slices in (image, noisy)]
    expected = reference_scores(image, noisy)["ssim"]
    unprotected = metrics.ssim_map(*metrics.scale_to_range(*pair)).mean()
    assert abs(unprotected.item() - expected) > 1e-3
    assert slice_scores(*pair)["ssim"].item() == pytest.approx(expected, abs=2e-4)


def test_an_evaluation_computes_the_model_without_tf32(tf32):
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=16, residual_channels=8, embedding_dim=8, num_embeddings=32)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = metrics.evaluate(model, Split(), 3, CPU)
    result = metrics.evaluate(model, Split(), 3, CPU)
    assert torch.equal(result.counts, expected.counts)
    assert result.loss == expected.loss


class Split:
    """A split as `evaluate` needs it: seven slices, of which the third is constant."""

    def __init__(self):
        self.images = torch.randn(7, 1, 32, 32, generator=torch.Generator().manual_seed(1))
        self.images[2] = 0
        self.constant = torch.arange(7) == 2

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[indices]

    def batches(self, groups, device):
        return (self.batch(group).to(device) for group in groups)


def test_evaluation_covers_the_split_and_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=16, residual_channels=8, embedding_dim=8, num_embeddings=32)
    model.train()
    data = Split()
    scores, counts, loss = metrics.evaluate(model, data, 3, CPU, SCORE_NAMES)
    assert model.training
    codes = model.encode(data.images)
    assert counts.sum() == 7 * 8 * 8  # of all batches, not of the last one
    assert torch.equal(counts, torch.bincount(codes.flatten(), minlength=32))
    assert scores["ssim"].isnan().tolist() == data.constant.tolist()
    one_by_one = metrics.evaluate(model, data, 1, CPU, SCORE_NAMES)
    torch.testing.assert_close(scores, one_by_one.scores, rtol=0, atol=1e-4, equal_nan=True)
    assert loss == pytest.approx(one_by_one.loss, rel=1e-5)
