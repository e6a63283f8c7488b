"""The comparison of variants: its command runs, its table says what the runs' files say."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablation

import modules
import train
from training.config import parse_arguments, with_defaults
from utils import UserError

NAME = "tuned, FSQ 8 x 8 x 8"  # with a class of its own in the place of one of modules.py
RUN = "tuned__FSQ_8_x_8_x_8_epochs_1_seed_0"


def test_a_variant_is_trained_evaluated_and_tabled(
    tmp_path, write_slices, monkeypatch, own_signals
):
    data = write_slices(tmp_path / "data", train=3, validate=2, test=2)
    out, log = tmp_path / "results" / "table", tmp_path / "runs" / "data" / f"{RUN}.log"
    command = ["ablation.py", "--data", data, "--variants", NAME, "--epochs", "1"]
    command += ["--runs-dir", tmp_path / "runs", "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    for _ in range(2):  # the second time nothing is left to do
        ablation.main()
    assert log.read_text().count("epoch 1: train loss") == 1
    other = write_slices(tmp_path / "elsewhere" / "data", train=3, validate=2, test=2)
    monkeypatch.setattr(sys, "argv", [str(other if word is data else word) for word in command])
    with pytest.raises(UserError, match="name another --runs-dir"):
        ablation.main()
    (row,) = json.loads(out.with_suffix(".json").read_text())
    run = tmp_path / "runs" / "data" / RUN
    assert row["test"]["ssim"] == json.loads((run / "test" / "metrics.json").read_text())["ssim"]
    assert (
        row["replaced"] == {"VectorQuantizer": "FSQ"}
        and row["epochs"] == 1
        and row["bits_per_pixel"] == 0.5625
    )
    assert 1.3 < row["gmac"] < 1.5 and 0.1 < row["step_time"] < 5
    start = f"| {NAME} | 1 | 1 | {row['gmac']:.2f} | {row['step_time']:.2f} | 0.5625 |"
    assert start in out.with_suffix(".md").read_text()


def test_a_run_of_other_settings_is_not_taken_for_the_variant(tmp_path):
    config = {"arguments": with_defaults("tuned", {"data": str(tmp_path)})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.csv").write_text("epoch\n1\n2\n")
    assert ablation.epochs_done(tmp_path, tmp_path, []) == 2
    with pytest.raises(UserError, match="trained with other clip_grad_norm, seed:"):
        ablation.epochs_done(tmp_path, tmp_path, ["--clip-grad-norm", "2", "--seed", "1"])


def test_the_spread_is_half_the_range_over_seeds():
    def row(seed, value):
        test = {name: {"mean": value} for name in ablation.SCORES}
        return {"variant": "tuned", "seed": seed, "epochs": 2, "gmac": 1, "bits_per_pixel": 0.5625,
                "codes_used": 500, "perplexity": 300, "validation_ssim": value, "test": test}  # fmt: skip

    cells = ablation.table([row(0, 0.80), row(1, 0.82), row(2, 0.81)]).splitlines()[2].split(" | ")
    assert cells[7] == "0.810 ± 0.010" and cells[1] == "3"


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_trains_at_equal_bits_or_says_so(tmp_path, name):
    """One step changes weights, codes decode to what forward gives, and the model is built of the variant's classes."""
    variant = ablation.VARIANTS[name]
    given = parse_arguments([*variant.flags.split(), "--precision", "float32", "--device", "cpu"])
    images = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    with ablation.replaced(variant.replaced):
        run = train.Run(tmp_path, with_defaults(given.get("recipe", "tuned"), given), "")
        before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
        losses, finite = run.train_step(run, images)
    assert finite and losses.isfinite().all()
    after = [p for p in run.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model = run.model.eval()
    output = model(images)
    torch.testing.assert_close(
        model.decode_codes(output.indices), output.reconstruction, atol=1e-4, rtol=1e-4
    )
    assert output.indices.numel() * 9 / images.numel() == model.bits_per_pixel == 0.5625
    classes = [stand_in for stand_in in variant.replaced.values() if isinstance(stand_in, type)]
    assert all(any(type(part) is stand_in for part in model.modules()) for stand_in in classes)


def test_fsq_is_the_papers_rounding():
    """At each level's own value nothing changes, all 512 codes occur, and gradients pass as if nothing were rounded."""
    fsq = ablation.FSQ(512, 3)
    for projection in (fsq.down, fsq.up):
        torch.nn.init.dirac_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    half = 3.5 * 1.001
    levels = torch.cartesian_prod(*[torch.arange(-4.0, 4)] * 3)  # (512, 3), what rounding gives
    z = (
        (torch.atanh((levels + 0.5) / half) - math.tan(0.5 / half))
        .T.reshape(1, 3, 512, 1)
        .requires_grad_()
    )
    result = fsq(z)
    assert result.indices.flatten().tolist() == list(range(512)) and (result.counts == 1).all()
    torch.testing.assert_close(result.quantized[0, :, :, 0].T, levels / 4)
    torch.testing.assert_close(fsq.embed(result.indices), result.quantized)
    (gradient,) = torch.autograd.grad(result.quantized.sum(), z)
    expected = (half - (levels + 0.5).square() / half) / 4
    torch.testing.assert_close(gradient[0, :, :, 0].T, expected, atol=1e-4, rtol=1e-3)


def test_depth_at_the_code_grid_is_applied_once():
    decoder = ablation.CodeGridDecoder(4, 4, 2, 8)
    calls = []
    decoder.code_stack.register_forward_hook(lambda *_: calls.append(1))
    assert decoder(torch.randn(1, 8, 4, 4)).shape == (1, 1, 16, 16)
    assert len(calls) == 1 and not len(decoder.residual_stack.stack)


def test_rotation_trick_keeps_values_and_turns_gradients():
    torch.manual_seed(0)
    quantizer = ablation.RotationTrick(16, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(1, 4, 3, 3, requires_grad=True)
    quantized = quantizer(z).quantized
    torch.testing.assert_close(quantized, quantizer.embed(quantizer(z).indices))
    gradient = torch.randn_like(quantized)
    (got,) = torch.autograd.grad(quantized, z, gradient)
    scale = quantized.detach().norm(dim=1) / z.detach().norm(dim=1)
    torch.testing.assert_close(
        got.norm(dim=1), scale * gradient.norm(dim=1)
    )  # a rotation and a scale, no more


def test_a_function_of_modules_can_be_replaced():
    """Coarse structure counts more at four scales: fine noise costs less than at one."""
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(
        torch.randn(1, 1, 16, 16), scale_factor=8, mode="bicubic"
    )
    noisy = (images + 0.3 * torch.randn_like(images)).requires_grad_()
    output = modules.Output(noisy, *[torch.zeros(())] * 4)
    losses = []
    model = modules.VQVAE(ssim_weight=1.0)
    with ablation.replaced(ablation.VARIANTS["tuned, SSIM at four scales"].replaced):
        losses.append(model.loss(images, output)[0])
    losses.append(model.loss(images, output)[0])
    assert losses[0] < losses[1] - 0.1
    assert torch.autograd.grad(losses[0], noisy)[0].isfinite().all()


def test_cosine_codes_see_directions_alone():
    torch.manual_seed(0)
    quantizer = ablation.CosineCodes(8, 4, "ema")
    vectors = torch.randn(200, 4)
    quantizer.initialize(vectors)
    assert (
        quantizer.embedding.weight.norm(dim=1).max() <= 2.0001
    )  # sqrt(D): means of vectors of that length
    z = vectors.T.reshape(1, 4, 20, 10)
    assert torch.equal(quantizer.eval()(z).indices, quantizer(7 * z).indices)


def test_simvq_moves_every_code_by_one_matrix():
    torch.manual_seed(0)
    quantizer = ablation.SimVQ(8, 4, "gradient")
    vectors = torch.randn(200, 4)
    quantizer.initialize(vectors)
    start = quantizer.embedding.weight.detach().clone()
    assert (
        len(start.unique(dim=0)) == 8 and (start.abs() > 0.126).any()
    )  # from data: uniform starts within 1/8
    quantizer(torch.randn(1, 4, 1, 1)).codebook_loss.backward()  # one vector, one code
    (matrix,) = quantizer.parameters()
    torch.optim.SGD([matrix], 0.1).step()
    assert (quantizer.embedding.weight != start).any(1).all()


def test_sub_pixel_decoder_keeps_the_shape():
    decoder = ablation.SubPixelDecoder(4, 4, 1, 8, 4, 1, 2)
    assert decoder(torch.randn(2, 8, 6, 4)).shape == (2, 1, 24, 16)
    assert not any(isinstance(part, torch.nn.ConvTranspose2d) for part in decoder.modules())


def test_unknown_variants_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--data", ".", "--variants", "better"])
    with pytest.raises(SystemExit) as stop:
        ablation.main()
    assert stop.value.code == 2
