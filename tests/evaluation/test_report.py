"""The page of a run and the comparison of runs: complete, self-contained, escaped."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import predict
import train
from evaluation import report
from utils import UserError


def find_chromium() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return None


CHROMIUM = find_chromium()
SECTIONS = [
    "Configuration",
    "Curves",
    "Reconstructions",
    "Scores, test",
    "By organ, test",
    "Codebook usage, test",
    "Worst slices, test",
]


@pytest.fixture
def runs(tmp_path, write_slices, write_nifti, small):
    """Two runs: one evaluated, with segmentations and a name like an HTML tag, and another one."""
    data = write_slices(tmp_path / "data", train=4, validate=4, test=4)
    labels = np.zeros((256, 128), np.uint8)
    labels[50:90, 40:80] = 2
    for i in range(4):
        name = f"seg_040_week_0_slice_{i}.nii.gz"
        write_nifti(data / "keras_slices_seg_test" / name, labels)
    flags = ["--data", str(data), "--runs-dir", str(tmp_path), *small, "--epochs", "2"]
    for name in ("a<b>&c", "other"):
        assert train.main([*flags, "--name", name]) == 0
    run = tmp_path / "a<b>&c"
    assert predict.main(["--run", str(run), "--html", "--device", "cpu"]) == 0
    return run, tmp_path / "other"


class Page(html.parser.HTMLParser):
    """The tags, texts and addresses of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.texts = []
        self.addresses = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_pages_are_complete_self_contained_and_escaped(runs, tmp_path):
    evaluated, other = runs
    page = Page(evaluated / "report.html")
    text = " ".join(page.texts)
    for section in SECTIONS:
        assert section in page.texts, section
    assert "not created yet" not in text
    assert page.tags.count("img") == 5
    assert all(address.startswith("data:") for address in page.addresses)
    assert "a<b>&c" in text
    assert "b" not in page.tags  # the name is text
    scores = json.loads((evaluated / "test" / "metrics.json").read_text())
    assert f"{scores['ssim']['mean']:.4g}" in page.texts
    assert f"{scores['organs']['bone']['psnr']['mean']:.4g}" in page.texts

    page = Page(other / "report.html")
    assert "--html" in " ".join(page.texts)  # the command that evaluates it
    assert "Scores, test" not in page.texts

    path = tmp_path / "new" / "compare.html"
    assert report.main([str(evaluated), str(other), "-o", str(path)]) == 0
    page = Page(path)
    assert page.tags.count("img") == 1
    for cell in ("a<b>&c", "other", "0.25", "2", "not evaluated"):
        assert cell in page.texts


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json; expected the folder of a run"):
        report.main([str(tmp_path)])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_page_without_an_error(runs, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'browser'}"]
    command.append((runs[0] / "report.html").resolve().as_uri())
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for section in SECTIONS:
        assert f"<h2>{section}</h2>" in result.stdout
    assert not re.findall(r".*CONSOLE.*", result.stderr)
