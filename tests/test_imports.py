"""The layout of the repository: directions of imports, file sizes, and the top level."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train", "predict", "train_prior", "generate"}
LIBRARIES = {"utils", "modules", "dataset"}
# The parts of this repository that each module or package may import, apart from itself.
ALLOWED = {
    "utils": set(),
    "modules": set(),
    "mri": {"utils"},
    "dataset": {"utils", "mri"},
    "training": {"utils", "mri", "dataset", "modules"},
    "evaluation": {"utils", "mri", "dataset", "modules", "training"},
    "prior": {"utils", "mri", "dataset", "modules", "training", "evaluation"},
}
OURS = ALLOWED.keys() | SCRIPTS


def tracked_files() -> list[Path]:
    """Return the Python files in git; all of them in a copy without git."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "*.py"], capture_output=True, text=True
    )
    names = listed.stdout.splitlines() or [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts
    ]
    return [Path(name) for name in names if (ROOT / name).exists()]


def imported_names(path: Path) -> set[str]:
    """Return the first parts of the names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_point_in_one_direction(name):
    for path in tracked_files():
        if path.parts[0] in (name, f"{name}.py"):
            allowed = ALLOWED[name] | {name}
            wrong = (imported_names(path) & OURS) - allowed
            assert not wrong, f"{path} imports {', '.join(wrong)}"


def test_no_part_of_the_program_imports_a_script():
    """The commands in benchmarks/ and resources/ do, to make results and figures."""
    for path in tracked_files():
        if path.parts[0] not in ("tests", "benchmarks", "resources"):
            wrong = imported_names(path) & SCRIPTS
            assert not wrong, f"{path} imports {', '.join(wrong)}"


def test_files_have_at_most_400_lines():
    """mri/phantom.py is exempt for its anatomical tables."""
    for path in tracked_files():
        count = len((ROOT / path).read_text("utf-8").splitlines())
        assert count <= 400 or path == Path("mri/phantom.py"), f"{path} has {count} lines"


def test_the_top_level_has_only_scripts_and_the_modules_read_first():
    top_level = {path.stem for path in tracked_files() if len(path.parts) == 1}
    assert top_level == SCRIPTS | LIBRARIES
