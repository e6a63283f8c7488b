"""training/config.py: the recipes, and values that could only fail later."""

from pathlib import Path

import pytest

from training.config import (
    DOCUMENT,
    TrainConfig,
    check_config,
    check_processes,
    parse_train_flags,
    resolve_config,
)
from training.options import check_bounds
from utils import UserError


def resolve(flags: str) -> TrainConfig:
    return resolve_config(parse_train_flags(flags.split(), None))


def test_the_document_recipe_has_the_documents_values():
    config = resolve("--recipe document")
    expected = {
        "batch_size": 16, "epochs": 100, "learning_rate": 1e-4, "num_embeddings": 512,
        "embedding_dim": 64, "hidden_channels": 64, "commitment_cost": 0.25, "codebook": "gradient",
        "schedule": "constant", "warmup": 0.0, "clip_grad_norm": 0.0, "augment": False,
        "restart_below": 0.0, "codebook_init": "kmeans", "crop": 0, "ssim_weight": 0.0,
        "num_residual_layers": 2, "num_code_layers": 0, "refine_channels": 0, "stride": 4,
        "num_codebooks": 1, "gan": False, "recipe": "document",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_tuned_recipe_is_the_default_and_has_the_documents_rate_and_epochs():
    assert resolve("") == resolve("--recipe tuned") == TrainConfig()
    for name in ("batch_size", "epochs", "num_embeddings", "embedding_dim", "hidden_channels"):
        assert getattr(TrainConfig(), name) == getattr(resolve("--recipe document"), name)


def test_the_tuned_recipe_has_its_published_values():
    """The results in docs/results.md were made with them."""
    expected = {
        "learning_rate": 2e-3, "schedule": "cosine", "warmup": 0.05, "clip_grad_norm": 1.0,
        "crop": 128, "augment": True, "ssim_weight": 0.5, "gan_weight": 0.3, "gan_start": 0.5,
        "codebook": "ema", "ema_decay": 0.99, "restart_below": 0.1, "residual_channels": 32,
        "num_residual_layers": 3, "num_code_layers": 4, "refine_channels": 16,
    }  # fmt: skip
    config = TrainConfig()
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_value_for_nan_is_a_finite_number():
    assert resolve("").nan_value is None
    config = resolve("--nan-value -1000")
    assert config.nan_value == -1000
    check_config(config, 1)
    for value in ("nan", "inf"):
        with pytest.raises(UserError, match=f"--nan-value is {value}"):
            check_config(resolve(f"--nan-value {value}"), 1)


def test_flags_override_the_recipe():
    config = resolve("--recipe document --learning-rate 0.01 --augment --codebook ema")
    assert config.learning_rate == 0.01
    assert config.augment
    assert config.codebook == "ema"
    assert config.schedule == DOCUMENT["schedule"]


def test_a_gradient_codebook_needs_no_second_flag():
    assert resolve("--codebook gradient").restart_below == 0


def test_a_discriminator_is_not_compiled_by_default():
    assert resolve("--gan").compile is False
    assert resolve("").compile is None


def test_a_csv_file_of_the_split_gets_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("--split split.csv").split == [str(Path(tmp_path, "split.csv").resolve())]
    assert resolve("--split 0.6 0.2 0.2").split == ["0.6", "0.2", "0.2"]


@pytest.mark.parametrize("flags", ["", "--recipe document", "--size 64 48 --crop 16 --stride 16"])
def test_valid_configurations_are_accepted(flags):
    check_config(resolve(flags), world_size=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 0", "--epochs is 0; expected 1 to 1e"),
        ("--batch-size -1", "--batch-size is -1; expected 1 to"),
        ("--plot-every 0", "--plot-every is 0; expected 1 to"),
        ("--learning-rate nan", "--learning-rate is nan; expected 0 to"),
        ("--learning-rate inf", "--learning-rate is inf"),
        ("--ema-decay 1.5", "--ema-decay is 1.5; expected 0 to 1"),
        ("--recipe document --restart-below 0.1", "--restart-below needs --codebook ema"),
        ("--crop 8", "--crop is 8; expected 0, or 16 to 128"),
        ("--crop 40 --stride 16", "--crop is 40; expected .* divisible by --stride 16"),
        ("--size 8 64", "--size is 8 64; expected two numbers of at least 16"),
        ("--size 64 66", "--size is 64 66; expected .* divisible by 4"),
        ("--hidden-channels 1", "--hidden-channels is 1; expected 2 to"),
        ("--seed 99999999999999", "--seed is"),
        ("--planes 300", "--planes is 300; expected 1 to 256"),
        ("--gan --gan-start 2", "--gan-start is 2.0; expected 0 to 0.99"),
        ("--gan --gan-weight -1", "--gan-weight is -1.0; expected 0 to"),
        ("--gan --compile", "--compile does not work with --gan"),
    ],
)
def test_values_that_could_only_fail_later_are_errors(flags, message):
    with pytest.raises(UserError, match=message):
        check_config(resolve(flags), world_size=1)


@pytest.mark.parametrize(("name", "value"), [("schedule", "x"), ("stride", 5), ("recipe", "x")])
def test_choices_are_checked_in_a_config_json_too(name, value):
    """The parser checks those that are typed."""
    with pytest.raises(UserError, match=f"--{name} is {value}; expected one of"):
        check_bounds(TrainConfig(**{name: value}))


def test_the_batch_size_must_be_divisible_by_the_number_of_processes():
    check_processes(TrainConfig(batch_size=16), 4)
    with pytest.raises(UserError, match="--batch-size is 16; expected a multiple of the 3 proc"):
        check_processes(TrainConfig(batch_size=16), 3)
