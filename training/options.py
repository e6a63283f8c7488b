"""Turn the fields of configuration dataclasses into command-line flags.

@dataclass(frozen=True, kw_only=True)
class Config:
    epochs: int = option(100, "passes over the training split", group="run", low=1)

flags = parse_flags(Config, argv, __doc__)      # only the flags that were typed
config = Config(**flags)
check_bounds(config)
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path

from utils import UserError

ANY_POSITIVE = 1e9  # upper bound of options without a maximum


def option(
    default: object,
    help: str,
    *,
    group: str,
    low: float | None = None,
    high: float = ANY_POSITIVE,
    choices: tuple | None = None,
    nargs: int | str | None = None,
    metavar: str | tuple | None = None,
    negatable: bool = False,
    resumable: bool = False,
):
    """Declare a field of a configuration dataclass that is also a command-line flag.

    Args:
        default: value of the field if neither the flags nor the recipe set it.
        help: the quantity and its unit, as shown by `--help`.
        group: heading under which `--help` lists the flag.
        low, high: allowed range, inclusive; no range is checked if `low` is None.
        choices: allowed values.
        nargs, metavar: as for argparse's `add_argument`.
        negatable: for a bool, whether the flag `--no-<name>` also exists.
        resumable: whether the flag may change when the run is resumed. Changing any other flag
            would make it a different run.
    """
    metadata = {
        "help": help,
        "group": group,
        "low": low,
        "high": high,
        "choices": choices,
        "nargs": nargs,
        "metavar": metavar,
        "negatable": negatable,
        "resumable": resumable,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """Return the flag of a field: "batch_size" -> "--batch-size"."""
    return "--" + field_name.replace("_", "-")


def parse_flags(
    config_class: type,
    argv: list[str] | None,
    description: str | None,
    alternatives: tuple[str, dict] | None = None,
) -> dict:
    """Parse the command line and return only the flags that were typed.

    Defaults are left out because they differ between a new run and a resumed one.

    Args:
        config_class: a dataclass whose fields are made with `option`.
        argv: arguments (default: sys.argv).
        description: text at the top of `--help`.
        alternatives: name of a group of flags, and the values of these flags in a different
            recipe; `--help` shows these values after the defaults.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        options = _argparse_options(field, hints[field.name])
        if alternatives is not None and name == alternatives[0]:
            other = alternatives[1].get(field.name, field.default)
            options["help"] += f" ({field.default} | {other})"
        groups[name].add_argument(flag_name(field.name), **options)
    return vars(parser.parse_args(argv))


def _argparse_options(field: dataclasses.Field, hint) -> dict:
    """Return the keyword arguments of `add_argument` for a field with this type hint."""
    options = {"help": field.metadata["help"]}
    value_type = _types(hint)[0]
    if value_type is bool:
        if field.metadata["negatable"]:
            return options | {"action": argparse.BooleanOptionalAction}
        return options | {"action": "store_true"}
    if typing.get_origin(value_type) is list:
        value_type = typing.get_args(value_type)[0]
    options["type"] = value_type
    for key in ("choices", "nargs", "metavar"):
        if field.metadata[key] is not None:
            options[key] = field.metadata[key]
    if value_type is not str and "choices" not in options:
        options.setdefault("metavar", "N" if value_type is int else "X")
    return options


def _types(hint) -> list:
    """Return the member types of a union, except None: int | None -> [int]."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [member for member in members if member is not type(None)]


def check_types(config_class: type, values: dict, path: Path) -> None:
    """Check values that were read from a config.json.

    Raises:
        UserError: if a value does not have the type of its field.
    """
    hints = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        if not _has_type(value, hints[name]):
            raise UserError(
                f"{path} has {name} {value!r:.80}; expected a value such as {defaults[name]!r}. "
                "Restore the file that train.py wrote"
            )


def _has_type(value: object, hint) -> bool:
    """Return whether a JSON value fits a type hint; an integer also fits the hint float."""
    if value is None:
        return type(None) in typing.get_args(hint)
    for member in _types(hint):
        expected = (int, float) if member is float else typing.get_origin(member) or member
        if isinstance(value, bool) and member is not bool:
            continue  # Python counts True as an integer
        if isinstance(value, expected):
            return True
    return False


def check_range(flag: str, value: float | None, low: float, high: float) -> None:
    """Check the value of a flag against an inclusive range, unless it is None.

    Raises:
        UserError: if the value is out of range, or NaN.
    """
    if value is not None and not low <= value <= high:
        raise UserError(f"{flag} is {value}; expected {low} to {high:g}")


def check_bounds(config) -> None:
    """Check every field against its range and its choices; raise UserError if one is invalid."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        if low is not None:
            check_range(flag_name(field.name), value, low, high)
        if choices is not None and value not in choices:
            expected = ", ".join(map(str, choices))
            raise UserError(f"{flag_name(field.name)} is {value}; expected one of {expected}")
