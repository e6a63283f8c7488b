"""README and docs: marked commands run, links lead somewhere, and the repository map is complete.

A block of commands is marked by the comment in `MARKER`. The commands run as they are, except for a
small model, few slices and one epoch.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import generate
import predict
import train
import train_prior
from mri import phantom
from prior import anatomy, realism

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS, ROOT / "benchmarks/results/README.md"]
PACKAGES = ("mri", "training", "evaluation", "prior")

MARKER = "<!-- tests/test_readme.py runs this -->\n"
SCRIPTS = {
    "train.py": train,
    "predict.py": predict,
    "train_prior.py": train_prior,
    "generate.py": generate,
}
# Paths of the commands, and the test's files in their place.
PATHS = {"/data/keras_slices_data": "sample_data", "/data/scans": "scans"}


def marked_blocks() -> list:
    """Return a test parameter for each marked block, with its language and its lines."""
    parameters = []
    for page in (README, *DOCS):
        matches = re.findall(MARKER + r"```(\w*)\n(.*?)```", page.read_text("utf-8"), re.S)
        for number, (language, text) in enumerate(matches):
            parameters.append(pytest.param(language, text, id=f"{page.stem}-{number}"))
    return parameters


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Write the files that commands name: a tiny sample, a slice, scans of three subjects."""
    folder = tmp_path_factory.mktemp("readme")
    sample = folder / "sample_data"
    phantom.write_phantom(sample, volumes=(2, 1, 1), slices=3, workers=1, progress=False)
    image = next((sample / "keras_slices_test").iterdir())
    shutil.copy(image, folder / "scan.nii.gz")
    shutil.copy(image, folder / "slice.nii.gz")
    (folder / "scans").mkdir()
    for subject in range(3):
        shutil.copy(image, folder / "scans" / f"sub-{subject}.nii.gz")
    (folder / "resources").symlink_to(ROOT / "resources")
    return folder


@pytest.fixture
def workspace(inputs, tmp_path, monkeypatch, small) -> Path:
    """Return a working directory with the input files and a trained run, runs/x."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    for path in inputs.iterdir():
        if path.name != "runs":
            (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(realism, "SHIFT", 1)  # a shorter search for copies
    monkeypatch.setattr(anatomy, "STEPS", 1)  # a shorter training of the segmentation network
    runs = inputs / "runs"
    if not runs.exists():
        flags = ["--data", "sample_data", "--runs-dir", str(runs), "--name", "x", "--epochs", "1"]
        flags += ["--stride", "8"]  # fewer codes to sample
        assert train.main([*flags, *small]) == 0
    shutil.copytree(runs, folder / "runs")
    return folder


def run_command(command: str, small: list[str]) -> int:
    """Run a command such as `python train.py --data ...` in this process; return its exit code."""
    for path, replacement in PATHS.items():
        command = command.replace(path, replacement)
    script, *flags = shlex.split(command, comments=True)[1:]
    if script == "train.py":
        name = f"run_{len(list(Path('runs').iterdir()))}"
        flags += [*small, "--epochs", "1", "--name", name]
    elif script == "predict.py":
        flags += ["--device", "cpu"]
    elif script == "train_prior.py":
        flags += ["--epochs", "1", "--channels", "24", "--device", "cpu"]
    elif script == "generate.py":
        flags += ["--count", "2", "--device", "cpu"]
    return SCRIPTS[script].main(flags)


@pytest.mark.parametrize(("language", "text"), marked_blocks())
def test_marked_commands_run(workspace, small, language, text):
    if language == "python":
        exec(compile(text, "README or docs", "exec"), {})
        assert (workspace / "again.nii.gz").stat().st_size > 10_000  # the block writes this file
        return
    commands = [line for line in text.splitlines() if line.startswith("python ")]
    assert commands
    for command in commands:
        assert run_command(command, small) == 0, command


def test_the_expected_pages_have_marked_blocks():
    pages = [page.name for page in (README, *DOCS) if MARKER in page.read_text("utf-8")]
    assert pages == ["README.md", "data.md", "prior.md"]


# ---------------------------------------------------------------- text


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def mapped_paths() -> list[str]:
    """Return the paths of the repository map; indented names belong to the folder above them."""
    section = README.read_text("utf-8").split("## Repository map")[1]
    lines = section.split("```")[1].strip("\n").splitlines()
    paths = []
    folder = ""
    for line in lines:
        names = re.match(r"(\S+, )*\S+", line.strip()).group().split(", ")
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
            paths += names
        else:
            paths += [folder + name for name in names]
    return paths


def test_every_path_of_the_repository_map_exists():
    for path in mapped_paths():
        assert (ROOT / path).exists(), path


def test_the_repository_map_has_every_python_file():
    files = {path.name for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        modules = {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
        files |= modules - {f"{package}/__init__.py"}
    assert files <= set(mapped_paths())
