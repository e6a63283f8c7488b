"""The sample data: layout, determinism, anatomy, and contrast.

pytest tests/test_phantom.py
"""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mri import phantom

VOLUMES, SLICES = (2, 1, 1), 3


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "set"
    return phantom.write_phantom(out, VOLUMES, SLICES, workers=1, progress=False)


@pytest.fixture(scope="module")
def scan():
    """Noisy image, noise-free image and labels of one scan, 12 slices of it."""
    noisy, labels = phantom.make_volume(5, 0, 12)
    return noisy, phantom.make_volume(5, 0, 12, noise=False)[0], labels


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def unit(image: np.ndarray) -> np.ndarray:
    return (image - image.min()) / np.ptp(image).astype(float)


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, phantom.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# --- determinism --------------------------------------------------------------------------------------------


def test_the_number_of_workers_changes_no_byte(sample, tmp_path):
    again = phantom.write_phantom(tmp_path / "two", VOLUMES, SLICES, workers=2, progress=False)
    assert contents(again) == contents(sample)


def test_a_volume_does_not_depend_on_the_other_volumes(sample):
    image, _ = phantom.make_volume(36, 0, SLICES)
    for i in range(SLICES):
        stored = nib.load(sample / f"keras_slices_validate/case_036_week_0_slice_{i}.nii.gz")
        assert np.array_equal(np.asarray(stored.dataobj), image[..., i])


def test_a_slice_does_not_depend_on_how_many_are_taken():
    assert phantom.plane_numbers(60).tolist() == list(range(60))
    shared = np.isin(phantom.plane_numbers(20), phantom.plane_numbers(4))
    assert shared.sum() == 4
    few, many = phantom.make_volume(4, 0, 4)[0], phantom.make_volume(4, 0, 20)[0]
    assert np.array_equal(few, many[..., shared])


@pytest.mark.parametrize("other", [{"case": 5}, {"week": 1}, {"seed": 1}])
def test_cases_weeks_and_seeds_differ(other):
    base = {"case": 4, "week": 0, "seed": 0, "slices": 1, "noise": False}
    a, b = (phantom.make_volume(**kwargs) for kwargs in (base, base | other))
    assert (a[1] != b[1]).mean() > 0.01  # other shapes, not only another grain
    assert np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1] < 0.99


def test_a_patient_stays_the_same_from_week_to_week():
    first, second = (phantom.Scan(0, 4, week, 1, 128) for week in (0, 1))
    other = phantom.Scan(0, 5, 0, 1, 128)
    assert (first.size, first.fat, first.prostate) == (second.size, second.fat, second.prostate)
    assert first.bladder != second.bladder
    assert first.fat != other.fat


def test_every_use_of_random_numbers_has_its_own():
    # SeedSequence pads with zeros: [seed, case] and [seed, case, 0] would be one stream
    scans = [phantom.Scan(0, 4, week, 1, 128) for week in (0, 1)]
    draws = [scan.random(stream).random() for scan in scans for stream in phantom.STREAMS]
    draws += [scan.random("noise", plane).random() for scan in scans for plane in (0, 1)]
    assert len(set(draws)) == len(draws) - len(phantom.PATIENT_STREAMS)


# --- layout -------------------------------------------------------------------------------------------------


def test_layout_and_names(sample):
    cases = {
        "train": ["004_week_0", "005_week_0"],
        "validate": ["036_week_0"],
        "test": ["040_week_0"],
    }
    expected = {
        f"keras_slices_{kind}{split}/{prefix}_{volume}_slice_{i}.nii.gz"
        for split, volumes in cases.items()
        for kind, prefix in (("", "case"), ("seg_", "seg"))
        for volume in volumes
        for i in range(SLICES)
    }
    assert set(contents(sample)) == expected
    assert [p.name for p in sample.parent.iterdir()] == ["set"]  # nothing temporary stays


def test_files(sample):
    wide = set()
    for path in sample.glob("keras_slices_[tv]*/*.nii.gz"):
        mask = nib.load(
            str(path).replace("keras_slices_", "keras_slices_seg_").replace("case_", "seg_")
        )
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16 and mask.get_data_dtype() == np.uint8
        assert image.shape == mask.shape
        assert set(np.unique(np.asarray(mask.dataobj))) <= set(range(6))
        for nifti in (image, mask):
            assert nifti.header.get_zooms() == pytest.approx((1.68, 1.56))
            assert nib.affines.voxel_sizes(nifti.affine) == pytest.approx((1.68, 1.56, 1.68))
            assert nib.aff2axcodes(nifti.affine) == ("R", "S", "A")
        assert image.shape in {(256, 128), (256, 144)}
        if image.shape == (256, 144):
            wide.add(path.name[:15])
    assert wide == {"case_005_week_0"}  # one training volume


def test_slices_lie_one_behind_the_other(sample):
    paths = [sample / f"keras_slices_test/case_040_week_0_slice_{i}.nii.gz" for i in range(SLICES)]
    depths = [nib.load(path).affine[1, 3] for path in paths]
    assert np.diff(depths) == pytest.approx(20 * 1.68)  # 3 of 60 planes, to anterior


def test_wide_slices_show_more_and_are_not_squeezed():
    # The same scan, 8 columns more at either end: the anatomy of the middle stays where it is.
    narrow, wide = (phantom.make_volume(5, 0, 2, columns, noise=False)[1] for columns in (128, 144))
    assert np.array_equal(wide[:, 8:-8], narrow)


@pytest.mark.parametrize(
    "volumes, patients",
    [((191, 11, 9), (32, 4, 3)), ((12, 2, 2), (8, 2, 2)), ((1, 1, 1), (1, 1, 1))],
)
def test_splits_share_no_patient(volumes, patients):
    jobs = phantom.plan(volumes)
    cases = {split: {job[1] for job in jobs if job[0] == split} for split in phantom.CASES}
    assert tuple(len(c) for c in cases.values()) == patients
    assert sum(patients) == len(set.union(*cases.values()))
    assert len({job[1:3] for job in jobs}) == len(jobs) == sum(volumes)
    assert [job[3] for job in jobs].count(144) == (volumes[0] > 1)


# --- anatomy and contrast -----------------------------------------------------------------------------------


def test_all_organs_are_there_and_of_sensible_size(scan):
    labels = scan[2]
    millilitres = np.bincount(labels.ravel(), minlength=6) * (
        1.68 * 1.56 * 8.4 / 1000
    )  # of 5 planes each
    bounds = {"BONE": (400, 2500), "BLADDER": (30, 350), "RECTUM": (20, 250), "PROSTATE": (15, 100)}
    for label, (low, high) in bounds.items():
        assert low < millilitres[getattr(phantom, label)] < high, label


def test_organs_lie_where_they_should(scan):
    labels = scan[2]
    row, column, plane = (
        {k: np.nonzero(labels == k)[axis].mean() for k in range(2, 6)} for axis in range(3)
    )
    assert (
        column[phantom.BLADDER] > column[phantom.PROSTATE] + 15
    )  # the prostate is below the bladder,
    assert plane[phantom.RECTUM] < plane[phantom.PROSTATE] - 1.5  # the rectum behind it,
    for organ in (phantom.BLADDER, phantom.PROSTATE, phantom.RECTUM):
        assert abs(row[organ] - 127.5) < 14  # and all of them near the midline
    assert (labels[:20] == phantom.BACKGROUND).mean() > 0.3 and (labels[20:230] > 0).mean() > 0.85


def test_contrast(scan):
    image, _, labels = scan
    mean = [image[labels == k].mean() for k in range(6)]
    assert mean[phantom.BACKGROUND] < 0.1 * mean[phantom.BODY]
    assert mean[phantom.BLADDER] > 2 * mean[phantom.BODY]
    assert mean[phantom.PROSTATE] < mean[phantom.BLADDER]


def test_intensities_are_skewed_as_in_hipmri():
    # HipMRI's slices, scaled to [0, 1]: median 0.14, mean 0.18, 99th percentile 0.86.
    images = [phantom.make_volume(case, 0, 3)[0] for case in (4, 8, 36, 40)]
    slices = [unit(image[..., i]) for image in images for i in range(3)]
    assert 0.10 < np.mean([np.median(s) for s in slices]) < 0.19
    assert 0.14 < np.mean([s.mean() for s in slices]) < 0.24
    assert 0.78 < np.mean([np.percentile(s, 99) for s in slices]) < 0.94


def test_fine_texture_inside_the_body(scan):
    # Without it, SSIM would only tell how well edges are kept. It is what a 3 x 3 mean removes.
    _, clean, labels = scan
    image = unit(clean[..., 6])
    smooth = sum(np.roll(image, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    flat = labels[..., 6]
    around = [np.roll(flat, (i, j), (0, 1)) for i in (-2, 0, 2) for j in (-2, 0, 2)]
    inside = np.all([neighbour == flat for neighbour in around], axis=0)
    for tissue in (phantom.BODY, phantom.BONE, phantom.PROSTATE):
        where = inside & (flat == tissue)
        assert where.sum() > 100
        assert (image - smooth)[where].std() > 0.008
    assert image[inside & (flat == phantom.BACKGROUND)].max() < 0.01  # there is none in the air


def test_noise_is_all_that_noise_adds(scan):
    noisy, clean, labels = scan
    parameters = phantom.Scan(0, 5, 0, 1, 128)
    bright = labels == phantom.BLADDER
    difference = (noisy.astype(float) - clean)[bright]
    assert difference.std() == pytest.approx(parameters.sigma * parameters.scale, rel=0.15)
    assert abs(difference.mean()) < 0.2 * difference.std()


# --- errors of the person's making --------------------------------------------------------------------------


def test_it_does_not_overwrite(sample):
    before = contents(sample)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        phantom.write_phantom(sample, VOLUMES, SLICES, progress=False)
    assert contents(sample) == before


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(phantom, "write_volume", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.write_phantom(tmp_path / "set", (1, 1, 1), 1, workers=1, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--volumes", 0, 1, 1], "volumes"),
        (["--slices", -3], "slices"),
        (["--slices", 61], "60"),
        (["--seed", -1], "seed"),
        (["--slices", "many"], "invalid int value"),
        (["--out", __file__], "exists"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        phantom.main(["--out", str(tmp_path / "set"), *map(str, arguments)])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.count("\n") == 1 and message in printed.err and not printed.out
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    done = run("--out", tmp_path / "set", "--volumes", 1, 1, 1, "--slices", 1)
    assert done.returncode == 0, done.stderr
    assert "3 slices of 3 volumes" in done.stdout
    assert len(contents(tmp_path / "set")) == 6
    again = run("--out", tmp_path / "set")
    assert (
        again.returncode == 2 and "Traceback" not in again.stderr and again.stderr.count("\n") == 1
    )
