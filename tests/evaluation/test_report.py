"""The page of a run, and the comparison of several: complete, self-contained, escaped, and fine in a browser."""

import html.parser
import json
import re
import shutil
import signal
import subprocess

import nibabel as nib
import numpy as np
import pytest

import predict
import train
from evaluation import report
from utils import UserError

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, the first one evaluated; with segmentations, and a name that looks like a tag."""
    root, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    labels = np.zeros((256, 128), np.uint8)
    labels[50:90, 40:80] = 2
    for split, case in (("train", 4), ("validate", 36), ("test", 40)):
        for kind, name in (("", "case"), ("seg_", "seg")):
            folder = root / "data" / f"keras_slices_{kind}{split}"
            folder.mkdir(parents=True)
            for i in range(4):
                image = labels if kind else rng.integers(0, 900, (256, 128)).astype(np.int16)
                nib.Nifti1Image(image, np.eye(4)).to_filename(
                    folder / f"{name}_{case:03d}_week_0_slice_{i}.nii.gz"
                )
    model = "--hidden-channels 8 --residual-channels 4 --embedding-dim 4 --num-embeddings 16 --num-code-layers 1"
    flags = f"--runs-dir {root} --data {root}/data --cache-dir {root}/cache {model} --batch-size 4 --device cpu --epochs 2"
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    for name in ("a<b>&c", "other"):
        assert train.main([*flags.split(), "--device", "cpu", "--name", name]) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    assert predict.main(["--run", str(root / "a<b>&c"), "--html", "--device", "cpu"]) == 0
    return root / "a<b>&c", root / "other"


class Reader(html.parser.HTMLParser):
    """What a page consists of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


SECTIONS = [
    "Configuration",
    "Curves",
    "Panels",
    "Scores, test",
    "By organ, test",
    "Code use, test",
    "Worst slices, test",
]


def test_the_page_has_every_section_and_needs_nothing_else(runs):
    page = Reader((runs[0] / "report.html").read_text("utf-8"))
    text = " ".join(page.texts)
    for section in SECTIONS:
        assert section in page.texts, section
    assert "not made yet" not in text and page.tags.count("img") == 5
    assert all(address.startswith("data:") for address in page.addresses)
    assert "a<b>&c" in text and "b" not in page.tags  # the name is text
    scores = json.loads((runs[0] / "test" / "metrics.json").read_text())
    for value in (scores["ssim"]["mean"], scores["organs"]["bone"]["psnr"]["mean"]):
        assert f"{value:.4g}" in page.texts


def test_a_run_without_scores_says_how_to_get_them(runs):
    page = Reader((runs[1] / "report.html").read_text("utf-8"))
    assert "--html" in " ".join(page.texts) and "Scores, test" not in page.texts


def test_several_runs_side_by_side(runs, tmp_path):
    assert report.main([*map(str, runs), "-o", str(tmp_path / "new" / "compare.html")]) == 0
    page = Reader((tmp_path / "new" / "compare.html").read_text("utf-8"))
    assert page.tags.count("img") == 1 and "not evaluated" in page.texts
    for cell in ("a<b>&c", "other", "0.25", "2"):
        assert cell in page.texts
    with pytest.raises(UserError, match="is no run of train"):
        report.main([str(tmp_path)])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_without_an_error(runs, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={tmp_path}", (runs[0] / "report.html").resolve().as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for section in SECTIONS:
        assert f"<h2>{section}</h2>" in shown.stdout
    assert not re.findall(r".*CONSOLE.*", shown.stderr)
