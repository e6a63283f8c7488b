"""Test the sample data: determinism, layout, anatomy, contrast, and the errors of its command."""

import itertools
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import dataset
from mri import files, hipmri, phantom

ROOT = Path(__file__).parents[2]
VOLUMES = (2, 1, 1)
SLICES = 3


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "set"
    return phantom.write_phantom(out, VOLUMES, SLICES, workers=1, progress=False)


@pytest.fixture(scope="module")
def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the noisy image, the noise-free image and the labels of 12 slices of one scan."""
    noisy, labels = phantom.make_volume(5, 0, 12)
    clean, _ = phantom.make_volume(5, 0, 12, noise=False)
    return noisy, clean, labels


def contents(folder: Path) -> dict[str, bytes]:
    """Return relative path -> bytes of all files in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def scale_to_unit(image: np.ndarray) -> np.ndarray:
    """Scale an image to [0, 1]."""
    return (image - image.min()) / np.ptp(image).astype(float)


def run_command(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mri.phantom", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------- determinism


def test_the_number_of_workers_does_not_change_the_files(sample, tmp_path):
    other = phantom.write_phantom(tmp_path / "two", VOLUMES, SLICES, workers=2, progress=False)
    assert contents(other) == contents(sample)


def test_a_volume_does_not_depend_on_the_other_volumes(sample):
    image, _ = phantom.make_volume(36, 0, SLICES)
    for i in range(SLICES):
        stored = nib.load(sample / f"keras_slices_validate/case_036_week_0_slice_{i}.nii.gz")
        assert np.array_equal(np.asarray(stored.dataobj), image[..., i])


def test_a_slice_does_not_depend_on_the_number_of_slices():
    assert phantom.plane_numbers(60).tolist() == list(range(60))
    common = np.isin(phantom.plane_numbers(20), phantom.plane_numbers(4))
    assert common.sum() == 4
    few, _ = phantom.make_volume(4, 0, 4)
    many, _ = phantom.make_volume(4, 0, 20)
    assert np.array_equal(few, many[..., common])


@pytest.mark.parametrize("change", [{"case": 5}, {"week": 1}, {"seed": 1}])
def test_cases_weeks_and_seeds_differ(change):
    arguments = {"case": 4, "week": 0, "seed": 0, "slices": 1, "noise": False}
    image, labels = phantom.make_volume(**arguments)
    other_image, other_labels = phantom.make_volume(**arguments | change)
    assert (labels != other_labels).mean() > 0.01  # the shapes differ, not only the texture
    assert np.corrcoef(image.ravel(), other_image.ravel())[0, 1] < 0.99


def test_the_anatomy_of_a_patient_is_the_same_every_week():
    first = phantom.PhantomScan(0, 4, 0, 1, 128)
    second = phantom.PhantomScan(0, 4, 1, 1, 128)
    other_patient = phantom.PhantomScan(0, 5, 0, 1, 128)
    for name in ("size", "fat", "prostate"):
        assert getattr(first, name) == getattr(second, name)
    assert first.bladder != second.bladder
    assert first.fat != other_patient.fat


def test_each_purpose_has_its_own_random_numbers():
    # SeedSequence pads with zeros, so [seed, case] and [seed, case, 0] would be the same stream.
    draws = []
    for week in (0, 1):
        scan = phantom.PhantomScan(0, 4, week, 1, 128)
        draws += [scan.random(stream).random() for stream in phantom.STREAMS]
        draws += [scan.random("noise", plane).random() for plane in (0, 1)]
    assert len(set(draws)) == len(draws) - len(phantom.PATIENT_STREAMS)


# ---------------------------------------------------------------- layout


def test_folders_and_names_are_those_of_hipmri(sample):
    volumes = {
        "train": ["004_week_0", "005_week_0"],
        "validate": ["036_week_0"],
        "test": ["040_week_0"],
    }
    expected = set()
    for split, names in volumes.items():
        for name in names:
            for i in range(SLICES):
                expected.add(f"keras_slices_{split}/case_{name}_slice_{i}.nii.gz")
                expected.add(f"keras_slices_seg_{split}/seg_{name}_slice_{i}.nii.gz")
    assert set(contents(sample)) == expected
    assert [path.name for path in sample.parent.iterdir()] == ["set"]  # no temporary folder is left


def test_data_types_shapes_and_affines_of_files(sample):
    wide_volumes = set()
    for path in sample.glob("keras_slices_[tv]*/*.nii.gz"):
        mask_folder = path.parent.name.replace("keras_slices_", "keras_slices_seg_")
        mask = nib.load(sample / mask_folder / path.name.replace("case_", "seg_"))
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert mask.get_data_dtype() == np.uint8
        assert image.shape == mask.shape
        assert set(np.unique(np.asarray(mask.dataobj))) <= set(range(6))
        for nifti in (image, mask):
            assert nifti.header.get_zooms() == pytest.approx((1.68, 1.56))
            assert nib.affines.voxel_sizes(nifti.affine) == pytest.approx((1.68, 1.56, 1.68))
            assert nib.aff2axcodes(nifti.affine) == ("R", "S", "A")
        assert image.shape in {(256, 128), (256, 144)}
        if image.shape == (256, 144):
            wide_volumes.add(path.name.split("_slice")[0])
    assert wide_volumes == {"case_005_week_0"}  # one training volume


def test_affines_place_slices_from_back_to_front(sample):
    paths = [sample / f"keras_slices_test/case_040_week_0_slice_{i}.nii.gz" for i in range(SLICES)]
    depths = [nib.load(path).affine[1, 3] for path in paths]
    assert np.diff(depths) == pytest.approx(20 * 1.68)  # 3 of 60 planes, to anterior


def test_wide_slices_show_more_at_the_same_scale():
    _, narrow = phantom.make_volume(5, 0, 2, 128, noise=False)
    _, wide = phantom.make_volume(5, 0, 2, 144, noise=False)
    assert np.array_equal(wide[:, 8:-8], narrow)


@pytest.mark.parametrize(
    "volumes, patients",
    [((191, 11, 9), (32, 4, 3)), ((12, 2, 2), (8, 2, 2)), ((1, 1, 1), (1, 1, 1))],
)
def test_no_patient_is_in_two_splits(volumes, patients):
    plans = phantom.plan(volumes)
    cases = {split: {p.case for p in plans if p.split == split} for split in phantom.CASES}
    assert tuple(len(c) for c in cases.values()) == patients
    assert sum(patients) == len(set.union(*cases.values()))
    assert len(plans) == sum(volumes)
    assert len({(p.case, p.week) for p in plans}) == len(plans)
    assert [p.columns for p in plans].count(144) == (volumes[0] > 1)


# ---------------------------------------------------------------- many patients


def test_each_patient_has_one_scan_and_is_in_one_split():
    plans = phantom.plan_patients((200, 40, 30))
    splits = [p.split for p in plans]
    assert {split: splits.count(split) for split in phantom.CASES} == {
        "train": 200,
        "validate": 40,
        "test": 30,
    }
    assert {p.week for p in plans} == {0}
    assert len({p.case for p in plans}) == 270
    assert [p.columns for p in plans].count(144) == 1
    assert plans[199].columns == 144  # the last training volume


def test_no_patient_of_a_large_set_is_one_of_hipmris_cases():
    largest = (phantom.MAX_PATIENTS,) * 3
    cases = {p.case for p in phantom.plan_patients(largest)}
    assert len(cases) == sum(largest)
    assert cases.isdisjoint(itertools.chain(*phantom.CASES.values()))


def test_test_patients_do_not_depend_on_the_number_of_training_patients():
    few, many = phantom.plan_patients((2, 1, 2)), phantom.plan_patients((200, 40, 40))
    assert {p for p in few if p.split == "test"} < {p for p in many if p.split == "test"}


def test_patients_of_all_splits_have_different_anatomies():
    cases = (1, 4, 1001, 1002, 2001, 3001, 123456)
    masks = [phantom.make_volume(case, 0, 1, noise=False)[1] for case in cases]
    for one, other in itertools.combinations(masks, 2):
        assert (one != other).mean() > 0.01


def test_slices_of_many_patients_load_in_their_splits(tmp_path):
    counts = {"train": 3, "validate": 2, "test": 2}
    root = phantom.write_phantom(
        tmp_path / "set", slices=2, workers=1, progress=False, patients=tuple(counts.values())
    )
    source = hipmri.find_hipmri(root)
    assert not [note for note in source.notes if "warning" in note]
    cases = {}
    for split, count in counts.items():
        slices = dataset.load_split(source, split, cache_dir=tmp_path / "cache", progress=False)
        assert len(slices) == 2 * count
        cases[split] = {name.case for name in slices.names}
        assert len(cases[split]) == count
        for image in slices.files:
            mask = nib.load(files.find_segmentation(image))
            assert mask.shape == nib.load(image).shape
    assert cases["train"] == {"1001", "1002", "1003"}
    assert len(set.union(*cases.values())) == sum(counts.values())


def test_the_command_counts_the_scans_of_patients(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phantom.os, "cpu_count", lambda: 1)
    out = tmp_path / "set"
    phantom.main(["--out", str(out), "--patients", "2", "1", "1", "--slices", "1"])
    assert "4 slices of 4 volumes" in capsys.readouterr().out
    assert len(contents(out)) == 8


# ---------------------------------------------------------------- anatomy and contrast


def test_all_organs_have_a_plausible_volume(scan):
    labels = scan[2]
    voxel = 1.68 * 1.56 * (5 * 1.68) / 1000  # ml; each of the 12 slices stands for 5 planes
    millilitres = np.bincount(labels.ravel(), minlength=6) * voxel
    assert 400 < millilitres[phantom.BONE] < 2500
    assert 30 < millilitres[phantom.BLADDER] < 350
    assert 20 < millilitres[phantom.RECTUM] < 250
    assert 15 < millilitres[phantom.PROSTATE] < 100


def test_organs_are_in_the_right_place(scan):
    labels = scan[2]
    rows, columns, planes = {}, {}, {}
    for organ in (phantom.BLADDER, phantom.PROSTATE, phantom.RECTUM):
        voxels = np.nonzero(labels == organ)
        rows[organ], columns[organ], planes[organ] = (axis.mean() for axis in voxels)
        assert abs(rows[organ] - 127.5) < 14  # near the midline
    # The prostate is below the bladder and in front of the rectum.
    assert columns[phantom.BLADDER] > columns[phantom.PROSTATE] + 15
    assert planes[phantom.RECTUM] < planes[phantom.PROSTATE] - 1.5
    # The body is in rows 20 to 230.
    assert (labels[:20] == phantom.BACKGROUND).mean() > 0.3
    assert (labels[20:230] > 0).mean() > 0.85


def test_tissues_have_t2_contrast(scan):
    image, _, labels = scan
    mean = [image[labels == k].mean() for k in range(6)]
    assert mean[phantom.BACKGROUND] < 0.1 * mean[phantom.BODY]
    assert mean[phantom.BLADDER] > 2 * mean[phantom.BODY]
    assert mean[phantom.PROSTATE] < mean[phantom.BLADDER]


def test_intensities_are_skewed_as_in_hipmri():
    # HipMRI's slices, scaled to [0, 1]: median 0.14, mean 0.18, 99th percentile 0.86.
    slices = []
    for case in (4, 8, 36, 40):
        image, _ = phantom.make_volume(case, 0, 3)
        slices += [scale_to_unit(image[..., i]) for i in range(3)]
    assert 0.10 < np.mean([np.median(s) for s in slices]) < 0.19
    assert 0.14 < np.mean([s.mean() for s in slices]) < 0.24
    assert 0.78 < np.mean([np.percentile(s, 99) for s in slices]) < 0.94


def test_tissues_have_fine_texture(scan):
    # Without texture, SSIM would only measure how well edges are reconstructed.
    _, clean, labels = scan
    image = scale_to_unit(clean[..., 6])
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    smooth = sum(np.roll(image, shift, (0, 1)) for shift in shifts) / 9
    texture = image - smooth  # what a 3 x 3 mean removes
    tissue = labels[..., 6]
    inside = np.ones(tissue.shape, dtype=bool)  # at least two voxels from other tissues
    for i, j in shifts:
        inside &= np.roll(tissue, (2 * i, 2 * j), (0, 1)) == tissue
    for label in (phantom.BODY, phantom.BONE, phantom.PROSTATE):
        mask = inside & (tissue == label)
        assert mask.sum() > 100
        assert texture[mask].std() > 0.008
    assert image[inside & (tissue == phantom.BACKGROUND)].max() < 0.01  # air has none


def test_noise_has_the_standard_deviation_of_the_scan(scan):
    noisy, clean, labels = scan
    parameters = phantom.PhantomScan(0, 5, 0, 1, 128)
    difference = (noisy.astype(float) - clean)[labels == phantom.BLADDER]
    assert difference.std() == pytest.approx(parameters.sigma * parameters.scale, rel=0.15)
    assert abs(difference.mean()) < 0.2 * difference.std()


# ---------------------------------------------------------------- errors


def test_an_existing_data_set_is_not_overwritten(sample):
    before = contents(sample)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        phantom.write_phantom(sample, VOLUMES, SLICES, progress=False)
    assert contents(sample) == before


def test_a_failed_run_leaves_no_files(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(phantom, "write_volume", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.write_phantom(tmp_path / "set", (1, 1, 1), 1, workers=1, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--volumes", 0, 1, 1], "volumes are 0 1 1"),
        (["--patients", 3, 0, 1], "patients are 3 0 1"),
        (["--patients", 1000, 1, 1], "expected three numbers of 1 to 999"),
        (["--volumes", 12, 2, 2, "--patients", 3, 1, 1], "volumes and patients cannot be combined"),
        (["--slices", -3], "slices are -3"),
        (["--slices", 61], "expected 1 to 60"),
        (["--seed", -1], "seed is -1"),
        (["--slices", "many"], "invalid int value"),
        (["--out", __file__], "exists"),
    ],
)
def test_wrong_arguments_give_one_line_and_exit_code_2(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        phantom.main(["--out", str(tmp_path / "set"), *map(str, arguments)])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_data_set_and_never_overwrites_it(tmp_path):
    process = run_command("--out", tmp_path / "set", "--volumes", 1, 1, 1, "--slices", 1)
    assert process.returncode == 0, process.stderr
    assert "3 slices of 3 volumes" in process.stdout
    assert len(contents(tmp_path / "set")) == 6
    process = run_command("--out", tmp_path / "set")
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert process.stderr.count("\n") == 1
