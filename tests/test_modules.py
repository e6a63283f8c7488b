"""The model: its structure, its quantiser, and the defects of well-known implementations.

A defect's test is a check that ours passes and that fails on the defect, written out here as a subclass.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import modules
from evaluation import metrics
from modules import VQVAE, VectorQuantizer

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


def test_structure_is_the_documents():
    layer = [
        "          (conv1): Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
        "          (conv2): Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
        "          (relu): ReLU()",
        "        )",
    ]
    stack = [
        "    (residual_stack): ResidualStack(",
        "      (stack): Sequential(",
        "        (0): ResidualLayer(",
        *layer,
        "        (1): ResidualLayer(",
        *layer,
        "      )",
        "    )",
    ]
    expected = [
        "VQVAE(",
        "  (encoder): Encoder(",
        "    (conv1): Conv2d(1, 32, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))",
        *stack,
        "    (conv2): Conv2d(32, 64, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))",
        "  )",
        "  (vector_quantization): VectorQuantizer(",
        "    (embedding): Embedding(512, 64)",
        "  )",
        "  (decoder): Decoder(",
        "    (conv1): ConvTranspose2d(64, 32, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))",
        *stack,
        "    (conv2): ConvTranspose2d(32, 1, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))",
        "  )",
        ")",
    ]
    assert str(VQVAE()).splitlines() == expected


def test_a_slice_is_2048_codes_of_9_bits():
    model = VQVAE()
    codes = model.encode(torch.randn(1, 1, 256, 128))
    assert codes.shape == (1, 64, 32) and codes.numel() == 2048
    assert codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 512
    assert model.bits_per_pixel == 0.5625 == 2048 * 9 / (256 * 128)
    assert model.decode_codes(codes).shape == (1, 1, 256, 128)


def test_forward_is_decode_after_encode():
    model = VQVAE(**SMALL).eval()
    x = images()
    output = model(x)
    torch.testing.assert_close(model.decode_codes(model.encode(x)), output.reconstruction)
    torch.testing.assert_close(model.encode(x), output.indices)


@pytest.mark.parametrize(
    ("stride", "num_codebooks", "rate"),
    [(4, 2, 1.125), (8, 2, 0.28125), (8, 1, 0.140625), (16, 2, 0.0703125)],
)
@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_other_rates_follow_from_stride_and_codebooks(stride, num_codebooks, rate, codebook):
    model = VQVAE(
        stride=stride,
        num_codebooks=num_codebooks,
        codebook=codebook,
        **SMALL | {"num_embeddings": 512},
    )
    x = images(1, (256, 128))
    output = model(x)
    shape = (1, 256 // stride, 128 // stride)
    assert output.indices.shape == (shape if num_codebooks == 1 else (*shape, num_codebooks))
    assert output.indices.numel() * 9 / x.numel() == model.bits_per_pixel == rate
    assert (
        output.counts.shape == (num_codebooks * 512,)
        and output.counts.sum() == output.indices.numel()
    )
    model.eval()
    torch.testing.assert_close(model.decode_codes(model.encode(x)), model(x).reconstruction)


def test_each_codebook_quantises_what_is_left():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, num_codebooks=3)
    z = torch.randn(2, 4, 16, 16)
    quantizer.initialize(
        z.movedim(1, -1).reshape(-1, 4), generator=torch.Generator().manual_seed(0)
    )
    result = quantizer(z)
    left, level, losses = z, quantizer, []
    for codebook in range(3):
        embedded = level.embedding(result.indices[..., codebook]).movedim(-1, 1)
        assert torch.equal(
            level.nearest(left.movedim(1, -1).reshape(-1, 4)),
            result.indices[..., codebook].flatten(),
        )
        left = left - embedded
        losses.append(left.square().mean())
        level = level.rest if codebook < 2 else None
    assert losses[0] > 2 * losses[1] > 4 * losses[2]
    torch.testing.assert_close(result.quantized, z - left)
    torch.testing.assert_close(quantizer.embed(result.indices), z - left)
    torch.testing.assert_close(result.commitment_loss, sum(losses))


def test_refinement_is_one_convolution_at_full_size():
    model, plain = VQVAE(**SMALL, refine_channels=6), VQVAE(**SMALL)
    assert model(images()).reconstruction.shape == (2, 1, 32, 32)
    assert model.decoder.conv2.out_channels == 6 and str(model.decoder.conv3).startswith(
        "Conv2d(6, 1, kernel_size=(3"
    )
    assert not hasattr(plain.decoder, "conv3")


def test_code_layers_are_the_decoders_on_the_code_grid():
    decoder = VQVAE(**SMALL, num_code_layers=2).decoder
    assert len(decoder.code_stack.stack) == 2
    seen = []
    decoder.code_stack.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    assert decoder(torch.randn(1, 8, 6, 5)).shape == (1, 1, 24, 20) and seen == [(1, 8, 6, 5)]


def test_multiply_adds_are_the_designs():
    """0.747 GMAC of convolutions and 0.067 for the nearest-code search, counted by hooks."""
    model, macs = VQVAE(), []

    def count(module, inputs, output):
        positions = inputs[0] if isinstance(module, torch.nn.ConvTranspose2d) else output
        macs.append(module.weight.numel() * positions.shape[-2] * positions.shape[-1])

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(count)
    model(torch.zeros(1, 1, 256, 128))
    assert sum(macs) == pytest.approx(0.747e9, rel=1e-3)
    assert sum(macs) + 2048 * 512 * 64 == pytest.approx(0.814e9, rel=1e-3)


def test_residual_layer_is_the_formula():
    layer = modules.ResidualLayer(4, 6)
    x = torch.randn(1, 4, 8, 8)
    before = x.clone()
    torch.testing.assert_close(layer(x), x + layer.conv2(F.relu(layer.conv1(F.relu(x)))))
    assert torch.equal(x, before)  # an in-place ReLU would spoil the skip connection


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="expected 'gradient' or 'ema'"):
        VQVAE(codebook="kmeans")
    with pytest.raises(ValueError, match="restart_below needs codebook 'ema'"):
        VQVAE(restart_below=0.1)
    for stride in (2, 6):
        with pytest.raises(ValueError, match=f"stride is {stride}; expected 4, 8, 16"):
            VQVAE(stride=stride)
    with pytest.raises(ValueError, match="10 vectors can't start 32 codes"):
        VectorQuantizer(32, 4).initialize(torch.randn(10, 4))


# ---------------------------------------------------------------- nearest codes


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_nearest_is_exact(vectors, codes, dim, seed):
    """Against brute force in float64; where two codes are equally near within rounding, either will do."""
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(codes, dim)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(vectors, dim)
    distances = torch.cdist(z.double(), quantizer.embedding.weight.detach().double())
    chosen = distances.gather(1, quantizer.nearest(z)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=0, atol=1e-4)


def test_distances_are_never_all_in_memory_at_once(monkeypatch):
    """Of a million vectors to 512 codes they would take 2 GB."""
    sizes, real = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *args, **more: sizes.append(len(args[1])) or real(*args, **more)
    )
    assert len(VectorQuantizer(8, 2).nearest(torch.randn(100_000, 2))) == sum(sizes) == 100_000
    assert max(sizes) <= 8192


def test_vectors_that_are_not_finite_change_no_codebook():
    quantizer = VectorQuantizer(8, 2, "ema", restart_below=0.9)
    quantizer(torch.randn(2, 2, 4, 4))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for spoilt in (torch.nan, torch.inf):
        z = torch.randn(2, 2, 4, 4)
        z[1, 0, 2, 3] = spoilt
        quantizer(z)
        for name, value in quantizer.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)


def check_layout(make):
    """Each position's vector is an embedding: it must come back as that embedding, with its index."""
    quantizer = make(16, 8)
    torch.nn.init.normal_(quantizer.embedding.weight)
    indices = torch.randint(16, (2, 4, 6))
    z = quantizer.embedding(indices).movedim(-1, 1).detach()  # (B, D, h, w)
    result = quantizer(z)
    assert torch.equal(result.indices.reshape(indices.shape), indices)
    assert torch.equal(result.counts, torch.bincount(indices.flatten(), minlength=16).float())
    torch.testing.assert_close(result.quantized, z)


def test_channels_are_moved_last_before_flattening():
    class Flattened(VectorQuantizer):
        def forward(self, z):
            indices = self.nearest(
                z.reshape(-1, self.embedding_dim)
            )  # rows of D taken along the width
            quantized = self.embedding(indices).view(z.shape)
            return modules.Quantized(
                quantized, indices, torch.zeros(()), torch.zeros(()), torch.zeros(16)
            )

    check_layout(VectorQuantizer)
    assert fails(check_layout, Flattened)


# ---------------------------------------------------------------- losses


def check_beta(loss):
    """Beta scales the gradient that reaches the encoder, and not the one that reaches the codebook."""
    gradients = {}
    for beta in (0.25, 0.5):
        torch.manual_seed(0)
        model = VQVAE(**SMALL, commitment_cost=beta)
        x = images()
        z = model.encoder(x).detach().requires_grad_()
        quantized = model.vector_quantization(z)
        vq_loss = loss(model, x, modules.Output(x, *quantized[1:]))
        gradients[beta] = torch.autograd.grad(
            vq_loss, (z, model.vector_quantization.embedding.weight)
        )
    torch.testing.assert_close(gradients[0.5][0], 2 * gradients[0.25][0])
    torch.testing.assert_close(gradients[0.5][1], gradients[0.25][1])
    assert gradients[0.25][0].abs().max() > 0 and gradients[0.25][1].abs().max() > 0


def test_commitment_cost_is_on_the_encoders_term():
    check_beta(lambda model, x, output: model.loss(x, output)[1])
    assert fails(
        check_beta,
        lambda model, x, output: (
            output.commitment_loss + model.commitment_cost * output.codebook_loss
        ),
    )


def test_ssim_loss_is_the_measured_ssim():
    """Also under bfloat16 autocast, and whatever the slices' unit; a constant slice gives no NaN."""
    originals = images(3, (64, 48))
    noisy = originals + 0.1 * torch.randn(
        originals.shape, generator=torch.Generator().manual_seed(1)
    )
    noisy = noisy.clamp(
        originals.amin((1, 2, 3), keepdim=True), originals.amax((1, 2, 3), keepdim=True)
    )
    expected = 1 - metrics.slice_scores(originals, noisy, ("ssim",))["ssim"].mean()
    assert 0.05 < expected < 0.95
    torch.testing.assert_close(modules.ssim_loss(noisy, originals), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        modules.ssim_loss(noisy * 90 + 7, originals * 90 + 7), expected, atol=1e-4, rtol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(modules.ssim_loss(noisy, originals), expected, atol=1e-4, rtol=0)
    assert modules.ssim_loss(originals, originals).abs() < 1e-5
    with pytest.raises(ValueError, match="a side of 10 have no room"):
        modules.ssim_loss(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))
    flat = torch.zeros(1, 1, 16, 16)
    reconstruction = torch.randn(1, 1, 16, 16, requires_grad=True)
    modules.ssim_loss(reconstruction, flat).backward()
    assert reconstruction.grad.isfinite().all()


def test_ssim_weight_adds_to_the_reconstruction_loss():
    torch.manual_seed(0)
    model = VQVAE(**SMALL, ssim_weight=0.5)
    x = images()
    output = model(x)
    expected = F.mse_loss(output.reconstruction, x) + 0.5 * modules.ssim_loss(
        output.reconstruction, x
    )
    torch.testing.assert_close(model.loss(x, output)[0], expected)


def test_loss_is_equation_3():
    model = VQVAE(**SMALL)
    x = images()
    z = model.encoder(x)
    e = model.vector_quantization.embedding(model.encode(x)).movedim(-1, 1)
    output = model(x)
    reconstruction, vq = model.loss(x, output)
    torch.testing.assert_close(reconstruction, (x - output.reconstruction).square().mean())
    torch.testing.assert_close(vq, 1.25 * (z - e).square().mean())


def test_gradients_pass_straight_through():
    quantizer = VectorQuantizer(16, 8)
    z = torch.randn(1, 8, 4, 4, requires_grad=True)
    weights = torch.randn(1, 8, 4, 4)
    (quantizer(z).quantized * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_one_batch_can_be_overfitted():
    """The whole chain learns: in a few hundred steps the error of one batch falls under a twentieth."""
    torch.manual_seed(0)
    model = VQVAE(
        hidden_channels=32,
        residual_channels=16,
        embedding_dim=16,
        num_embeddings=64,
        codebook="ema",
    )
    x = images(4)
    with torch.no_grad():
        model.vector_quantization.initialize(model.encoder(x).movedim(1, -1).reshape(-1, 16))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(400):
        output = model(x)
        loss = model.loss(x, output)
        optimizer.zero_grad()
        sum(loss).backward()
        optimizer.step()
        losses.append(loss[0].item())
    assert losses[-1] < losses[0] / 20


# ---------------------------------------------------------------- the codebook over time


def check_unused_codes_stay(make):
    """At the first update, a code that no vector is near must not move by more than rounding."""
    torch.manual_seed(0)
    quantizer = make(32, 8, "ema")
    before = quantizer.embedding.weight.clone()
    indices = quantizer(torch.randn(4, 8, 8, 8) + 10).indices
    unused = torch.ones(32, dtype=torch.bool).index_fill(0, indices.flatten().unique(), False)
    assert unused.any()
    torch.testing.assert_close(quantizer.embedding.weight[unused], before[unused])


def test_unused_codes_do_not_explode_at_the_first_update():
    class CountsFromZero(VectorQuantizer):
        """Counts at 0, sums at the embedding, Laplace smoothing, as in rosinality's and MONAI's code."""

        def __init__(self, *args):
            super().__init__(*args)
            self.ema_count.zero_()

        def _update(self, vectors, indices, counts, quantized):
            self.ema_count.lerp_(counts, 1 - self.decay)
            self.ema_sum.lerp_(self._sum(vectors, indices), 1 - self.decay)
            total = self.ema_count.sum()
            smoothed = (self.ema_count + 1e-5) / (total + self.num_embeddings * 1e-5) * total
            self.embedding.weight.copy_(self.ema_sum / smoothed[:, None])

    check_unused_codes_stay(VectorQuantizer)
    assert fails(check_unused_codes_stay, CountsFromZero)


def test_moving_averages_are_equations_6_to_8():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 3, "ema", decay=0.9)
    torch.nn.init.normal_(quantizer.embedding.weight)
    quantizer.ema_sum.copy_(quantizer.embedding.weight)
    count, total = quantizer.ema_count.clone(), quantizer.ema_sum.clone()
    for seed in range(3):
        z = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        indices = quantizer(z).indices.flatten()
        for code in range(4):
            vectors = z[0].reshape(3, -1).T[indices == code]
            count[code] = 0.9 * count[code] + 0.1 * len(vectors)
            total[code] = 0.9 * total[code] + 0.1 * vectors.sum(0)
        torch.testing.assert_close(quantizer.embedding.weight, total / count[:, None])


@torch.no_grad()
def check_restart_holds(make):
    """CodeDataset out of use restart on vectors of the batch; an update that doesn't use them leaves them there."""
    torch.manual_seed(0)
    quantizer = make(8, 4, "ema", 0.9, 0.05)
    quantizer.embedding.weight[1:] += 100  # nothing will be near
    quantizer.ema_sum.copy_(quantizer.embedding.weight)
    quantizer.ema_count[1:] *= 0.01
    quantizer.ema_sum[1:] *= 0.01
    z = torch.randn(2, 4, 16, 16)
    quantizer(z)
    vectors = z.movedim(1, -1).reshape(-1, 4)
    placed = quantizer.embedding.weight.clone()
    assert torch.cdist(placed[1:], vectors).amin(1).max() < 1e-3
    quantizer.restart_below = 0.0
    first = torch.zeros(1, dtype=torch.long)
    quantizer._update(vectors[:1], first, quantizer._count(first), vectors[:1])
    torch.testing.assert_close(quantizer.embedding.weight[1:], placed[1:], rtol=0, atol=1e-3)


def test_restarted_codes_keep_their_place():
    class RestartsWeightOnly(VectorQuantizer):
        """The moving averages stay where they were, as in espnet's pull request 6284."""

        def _update(self, vectors, indices, counts, quantized):
            restart, self.restart_below = self.restart_below, 0.0
            super()._update(vectors, indices, counts, quantized)
            self.restart_below = restart
            dead = self.ema_count < restart * self.ema_count.mean()
            self.embedding.weight[dead] = vectors[: dead.sum()]

    check_restart_holds(VectorQuantizer)
    assert fails(check_restart_holds, RestartsWeightOnly)


def test_a_code_unused_for_ever_stays_finite():
    quantizer = VectorQuantizer(8, 4, "ema", decay=0.1)
    with torch.no_grad():
        quantizer.embedding.weight[1:] += 100
    quantizer.ema_sum.copy_(quantizer.embedding.weight)
    far = quantizer.embedding.weight[1:].clone()
    for _ in range(100):  # counts underflow to 0
        quantizer(torch.zeros(1, 4, 4, 4))
    torch.testing.assert_close(quantizer.embedding.weight[1:], far)


def test_evaluation_never_moves_the_codebook():
    model = VQVAE(**SMALL, codebook="ema", restart_below=0.1).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(images())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_data_start_uses_the_codes_that_a_uniform_start_wastes():
    """Encoder outputs a hundred times larger than uniform(-1/K, 1/K) and off its centre: a few codes win all."""
    torch.manual_seed(0)
    z = torch.randn(1, 16, 64, 32) + torch.linspace(-4, 4, 16).view(1, 16, 1, 1)
    vectors = z.movedim(1, -1).reshape(-1, 16)
    quantizer = VectorQuantizer(256, 16)
    uniform = len(quantizer(z).indices.unique())
    quantizer.initialize(vectors, generator=torch.Generator().manual_seed(0))
    from_data = quantizer(z)
    assert len(from_data.indices.unique()) == 256 and uniform < 64
    # Lloyd's iterations have converged near a local optimum: each code is about the mean of its vectors.
    means = quantizer._sum(vectors, from_data.indices.flatten()) / from_data.counts[:, None]
    moved = (means - quantizer.embedding.weight).norm(dim=1)
    assert moved.mean() < 0.1 * vectors.norm(dim=1).mean()


def test_data_start_survives_slices_that_are_all_alike():
    quantizer = VectorQuantizer(16, 4, "ema")
    quantizer.initialize(torch.ones(100, 4))
    assert torch.isfinite(quantizer.embedding.weight).all()
    assert torch.equal(quantizer.ema_sum, quantizer.embedding.weight)


# ---------------------------------------------------------------- precision


def check_float32(make):
    """Vectors whose squares overflow float16 get finite losses and their own code, under autocast too."""
    torch.manual_seed(0)
    quantizer = make(8, 16)
    torch.nn.init.normal_(quantizer.embedding.weight, std=3000)
    indices = torch.randint(8, (2, 4, 4))
    z = quantizer.embedding(indices).movedim(-1, 1).detach()
    z = z + 300 * torch.randn_like(z)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(z.half())
    assert result.quantized.dtype == torch.float32
    assert torch.isfinite(result.commitment_loss) and torch.isfinite(result.codebook_loss)
    assert torch.equal(result.indices, indices)


def test_quantiser_is_float32_whatever_it_is_given():
    class Half(VectorQuantizer):
        def forward(self, z):
            flat = z.movedim(1, -1).reshape(-1, self.embedding_dim)
            distance = (
                (flat[:, None] - self.embedding.weight.to(z.dtype)).square().sum(-1)
            )  # overflows
            indices = distance.argmin(1)
            loss = F.mse_loss(flat, self.embedding.weight.to(z.dtype)[indices])
            quantized = self.embedding(indices).view(*z.shape[:1], *z.shape[2:], -1).movedim(-1, 1)
            return modules.Quantized(
                quantized, indices.view(z.shape[0], *z.shape[2:]), loss, loss, self._count(indices)
            )

    check_float32(VectorQuantizer)
    assert fails(check_float32, Half)


def test_training_step_under_bfloat16_autocast():
    torch.manual_seed(0)
    model = VQVAE(**SMALL, codebook="ema", restart_below=0.05)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(x, model(x))
    sum(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert model.vector_quantization.embedding.weight.dtype == torch.float32


# ---------------------------------------------------------------- checkpoints
