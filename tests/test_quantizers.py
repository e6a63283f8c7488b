"""Tests of the quantisers and of k-means in modules.py.

Defects of well-known implementations are tested by a check that passes for our class and fails for
a subclass with the defect.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import fails, to_vectors, train_codebook

import modules
from modules import Quantized, ResidualVectorQuantizer, VectorQuantizer, nearest_codes

# ---------------------------------------------------------------- nearest codes


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_nearest_codes_agree_with_brute_force_in_float64(count, codes, dim, seed):
    torch.manual_seed(seed)
    codebook, vectors = torch.randn(codes, dim), torch.randn(count, dim)
    distances = torch.cdist(vectors.double(), codebook.double())
    chosen = distances.gather(1, nearest_codes(vectors, codebook)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=0, atol=1e-4)  # ties may differ


def test_distances_are_computed_in_blocks(monkeypatch):
    """Distances of a million vectors to 512 codes would take 2 GB."""
    sizes, addmm = [], torch.addmm

    def record(bias, block, *args, **options):
        sizes.append(len(block))
        return addmm(bias, block, *args, **options)

    monkeypatch.setattr(torch, "addmm", record)
    indices = nearest_codes(torch.randn(100_000, 2), torch.randn(8, 2))
    assert len(indices) == sum(sizes) == 100_000 and max(sizes) <= 8192


def check_layout(cls):
    """Each vector is an embedding, so its code and itself must come back."""
    quantizer = cls(16, 8)
    torch.nn.init.normal_(quantizer.embedding.weight)
    indices = torch.randint(16, (2, 4, 6))
    z = quantizer.embed(indices).detach()  # (2, 8, 4, 6)
    result = quantizer(z)
    assert torch.equal(result.indices.reshape(indices.shape), indices)
    assert torch.equal(result.counts, torch.bincount(indices.flatten(), minlength=16).float())
    torch.testing.assert_close(result.quantized, z)


def test_channels_are_moved_last_before_flattening():
    class Flattened(VectorQuantizer):
        def forward(self, z):
            result = self.quantize(z.reshape(-1, self.embedding_dim))
            return result._replace(quantized=result.quantized.view(z.shape))

    check_layout(VectorQuantizer)
    assert fails(check_layout, Flattened)


def test_each_codebook_quantises_the_residual():
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(3, 16, 4)
    z = torch.randn(2, 4, 16, 16)
    quantizer.init_codebook(to_vectors(z), generator=torch.Generator().manual_seed(0))
    result = quantizer(z)
    residual, losses = z, []
    for number, single in enumerate(quantizer.quantizers):
        indices = result.indices[..., number]
        nearest = nearest_codes(to_vectors(residual), single.embedding.weight)
        assert torch.equal(nearest, indices.flatten())
        counts = torch.bincount(indices.flatten(), minlength=16).float()
        assert torch.equal(result.counts[16 * number : 16 * (number + 1)], counts)
        residual = residual - single.embed(indices)
        losses.append(residual.square().mean())
    assert losses[0] > 2 * losses[1] > 4 * losses[2]
    torch.testing.assert_close(result.quantized, z - residual)
    torch.testing.assert_close(quantizer.embed(result.indices), z - residual)
    torch.testing.assert_close(result.commitment_loss, sum(losses))
    torch.testing.assert_close(result.codebook_loss, sum(losses))


@pytest.mark.parametrize(
    "quantizer", [VectorQuantizer(16, 8), ResidualVectorQuantizer(2, 16, 8)], ids=["one", "two"]
)
def test_gradients_pass_straight_through(quantizer):
    z = torch.randn(1, 8, 4, 4, requires_grad=True)
    weights = torch.randn(1, 8, 4, 4)
    (quantizer(z).quantized * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


# ---------------------------------------------------------------- the codebook over time


def test_moving_averages_are_equations_6_to_8():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 3, "ema", decay=0.9)
    torch.nn.init.normal_(quantizer.embedding.weight)
    quantizer.ema_sum.copy_(quantizer.embedding.weight)
    count, total = quantizer.ema_count.clone(), quantizer.ema_sum.clone()
    for _ in range(3):
        z = torch.randn(1, 3, 5, 5)
        indices = train_codebook(quantizer, z).indices.flatten()
        for code in range(4):
            vectors = to_vectors(z)[indices == code]
            count[code] = 0.9 * count[code] + 0.1 * len(vectors)
            total[code] = 0.9 * total[code] + 0.1 * vectors.sum(0)
        torch.testing.assert_close(quantizer.embedding.weight, total / count[:, None])


def check_unused_codes_stay(cls):
    torch.manual_seed(0)
    quantizer = cls(32, 8, "ema")
    original = quantizer.embedding.weight.clone()
    counts = train_codebook(quantizer, torch.randn(4, 8, 8, 8) + 10).counts
    assert (counts == 0).any()
    torch.testing.assert_close(quantizer.embedding.weight[counts == 0], original[counts == 0])


def test_unused_codes_do_not_explode_at_the_first_update():
    class CountsFromZero(VectorQuantizer):
        """Counts of 0, sums of the embeddings, and Laplace smoothing: rosinality, MONAI."""

        def __init__(self, *args):
            super().__init__(*args)
            self.ema_count.zero_()

        def update_codebook(self, vectors, indices):
            indices = indices.flatten()
            counts = torch.bincount(indices, minlength=self.num_embeddings).float()
            sums = modules.sum_by_code(vectors, indices, self.num_embeddings)
            self.ema_count.lerp_(counts, 1 - self.decay)
            self.ema_sum.lerp_(sums, 1 - self.decay)
            total = self.ema_count.sum()
            smoothed = (self.ema_count + 1e-5) / (total + self.num_embeddings * 1e-5) * total
            self.embedding.weight.copy_(self.ema_sum / smoothed[:, None])

    check_unused_codes_stay(VectorQuantizer)
    assert fails(check_unused_codes_stay, CountsFromZero)


@torch.no_grad()
def check_restart_holds(cls):
    """Dead codes must restart at vectors of the batch and stay there while they are unused."""
    torch.manual_seed(0)
    quantizer = cls(8, 4, "ema", 0.9, 0.05)
    quantizer.embedding.weight[1:] += 100  # far from all vectors
    quantizer.ema_sum.copy_(quantizer.embedding.weight)
    quantizer.ema_count[1:] *= 0.01
    quantizer.ema_sum[1:] *= 0.01
    z = torch.randn(2, 4, 16, 16)
    train_codebook(quantizer, z)
    restarted = quantizer.embedding.weight[1:].clone()
    assert torch.cdist(restarted, to_vectors(z)).amin(1).max() < 1e-3
    quantizer.restart_below = 0.0
    quantizer.update_codebook(to_vectors(z)[:1], torch.tensor([0]))
    torch.testing.assert_close(quantizer.embedding.weight[1:], restarted, rtol=0, atol=1e-3)


def test_restarted_codes_keep_their_place():
    class RestartsWeightsOnly(VectorQuantizer):
        """The moving averages stay as they were: espnet, pull request 6284."""

        def update_codebook(self, vectors, indices):
            fraction, self.restart_below = self.restart_below, 0.0
            super().update_codebook(vectors, indices)
            self.restart_below = fraction
            dead = self.ema_count < fraction * self.ema_count.mean()
            self.embedding.weight[dead] = vectors[: dead.sum()]

    check_restart_holds(VectorQuantizer)
    assert fails(check_restart_holds, RestartsWeightsOnly)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_leave_the_codebook_unchanged(value):
    quantizer = VectorQuantizer(8, 2, "ema", restart_below=0.9)
    train_codebook(quantizer, torch.randn(2, 2, 4, 4))
    original = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    z = torch.randn(2, 2, 4, 4)
    z[1, 0, 2, 3] = value
    train_codebook(quantizer, z)
    for name, tensor in quantizer.state_dict().items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-6, atol=0)


def test_huge_vectors_can_restart_codes():
    """Their squared errors are finite, but the sum is not, which `multinomial` does not accept."""
    quantizer = VectorQuantizer(8, 2, "ema", restart_below=0.9)
    train_codebook(quantizer, torch.full((2, 2, 4, 4), 1e19))
    assert quantizer.ema_count.isfinite().all()


def test_a_code_that_is_never_used_stays_finite():
    quantizer = VectorQuantizer(8, 4, "ema", decay=0.1)
    with torch.no_grad():
        quantizer.embedding.weight[1:] += 100
    quantizer.ema_sum.copy_(quantizer.embedding.weight)
    original = quantizer.embedding.weight[1:].clone()
    for _ in range(100):  # counts underflow to 0
        train_codebook(quantizer, torch.zeros(1, 4, 4, 4))
    torch.testing.assert_close(quantizer.embedding.weight[1:], original)


# ---------------------------------------------------------------- k-means


def test_kmeans_uses_the_codes_that_a_uniform_start_wastes():
    """From uniform(-1/K, 1/K), a few codes win all of these larger and off-centre vectors."""
    torch.manual_seed(0)
    z = torch.randn(1, 16, 64, 32) + torch.linspace(-4, 4, 16).view(1, 16, 1, 1)
    vectors = to_vectors(z)
    quantizer = VectorQuantizer(256, 16)
    assert len(quantizer(z).indices.unique()) < 64
    residuals = quantizer.init_codebook(vectors, generator=torch.Generator().manual_seed(0))
    result = quantizer(z)
    assert len(result.indices.unique()) == 256
    torch.testing.assert_close(residuals.square().mean(), result.commitment_loss)
    # Near a local optimum, each centre is close to the mean of its vectors.
    sums = modules.sum_by_code(vectors, result.indices.flatten(), 256)
    shift = (sums / result.counts[:, None] - quantizer.embedding.weight).norm(dim=1)
    assert shift.mean() < 0.1 * vectors.norm(dim=1).mean()


def test_kmeans_of_equal_vectors_is_finite():
    quantizer = VectorQuantizer(16, 4, "ema")
    quantizer.init_codebook(torch.ones(100, 4))
    assert torch.isfinite(quantizer.embedding.weight).all()
    assert torch.equal(quantizer.ema_sum, quantizer.embedding.weight)
    assert torch.equal(quantizer.ema_count, torch.ones(16))


def test_kmeans_needs_as_many_vectors_as_clusters():
    with pytest.raises(ValueError, match="10 vectors cannot initialise 32 codes"):
        modules.kmeans(torch.randn(10, 4), 32)


# ---------------------------------------------------------------- precision


def check_float32(cls):
    """Vectors with squares that overflow float16 must get finite losses and their own code."""
    torch.manual_seed(0)
    quantizer = cls(8, 16)
    torch.nn.init.normal_(quantizer.embedding.weight, std=3000)
    indices = torch.randint(8, (2, 4, 4))
    z = quantizer.embed(indices).detach()
    z = z + 300 * torch.randn_like(z)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(z.half())
    assert result.quantized.dtype == torch.float32
    assert torch.isfinite(result.commitment_loss) and torch.isfinite(result.codebook_loss)
    assert torch.equal(result.indices, indices)


def test_quantiser_computes_in_float32():
    class Half(VectorQuantizer):
        def forward(self, z):
            vectors, codebook = to_vectors(z), self.embedding.weight.to(z.dtype)
            distances = (vectors[:, None] - codebook).square().sum(-1)  # overflows
            indices = distances.argmin(1).view(z.shape[0], *z.shape[2:])
            quantized = self.embed(indices)
            loss = F.mse_loss(z, quantized.to(z.dtype))
            return Quantized(quantized, indices, loss, loss, torch.zeros(8), vectors)

    check_float32(VectorQuantizer)
    assert fails(check_float32, Half)
