"""Tests of the model's structure and losses; those of its quantisers are in test_quantizers.py.

The defect of well-known implementations is tested by a check that passes for our loss and fails
for the defect.
"""

import pytest
import torch
import torch.nn.functional as F
from models import fails, to_vectors

import modules
from evaluation import metrics
from modules import VQVAE

SMALL = {"hidden_channels": 16, "residual_channels": 8, "embedding_dim": 8, "num_embeddings": 32}


def make_images(count=2, size=(32, 32)):
    """Return smooth z-scored noise, (count, 1, *size)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, size[0] // 8, size[1] // 8, generator=generator)
    smooth = F.interpolate(noise, size=size, mode="bicubic")
    return (smooth - smooth.mean()) / smooth.std()


# ---------------------------------------------------------------- structure


def test_default_structure_is_that_of_the_document():
    layer = """\
          (conv1): Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
          (conv2): Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
          (relu): ReLU()
        )
"""
    stack = f"""\
    (residual_stack): ResidualStack(
      (stack): Sequential(
        (0): ResidualLayer(
{layer}        (1): ResidualLayer(
{layer}      )
    )
"""
    expected = f"""\
VQVAE(
  (encoder): Encoder(
    (conv1): Conv2d(1, 32, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))
{stack}    (conv2): Conv2d(32, 64, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))
  )
  (vector_quantization): VectorQuantizer(
    (embedding): Embedding(512, 64)
  )
  (decoder): Decoder(
    (conv1): ConvTranspose2d(64, 32, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))
{stack}    (conv2): ConvTranspose2d(32, 1, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))
  )
)"""
    assert str(VQVAE()) == expected


def test_a_slice_becomes_2048_codes_of_9_bits():
    model = VQVAE()
    codes = model.encode(torch.randn(1, 1, 256, 128))
    assert codes.shape == (1, 64, 32) and codes.numel() == 2048
    assert codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 512
    assert model.bits_per_pixel == 0.5625 == 2048 * 9 / (256 * 128)
    assert model.decode_codes(codes).shape == (1, 1, 256, 128)


@pytest.mark.parametrize(
    ("stride", "num_codebooks", "rate"),
    [(4, 1, 0.5625), (4, 2, 1.125), (8, 3, 0.421875), (8, 1, 0.140625), (16, 2, 0.0703125)],
)
@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_stride_and_codebooks_set_the_rate(stride, num_codebooks, rate, codebook):
    arguments = SMALL | {"num_embeddings": 512, "stride": stride, "codebook": codebook}
    model = VQVAE(num_codebooks=num_codebooks, **arguments)
    images = make_images(1, (256, 128))
    _, quantized = model(images)
    grid = (1, 256 // stride, 128 // stride)
    assert quantized.indices.shape == (grid if num_codebooks == 1 else (*grid, num_codebooks))
    assert quantized.indices.numel() * 9 / images.numel() == model.bits_per_pixel == rate
    assert quantized.counts.shape == (num_codebooks * 512,)
    assert quantized.counts.sum() == quantized.indices.numel()
    model.eval()
    reconstruction, quantized = model(images)
    torch.testing.assert_close(model.encode(images), quantized.indices)
    torch.testing.assert_close(model.decode_codes(quantized.indices), reconstruction)


def test_refinement_adds_a_convolution_at_full_resolution():
    decoder = VQVAE(**SMALL, refine_channels=6).decoder
    assert decoder(torch.randn(2, 8, 8, 8)).shape == (2, 1, 32, 32)
    assert decoder.conv2.out_channels == 6
    assert str(decoder.conv3).startswith("Conv2d(6, 1, kernel_size=(3, 3)")
    assert VQVAE(**SMALL).decoder.conv3 is None


def test_code_layers_are_applied_on_the_code_grid():
    decoder = VQVAE(**SMALL, num_code_layers=2).decoder
    assert len(decoder.code_stack.stack) == 2
    shapes = []
    decoder.code_stack.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    assert decoder(torch.randn(1, 8, 6, 5)).shape == (1, 1, 24, 20)
    assert shapes == [(1, 8, 6, 5)]


def test_a_forward_pass_takes_0_81_gmac():
    model, macs = VQVAE(), []

    def count(module, inputs, output):
        positions = inputs[0] if isinstance(module, torch.nn.ConvTranspose2d) else output
        macs.append(module.weight.numel() * positions.shape[-2] * positions.shape[-1])

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(count)
    model(torch.zeros(1, 1, 256, 128))
    assert sum(macs) == pytest.approx(0.747e9, rel=1e-3)
    assert sum(macs) + 2048 * 512 * 64 == pytest.approx(0.814e9, rel=1e-3)  # nearest codes


def test_residual_layer_computes_its_formula():
    layer = modules.ResidualLayer(4, 6)
    x = torch.randn(1, 4, 8, 8)
    original = x.clone()
    torch.testing.assert_close(layer(x), x + layer.conv2(F.relu(layer.conv1(F.relu(x)))))
    assert torch.equal(x, original)  # an in-place ReLU would change it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook": "kmeans"}, "expected 'gradient' or 'ema'"),
        ({"restart_below": 0.1}, "restart_below needs codebook 'ema'"),
        ({"stride": 2}, "stride is 2; expected 4, 8, 16"),
        ({"stride": 6}, "stride is 6; expected 4, 8, 16"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQVAE(**arguments)


# ---------------------------------------------------------------- losses


def check_beta(loss):
    """Beta must scale the gradient of the encoder only."""
    gradients = {}
    for beta in (0.25, 0.5):
        torch.manual_seed(0)
        model = VQVAE(**SMALL, commitment_cost=beta)
        images = make_images()
        z = model.encoder(images).detach().requires_grad_()
        value = loss(model, images, model.vector_quantization(z))
        inputs = (z, model.vector_quantization.embedding.weight)
        gradients[beta] = torch.autograd.grad(value, inputs)
        assert all(gradient.abs().max() > 0 for gradient in gradients[beta])
    torch.testing.assert_close(gradients[0.5][0], 2 * gradients[0.25][0])
    torch.testing.assert_close(gradients[0.5][1], gradients[0.25][1])


def test_commitment_cost_multiplies_the_term_of_the_encoder():
    def beta_on_the_wrong_term(model, images, quantized):
        return quantized.commitment_loss + model.commitment_cost * quantized.codebook_loss

    check_beta(lambda model, images, quantized: model.loss(images, images, quantized)[1])
    assert fails(check_beta, beta_on_the_wrong_term)


def test_loss_is_equation_3():
    model = VQVAE(**SMALL)
    images = make_images()
    z = model.encoder(images)
    e = model.vector_quantization.embed(model.encode(images))
    reconstruction, quantized = model(images)
    reconstruction_loss, quantization_loss = model.loss(images, reconstruction, quantized)
    torch.testing.assert_close(reconstruction_loss, (images - reconstruction).square().mean())
    torch.testing.assert_close(quantization_loss, 1.25 * (z - e).square().mean())


def test_ssim_weight_adds_to_the_reconstruction_loss():
    torch.manual_seed(0)
    model = VQVAE(**SMALL, ssim_weight=0.5)
    images = make_images()
    reconstruction, quantized = model(images)
    ssim_loss = modules.ssim_loss(reconstruction, images)
    expected = F.mse_loss(reconstruction, images) + 0.5 * ssim_loss
    torch.testing.assert_close(model.loss(images, reconstruction, quantized)[0], expected)


@pytest.mark.parametrize("use_bfloat16", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (90, 7)])
def test_ssim_loss_agrees_with_the_metric(use_bfloat16, scale, shift):
    images = make_images(3, (64, 48))
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(1)
    noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
    noisy = noisy.clamp(low, high)
    expected = 1 - metrics.slice_scores(images, noisy, ("ssim",))["ssim"].mean()
    assert 0.05 < expected < 0.95
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
        loss = modules.ssim_loss(noisy * scale + shift, images * scale + shift)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    assert modules.ssim_loss(images, images).abs() < 1e-5


def test_ssim_loss_of_constant_and_small_slices():
    reconstruction = torch.randn(1, 1, 16, 16, requires_grad=True)
    modules.ssim_loss(reconstruction, torch.zeros(1, 1, 16, 16)).backward()
    assert reconstruction.grad.isfinite().all()
    with pytest.raises(ValueError, match="do not fit SSIM's 11 x 11 window"):
        modules.ssim_loss(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))


def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    arguments = SMALL | {"hidden_channels": 32, "residual_channels": 16, "embedding_dim": 16}
    model = VQVAE(**arguments | {"num_embeddings": 64}, codebook="ema")
    images = make_images(4)
    with torch.no_grad():
        model.vector_quantization.init_codebook(to_vectors(model.encoder(images)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(400):
        reconstruction, quantized = model(images)
        optimizer.zero_grad()
        sum(model.loss(images, reconstruction, quantized)).backward()
        optimizer.step()
        model.vector_quantization.update_codebook(quantized.vectors, quantized.indices)
        loss = model.reconstruction_loss(reconstruction, images)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20


# ---------------------------------------------------------------- training and evaluation


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_training_step_under_bfloat16_autocast(num_codebooks):
    torch.manual_seed(0)
    model = VQVAE(**SMALL, codebook="ema", restart_below=0.05, num_codebooks=num_codebooks)
    images = make_images()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, quantized = model(images)
        losses = model.loss(images, reconstruction, quantized)
    sum(losses).backward()
    model.vector_quantization.update_codebook(quantized.vectors, quantized.indices)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert quantized.quantized.dtype == torch.float32


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_the_forward_pass_never_changes_the_codebook(num_codebooks):
    model = VQVAE(**SMALL, codebook="ema", restart_below=0.1, num_codebooks=num_codebooks)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    model(make_images())
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name]), name
