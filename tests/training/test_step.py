"""training/step.py: clipping, skipped steps, and compilation that may fail."""

import pytest
import torch
from torch import nn

from training.config import TrainConfig
from training.step import (
    clip_gradients,
    compile_if_enabled,
    compile_with_fallback,
    may_step,
    update_average,
)

CPU = torch.device("cpu")


def module_with_gradient(*values: float) -> nn.Module:
    module = nn.Linear(len(values), 1, bias=False)
    module.weight.grad = torch.tensor([values])
    return module


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, (0.6, 0.8)), (0.0, (3.0, 4.0))])
def test_gradients_are_clipped_to_the_norm_and_zero_means_no_clipping(max_norm, expected):
    module = module_with_gradient(3.0, 4.0)
    assert clip_gradients([module], max_norm)
    torch.testing.assert_close(module.weight.grad, torch.tensor([expected]))


def test_each_module_is_clipped_by_itself():
    modules = [module_with_gradient(3.0, 4.0), module_with_gradient(0.3, 0.4)]
    clip_gradients(modules, 1.0)
    torch.testing.assert_close(modules[0].weight.grad, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(modules[1].weight.grad, torch.tensor([[0.3, 0.4]]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_gradient_is_found_in_any_module(value):
    idle = nn.Linear(2, 1)  # as a discriminator before it takes part
    assert not clip_gradients([module_with_gradient(1.0), idle, module_with_gradient(value)], 1.0)


def test_the_optimizer_skips_steps_that_are_not_finite():
    module = module_with_gradient(1.0, torch.nan)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
    before = module.weight.detach().clone()
    assert may_step(torch.tensor(False), optimizer)  # the optimizer itself skips the step
    optimizer.step()
    assert torch.equal(module.weight, before)
    module.weight.grad = torch.ones(1, 2)
    assert may_step(torch.tensor(True), optimizer)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before - 0.1)


class MpsFlag:
    """A bool tensor on mps, whose fused optimizers ignore `found_inf`."""

    device = torch.device("mps")

    def __init__(self, value: bool):
        self.value = value

    def __bool__(self):
        return self.value


def test_on_mps_the_caller_skips_steps_that_are_not_finite():
    module = module_with_gradient(1.0)
    optimizer = torch.optim.Adam(module.parameters())
    assert may_step(MpsFlag(True), optimizer)
    assert not may_step(MpsFlag(False), optimizer)


# ---------------------------------------------------------------- averages


def test_the_decay_of_the_average_increases_to_its_maximum():
    """A weight of 1, and its average, which is 0 before the step."""
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    for step, decay in ((0, 0.1), (8, 0.5), (10**6, 0.999)):
        nn.init.zeros_(average.weight)
        update_average(average, model, step)
        assert average.weight.item() == pytest.approx(1 - decay)
    assert model.weight.item() == 1


# ---------------------------------------------------------------- compilation


class Noisy(nn.Module):
    """A model whose forward pass draws a random number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight * x + torch.rand(1)


def outcome(function, model):
    """Return losses and gradient of the first two steps."""
    results = []
    for step in range(2):
        torch.manual_seed(step)
        losses = function(torch.ones(2))
        model.weight.grad = None
        losses.sum().backward()
        results += [losses.detach(), model.weight.grad.clone()]
    return results


@pytest.fixture(params=["compile", "forward", "backward", None])
def failing_at(request, monkeypatch) -> str | None:
    """Replace torch.compile by one that fails in this phase; it compiles nothing."""

    class FailingBackward(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("no compiler\nand more")

    def fake_compile(function, **options):
        if request.param == "compile":
            raise RuntimeError("no compiler\nand more")

        def compiled(x):
            result = function(x)
            if request.param == "forward":
                raise RuntimeError("no compiler\nand more")
            return FailingBackward.apply(result) if request.param == "backward" else result

        return compiled

    monkeypatch.setattr(torch, "compile", fake_compile)
    return request.param


def test_a_step_that_cannot_be_compiled_warns_once_and_gives_the_same_result(failing_at, capsys):
    """Wherever it fails: the trial leaves no random draws."""
    eager, model = Noisy(), Noisy()
    expected = outcome(eager, eager)
    actual = outcome(compile_with_fallback(model, CPU), model)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)
    warning = "warning: the training step cannot be compiled here and runs uncompiled: no compiler"
    assert capsys.readouterr().out.count(f"{warning}\n") == (failing_at is not None)


@pytest.mark.parametrize(("flag", "compiled"), [(True, True), (False, False), (None, False)])
def test_a_cpu_compiles_only_if_it_is_requested(monkeypatch, flag, compiled):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(1) or function)
    compile_if_enabled(Noisy(), TrainConfig(compile=flag), CPU)(torch.ones(2))
    assert bool(calls) == compiled
