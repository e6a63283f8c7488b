"""training/options.py: fields as flags, their types and their bounds."""

# ruff: noqa: RUF009 (option() makes a dataclasses.field)

from dataclasses import dataclass
from pathlib import Path

import pytest

from training.options import check_bounds, check_types, flag_name, option, parse_flags
from utils import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    epochs: int = option(100, "passes", group="a", low=1)
    decay: float = option(0.9, "decay of the averages", group="a", low=0, high=1)
    planes: int | None = option(None, "central planes", group="a", low=1, high=256)
    kind: str = option("x", "which", group="b", choices=("x", "y"))
    size: list[int] | None = option(None, "rows and columns", group="b", nargs=2)
    compile: bool | None = option(None, "compiled", group="b", negatable=True)
    resume: bool = option(False, "resumed", group="b")


def test_only_typed_flags_are_returned():
    assert parse_flags(Config, [], None) == {}
    argv = ["--epochs", "3", "--no-compile", "--size", "64", "32", "--resume"]
    flags = parse_flags(Config, argv, None)
    assert flags == {"epochs": 3, "compile": False, "size": [64, 32], "resume": True}


def test_a_flag_is_named_after_its_field():
    assert flag_name("num_code_layers") == "--num-code-layers"


@pytest.mark.parametrize("argv", ["--epochs x", "--kind z", "--size 1", "--no-resume"])
def test_values_of_another_type_are_rejected_by_the_parser(argv):
    with pytest.raises(SystemExit) as error:
        parse_flags(Config, argv.split(), None)
    assert error.value.code == 2


def test_help_shows_the_values_of_both_recipes(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Config, ["--help"], "what it does", alternatives=("a", {"decay": 0.5}))
    printed = capsys.readouterr().out
    assert "what it does" in printed
    assert "decay of the averages (0.9 | 0.5)" in printed
    assert "passes (100 | 100)" in printed
    assert "which\n" in printed


@pytest.mark.parametrize(
    "values", [{}, {"epochs": 1, "decay": 1.0, "planes": 256}, {"decay": 0}, {"planes": None}]
)
def test_values_within_their_bounds_are_accepted(values):
    check_bounds(Config(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, r"--epochs is 0; expected 1 to 1e\+09"),
        ({"decay": -0.1}, "--decay is -0.1; expected 0 to 1"),
        ({"decay": 1.5}, "--decay is 1.5; expected 0 to 1"),
        ({"decay": float("nan")}, "--decay is nan; expected 0 to 1"),
        ({"epochs": float("inf")}, "--epochs is inf"),
        ({"planes": 300}, "--planes is 300; expected 1 to 256"),
        ({"kind": "z"}, "--kind is z; expected one of x, y"),
    ],
)
def test_values_out_of_bounds_are_errors(values, message):
    with pytest.raises(UserError, match=message):
        check_bounds(Config(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 3, "decay": 1, "planes": None, "kind": "y", "size": [64, 32]},
        {"compile": True, "resume": False, "decay": 0.5},
    ],
)
def test_json_values_of_the_right_type_are_accepted(values):
    check_types(Config, values, Path("config.json"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "3"), ("epochs", 3.5), ("epochs", True), ("epochs", None), ("decay", False),
     ("decay", "x"), ("kind", 3), ("size", "64"), ("compile", 1), ("resume", None)],
)  # fmt: skip
def test_json_values_of_another_type_are_errors(name, value):
    with pytest.raises(UserError, match=f"config.json has {name} .*expected a value such as"):
        check_types(Config, {name: value}, Path("config.json"))
