"""benchmarks/variants.py: variants train at equal bits, and their parts are those of the papers."""

import math

import pytest
import torch
import variants
from trainer import Trainer
from variants import VARIANTS, replace_in_modules

import modules
import train
from training.config import parse_train_flags, resolve_config


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_at_equal_bits(name):
    """One step changes weights, and codes decode to the result of the forward pass."""
    variant = VARIANTS[name]
    flags = [*variant.flags.split(), "--precision", "float32", "--device", "cpu"]
    config = resolve_config(parse_train_flags(flags, None))
    images = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    with replace_in_modules(variant.replacements):
        trainer = Trainer(config, torch.device("cpu"))
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        losses, finite = trainer.step(images)
    assert finite and losses.isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    model = trainer.model.eval()
    reconstruction, quantized = model(images)
    decoded = model.decode_codes(quantized.indices)
    torch.testing.assert_close(decoded, reconstruction, atol=1e-4, rtol=1e-4)
    assert quantized.indices.numel() * 9 / images.numel() == model.bits_per_pixel == 0.5625
    for replacement in variant.replacements.values():
        if isinstance(replacement, type):
            assert any(type(part) is replacement for part in model.modules())


@pytest.mark.parametrize("name", [name for name in VARIANTS if "uniform" not in name])
def test_every_variant_initialises_its_codebook(name):
    """Only the codes of FSQ are fixed."""
    variant = VARIANTS[name]
    config = resolve_config(parse_train_flags(variant.flags.split(), None))
    with replace_in_modules(variant.replacements):
        model = Trainer(config, torch.device("cpu")).model
    quantizer = model.vector_quantization
    before = [p.clone() for p in quantizer.state_dict().values()]
    vectors = torch.randn(600, config.embedding_dim)
    quantizer.init_codebook(vectors, generator=torch.Generator().manual_seed(0))
    after = quantizer.state_dict().values()
    is_equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert is_equal == ("FSQ" in name)


def test_fsq_rounds_as_in_the_paper():
    """At the levels nothing changes, all 512 codes occur, and gradients pass unrounded."""
    fsq = variants.FSQ(512, 3)
    for projection in (fsq.down, fsq.up):
        torch.nn.init.dirac_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    half_range = 3.5 * 1.001
    levels = torch.cartesian_prod(*[torch.arange(-4.0, 4)] * 3)  # (512, 3), after rounding
    z = torch.atanh((levels + 0.5) / half_range) - math.tan(0.5 / half_range)
    z = z.T.reshape(1, 3, 512, 1).requires_grad_()
    result = fsq(z)
    assert result.indices.flatten().tolist() == list(range(512))
    assert (result.counts == 1).all()
    torch.testing.assert_close(result.quantized[0, :, :, 0].T, levels / 4)
    torch.testing.assert_close(fsq.embed(result.indices), result.quantized)
    (gradient,) = torch.autograd.grad(result.quantized.sum(), z)
    expected = (half_range - (levels + 0.5).square() / half_range) / 4
    torch.testing.assert_close(gradient[0, :, :, 0].T, expected, atol=1e-4, rtol=1e-3)


def test_fsq_rejects_other_numbers_of_codes():
    with pytest.raises(ValueError, match="num_embeddings is 256; expected 512"):
        variants.FSQ(256, 64)


def test_rotation_trick_keeps_values_and_rotates_gradients():
    torch.manual_seed(0)
    quantizer = variants.RotationTrick(16, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(1, 4, 3, 3, requires_grad=True)
    result = quantizer(z)
    torch.testing.assert_close(result.quantized, quantizer.embed(result.indices))
    gradient = torch.randn_like(result.quantized)
    (z_gradient,) = torch.autograd.grad(result.quantized, z, gradient)
    # A rotation times a scale changes all lengths by the scale.
    scale = result.quantized.detach().norm(dim=1) / z.detach().norm(dim=1)
    torch.testing.assert_close(z_gradient.norm(dim=1), scale * gradient.norm(dim=1))
    assert not torch.allclose(z_gradient, scale[:, None] * gradient)


def test_cosine_codes_depend_on_directions_only():
    torch.manual_seed(0)
    quantizer = variants.CosineCodes(8, 4, "ema")
    vectors = torch.randn(200, 4)
    quantizer.init_codebook(vectors)
    # Embeddings are means of vectors of length sqrt(D).
    assert quantizer.embedding.weight.norm(dim=1).max() <= 2.0001
    z = vectors.T.reshape(1, 4, 20, 10)
    assert torch.equal(quantizer.eval()(z).indices, quantizer(7 * z).indices)


def test_simvq_moves_every_code_by_one_matrix():
    torch.manual_seed(0)
    quantizer = variants.SimVQ(8, 4, "gradient")
    quantizer.init_codebook(torch.randn(200, 4))
    start = quantizer.embedding.weight.detach().clone()
    assert len(start.unique(dim=0)) == 8
    assert (start.abs() > 0.126).any()  # a uniform initialisation stays within 1/8
    quantizer(torch.randn(1, 4, 1, 1)).codebook_loss.backward()  # one vector, one code
    (matrix,) = quantizer.parameters()
    torch.optim.SGD([matrix], 0.1).step()
    assert (quantizer.embedding.weight != start).any(1).all()


def test_depth_at_the_code_grid_is_applied_once():
    decoder = variants.CodeGridDecoder(4, 4, 2, 8)
    calls = []
    decoder.code_stack.register_forward_hook(lambda *_: calls.append(1))
    assert decoder(torch.randn(1, 8, 4, 4)).shape == (1, 1, 16, 16)
    assert len(calls) == 1
    assert len(decoder.residual_stack.stack) == 0


def test_sub_pixel_decoder_has_the_same_output_shape():
    decoder = variants.SubPixelDecoder(4, 4, 1, 8, 4, 1, 2)
    assert decoder(torch.randn(2, 8, 6, 4)).shape == (2, 1, 24, 16)
    assert not any(isinstance(part, torch.nn.ConvTranspose2d) for part in decoder.modules())


def test_a_function_of_modules_can_be_replaced():
    """Fine noise costs less at four scales than at one, where coarse structure counts less."""
    torch.manual_seed(0)
    coarse = torch.randn(1, 1, 16, 16)
    images = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic")
    noisy = (images + 0.3 * torch.randn_like(images)).requires_grad_()
    model = modules.VQVAE(ssim_weight=1.0)
    with replace_in_modules(VARIANTS["tuned, SSIM at four scales"].replacements):
        at_four_scales = model.reconstruction_loss(noisy, images)
    at_one_scale = model.reconstruction_loss(noisy, images)
    assert at_four_scales < at_one_scale - 0.1
    assert torch.autograd.grad(at_four_scales, noisy)[0].isfinite().all()


def test_replacements_end_after_an_error():
    original = modules.VectorQuantizer
    with pytest.raises(RuntimeError), replace_in_modules({"VectorQuantizer": variants.FSQ}):
        assert modules.VectorQuantizer is variants.FSQ
        raise RuntimeError
    assert modules.VectorQuantizer is original
    assert train.VQVAE is modules.VQVAE
