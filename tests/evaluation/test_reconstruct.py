"""A person's own files: they come back as they were, at their own size; codes out and in; organs; odd ones."""

import csv
import gzip
import io
import json
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch

import dataset
import predict
import train
import utils
from evaluation import reconstruct
from evaluation.metrics import ORGANS, organ_scores, slice_scores
from modules import VQVAE
from mri import hipmri, nifti, splits
from mri.files import find_segmentation, is_segmentation
from training.checkpoint import load_model, write_checkpoint
from training.run_folder import load_run_data, read_manifest
from utils import UserError

AFFINE = np.array([[1.7, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a best.pt of a small, untrained model, whose training slices had voxels of 1.7 x 2 mm."""
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=16, embedding_dim=4)
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    slices = {"size": [256, 128], "spacing": [1.7, 2.0], "axis": "coronal"}
    kept = {
        "format": 3,
        "model_args": model.arguments,
        "model": model.state_dict(),
        "slices": slices,
    }
    write_checkpoint(folder / "best.pt", kept)
    return folder


@pytest.fixture
def reconstruct(run, tmp_path):
    """reconstruct(path, "--flags") -> output folder."""

    def reconstruct(path, flags="", out="out"):
        command = [
            str(path),
            "-o",
            str(tmp_path / out),
            "--run",
            str(run),
            "--device",
            "cpu",
            *flags.split(),
        ]
        assert predict.main(command) == 0
        return tmp_path / out

    return reconstruct


def volume(shape=(20, 24, 28), dtype=np.int16):
    return np.random.default_rng(0).integers(0, 900, shape).astype(dtype)


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"] = b"DOE^JANE"
    path.write_bytes(gzip.compress(image.to_bytes()))
    return path


def rows_of(folder):
    with open(folder / "scores.csv") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- files as slices, and back


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIR", "ASL"])
@pytest.mark.parametrize("axis", ["sagittal", "coronal", "axial", 0, 1, 2])
def test_a_volume_comes_back_whatever_way_it_is_stored_and_cut(tmp_path, codes, axis):
    straight = nib.Nifti1Image(volume(), AFFINE)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    stored = straight.as_reoriented(turn)
    (tmp_path / "x.nii").write_bytes(stored.to_bytes())
    scan = nifti.read_scan(tmp_path / "x.nii", axis)
    if isinstance(axis, str):  # whatever way it is stored, the planes are the same
        np.testing.assert_array_equal(scan.planes, np.moveaxis(volume(), nifti.AXES[axis], 0))
        sizes = np.delete([1.7, 1.5, 2.0], nifti.AXES[axis])
        np.testing.assert_allclose(scan.spacing, sizes)
    else:
        np.testing.assert_array_equal(scan.planes, np.moveaxis(np.asarray(stored.dataobj), axis, 0))
    assert scan.cut_axis == axis
    assert nifti.planes_shape(nifti.read_header(tmp_path / "x.nii"), axis) == scan.planes.shape
    (tmp_path / "y.nii.gz").write_bytes(scan.to_bytes(scan.planes + 0.3))
    back = nib.load(tmp_path / "y.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(stored.dataobj))
    np.testing.assert_allclose(back.affine, stored.affine, atol=1e-5)
    assert back.get_data_dtype() == np.int16


@pytest.mark.parametrize(("array", "kind"), [
    (volume((30, 20)), np.int16), (volume((30, 20, 1), np.uint8), np.uint8), (volume((30, 20), np.float64), np.float32),
    (volume((9, 20, 30), ">i2"), np.int16), (volume((9, 20, 30, 1, 1)), np.int16),
])  # fmt: skip
def test_shape_affine_and_kind_of_number_stay(tmp_path, reconstruct, array, kind):
    folder = reconstruct(write(tmp_path / "a" / "scan.nii.gz", array))
    back = nib.load(folder / "scan_reconstruction.nii.gz")
    assert back.shape == array.shape and back.get_data_dtype() == kind
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-5)
    assert back.header["descrip"].item() == b"" and (folder / "scan.png").stat().st_size > 5000


def test_slices_are_padded_not_resampled(tmp_path, run):
    """What comes back of 30 x 21 is the model's own output on the padded slice, cut back."""
    array = volume((30, 21)).astype(np.float32)
    model = load_model(VQVAE, run / "best.pt")
    coded = reconstruct.encode_planes(model, array[None])
    assert coded.codes.shape == (1, 8, 6) and coded.codes.dtype == np.uint16
    zscored = torch.from_numpy((array - array.mean()) / array.std())[None, None]
    padded = torch.nn.functional.pad(zscored, (0, 3, 0, 2), mode="replicate")
    with torch.no_grad():
        expected = model(padded).reconstruction[0, 0, :30, :21] * array.std() + array.mean()
    np.testing.assert_allclose(
        reconstruct.decode_planes(model, coded)[0], expected, rtol=1e-4, atol=1e-2
    )


def test_resizing_is_only_done_when_asked_for(tmp_path, reconstruct):
    path = write(tmp_path / "scan.nii.gz", volume((40, 30)))
    row = rows_of(reconstruct(path))[0]
    assert int(row["code_bytes"]) == 10 * 8 * 4 // 8 + 8  # 16 codes are 4 bits, and two float32
    row = rows_of(reconstruct(path, "--resize --export-codes", "resized"))[0]
    assert int(row["code_bytes"]) == 64 * 32 * 4 // 8 + 8
    assert nib.load(tmp_path / "resized" / "scan_reconstruction.nii.gz").shape == (40, 30)


def test_empty_slices_come_back_exactly(tmp_path, reconstruct):
    array = volume((20, 6, 28))
    array[:, 2:4] = [[0], [7]]
    folder = reconstruct(write(tmp_path / "scan.nii.gz", array))
    back = np.asarray(nib.load(folder / "scan_reconstruction.nii.gz").dataobj)
    np.testing.assert_array_equal(back[:, 2:4], array[:, 2:4])
    assert rows_of(folder)[0]["ssim"] != ""


def test_scores_are_those_of_the_slices(tmp_path, reconstruct):
    array = volume((40, 5, 32))
    folder = reconstruct(write(tmp_path / "scan.nii.gz", array), "--error-map")
    back = np.asarray(nib.load(folder / "scan_reconstruction.nii.gz").dataobj)
    pair = [
        torch.from_numpy(np.moveaxis(x, 1, 0).astype(np.float32))[:, None] for x in (array, back)
    ]
    found, row = slice_scores(*pair), rows_of(folder)[0]
    for name in ("ssim", "ssim_body", "psnr"):
        assert float(row[name]) == pytest.approx(
            float(found[name].mean()), abs=0.02
        )  # it was rounded to int16
    error = np.asarray(nib.load(folder / "scan_error.nii.gz").dataobj)
    assert np.abs(error - np.abs(back - array)).max() <= 1
    assert float(row["bits_per_pixel"]) == pytest.approx(
        (5 * 10 * 8 * 4 + 5 * 64) / array.size, abs=1e-5
    )


def test_odd_voxels_are_told(tmp_path, reconstruct, capsys):
    reconstruct(write(tmp_path / "same.nii.gz", volume((30, 9, 30))))
    assert "warning" not in capsys.readouterr().out
    reconstruct(write(tmp_path / "fine.nii.gz", volume((30, 9, 30)), np.diag([0.5, 1, 0.5, 1])))
    assert (
        "its voxels are 0.50 x 0.50 mm in the slice, the model is for about 1.70 x 2.00"
        in capsys.readouterr().out
    )


# ---------------------------------------------------------------- files and folders


def test_folders_bad_files_and_equal_names(tmp_path, run, capsys):
    for place in ("a", "b/c"):
        write(tmp_path / "in" / place / "scan.nii.gz", volume((30, 20)))
    write(tmp_path / "in" / "keras_slices_seg_test" / "seg_004.nii.gz", volume((30, 20)))
    write(tmp_path / "in" / ".hidden" / "scan.nii.gz", volume((30, 20)))
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"text")
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"(?s)1 of 3 files can't be used:.*bad\.nii\.gz is not a NIfTI file"
    ):
        predict.main([str(tmp_path / "in"), "-o", str(out), "--run", str(run), "--device", "cpu"])
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [
        "scan_2_reconstruction.nii.gz", "scan_reconstruction.nii.gz",
    ]  # fmt: skip
    assert [row["file"] for row in rows_of(out)] == ["scan", "scan_2"]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize(("command", "message"), [
    (["nowhere.nii", "-o", "out"], "there is no nowhere.nii"),
    ([".", "-o", "out"], "no file in . ends in"),
])  # fmt: skip
def test_paths_that_hold_nothing(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        predict.main(command)


@pytest.mark.parametrize(("command", "message"), [
    (["scan.nii"], "say with -o where"), (["--error-map"], "--error-map is for your own files"),
    (["-o", "x"], "--out is for your own files"), (["scan.nii", "-o", "x", "--html"], "--html is for a split"),
    (["scan.nii", "-o", "x", "--split", "train"], "--split is for a split"),
    (["--export", "-o", "x", "--data", "y"], "--data is for a split"),
])  # fmt: skip
def test_flags_that_belong_together(capsys, command, message):
    with pytest.raises(SystemExit):
        predict.main(command)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("flags", ["", "--resize", "--axis sagittal"])
def test_codes_out_and_in_are_exact(tmp_path, reconstruct, flags):
    path = write(tmp_path / "scan.nii.gz", volume((20, 24, 28)))
    first = reconstruct(path, f"--export-codes {flags}")
    again = reconstruct(first, "--from-codes", "again")
    name = "scan_reconstruction.nii.gz"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    row = rows_of(first)[0]
    assert int(row["npz_bytes"]) == (first / "scan_codes.npz").stat().st_size
    assert int(row["file_bytes"]) == path.stat().st_size
    with np.load(first / "scan_codes.npz") as file:
        assert file["codes"].dtype == np.uint16 and b"DOE" not in b"".join(
            file[n].tobytes() for n in file.files
        )


def test_codes_that_cannot_be_used(tmp_path, reconstruct, run):
    model = load_model(VQVAE, run / "best.pt")
    path = (
        reconstruct(write(tmp_path / "scan.nii.gz", volume((20, 24, 28))), "--export-codes")
        / "scan_codes.npz"
    )
    with np.load(path) as file:
        whole = {name: file[name] for name in file.files}

    def damaged(**changes):
        content = io.BytesIO()
        np.savez_compressed(content, **(whole | changes))
        return content.getvalue()

    other = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=16, embedding_dim=4)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("codes.npy", b"\0" * (nifti.MAX_VOXELS + 1))
    cases = {
        "is no file of --export-codes": [b"text", path.read_bytes()[:-50], damaged(shape=np.array(3))],
        "is damaged": [
            damaged(codes=whole["codes"] + 16), damaged(codes=whole["codes"][:3]), damaged(shape=[1, 2, 3]),
            damaged(size=[200, 20]), damaged(kind="c8"), damaged(axis=7), damaged(codes=whole["codes"].astype(float)),
        ],
        "has format 9": [damaged(format=9)],
        "is of the model": [damaged(model=other.fingerprint)],
        "unpacks to more": [bomb.getvalue()],
    }  # fmt: skip
    for message, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ValueError, match=message):
                reconstruct.read_codes(path, model)
    path.write_bytes(damaged(codes=np.array([Exception()], object)))
    with pytest.raises(ValueError, match="pickle"):
        reconstruct.read_codes(path, model)


# ---------------------------------------------------------------- organs


def test_organ_scores_are_of_the_organ_alone():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 64, 48, generator=generator)
    labels = torch.zeros(2, 64, 48, dtype=torch.uint8)
    labels[0, 8:40, 8:40], labels[0, 40:44, 8:12] = 2, 3  # bone; 16 pixels of bladder
    changed = images.clone()
    changed[0, 0][labels[0] == 0] += 1  # outside of all
    changed[0, 0, 20:30, 20:30] += 0.5
    scores = organ_scores(images, changed, labels)
    assert list(scores) == list(ORGANS[1:])
    std = images[0].std(correction=0)
    assert scores["bone"]["bias"][0] == pytest.approx(float(0.5 * 100 / 32**2 / std), rel=1e-4)
    span = images[0].max() - images[0].min()
    error = (((changed[0] - images[0]) / span).square()[labels[0][None] == 2]).mean()
    assert scores["bone"]["psnr"][0] == pytest.approx(
        float(-10 * error.log10()), abs=0.1
    )  # clipping aside
    assert scores["bone"]["ssim"][0] < 0.999
    for organ in ("bladder", "rectum"):  # too small; not there
        assert all(values.isnan().all() for values in scores[organ].values())
    assert scores["bone"]["psnr"][1].isnan()


def test_organs_are_reported_where_segmentations_lie_beside(tmp_path, reconstruct):
    labels = np.zeros((40, 32), np.uint8)
    labels[5:20, 5:20] = 2
    image = write(
        tmp_path / "d" / "keras_slices_test" / "case_040_week_0_slice_1.nii.gz", volume((40, 32))
    )
    write(tmp_path / "d" / "keras_slices_seg_test" / "seg_040_week_0_slice_1.nii.gz", labels)
    other = write(
        tmp_path / "d" / "keras_slices_test" / "case_041_week_0_slice_1.nii.gz", volume((40, 32))
    )
    rows = rows_of(reconstruct(image.parent))
    assert (
        rows[0]["bone_ssim"]
        and rows[0]["bone_bias"]
        and not rows[0]["prostate_ssim"]
        and not rows[1]["bone_ssim"]
    )
    assert find_segmentation(other) is None
    volume_3d = tmp_path / "v" / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz"
    mask = tmp_path / "v" / "semantic_labels_anon" / "Case_004_Week0_SEMANTIC_LFOV.nii.gz"
    write(volume_3d, volume((40, 5, 32)))
    write(mask, np.repeat(labels[:, None], 5, 1))
    assert (
        find_segmentation(volume_3d) == mask
        and is_segmentation(mask)
        and not is_segmentation(volume_3d)
    )
    assert rows_of(reconstruct(volume_3d, "", "v_out"))[0]["bone_ssim"]


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_segmentations_of_a_split_are_fitted_as_its_slices(tmp_path, fit):
    labels = np.zeros((256, 144), np.uint8)
    labels[64:192, 36:108] = 5
    for split in ("train", "validate", "test"):
        write(
            tmp_path / f"keras_slices_{split}" / "case_040_week_0_slice_1.nii.gz",
            volume((256, 144)),
        )
    write(tmp_path / "keras_slices_seg_test" / "seg_040_week_0_slice_1.nii.gz", labels)
    source = hipmri.find_hipmri(tmp_path)
    test, training = (
        dataset.load_split(source, split, fit=fit, progress=False) for split in ("test", "train")
    )
    assert training.labels() is None
    found = test.labels()
    assert found.shape == (1, 256, 128) and found.unique().tolist() == [0, 5]
    expected = {"resize": 128 * 64, "crop": 128 * 72}[fit]
    assert int((found == 5).sum()) == expected


# ---------------------------------------------------------------- which model


def test_a_trained_run_tells_what_its_slices_were(
    tmp_path, write_slices, monkeypatch, small, own_signals, capsys
):
    monkeypatch.chdir(tmp_path)
    write_slices(tmp_path / "d")
    assert train.main(["--data", "d", *small, "--epochs", "1", "--name", "a"]) == 0
    assert predict.main(["d/keras_slices_test", "-o", "out", "--device", "cpu"]) == 0
    assert "model: runs/a/best.pt" in capsys.readouterr().out
    _, slices = reconstruct.pick_model(predict.parse_arguments(["x", "-o", "y", "--device", "cpu"]))
    assert slices == {"size": [256, 128], "spacing": [1.0, 1.0], "axis": "coronal"}


def test_before_any_training_the_model_is_the_one_that_comes_along(tmp_path, monkeypatch, capsys):
    """`python predict.py scan.nii.gz -o out` on a fresh clone."""
    monkeypatch.chdir(tmp_path)
    assert reconstruct.PELVIS_MODEL.stat().st_size < 5e6
    rows, columns = np.mgrid[:200, :120] / 30
    write(tmp_path / "scan.nii.gz", (500 + 300 * np.sin(rows) * np.cos(columns)).astype(np.int16))
    assert predict.main(["scan.nii.gz", "-o", "out", "--device", "cpu"]) == 0
    assert "pelvis.pt" in capsys.readouterr().out
    assert float(rows_of(tmp_path / "out")[0]["ssim"]) > 0.9


# ---------------------------------------------------------------- training on scans of any kind


@pytest.fixture
def study(tmp_path):
    """Five subjects as BIDS has them, two scans each of 20 x 24 x 28, the outer planes empty."""
    for subject in "ABCDE":
        for session in (1, 2):
            array = volume() + 50
            array[:4] = array[:, :5] = array[..., :6] = 0
            name = f"sub-{subject}_ses-{session}_T2w.nii.gz"
            write(tmp_path / "study" / f"sub-{subject}" / f"ses-{session}" / "anat" / name, array)
    return tmp_path / "study"


def subjects(source):
    return {
        split: {source.subjects[file] for file in files} for split, files in source.splits.items()
    }


def test_subjects_are_in_one_split_each(study):
    source = splits.find_source(study, "coronal", None, 0)
    assert {split: len(files) for split, files in source.splits.items()} == {
        "train": 6,
        "validate": 2,
        "test": 2,
    }
    parts = subjects(source)
    assert set.union(*parts.values()) == set("ABCDE") and sum(map(len, parts.values())) == 5
    assert subjects(splits.find_source(study, "axial", None, 0)) == parts
    assert any(
        subjects(splits.find_source(study, "axial", None, seed)) != parts for seed in range(1, 5)
    )
    assert len(subjects(splits.find_source(study, "axial", ["0.4", "0.2", "0.4"]))["test"]) == 2
    assert "test" not in splits.find_source(study, "axial", ["0.8", "0.2", "0"]).splits


@pytest.mark.parametrize(("text", "expected"), [
    ("subject,split\nA,train\nsub-B,val\nC,test\n", {"train": {"A"}, "validate": {"B"}, "test": {"C"}}),
    ("split,file\ntrain,sub-A/ses-1/anat/sub-A_ses-1_T2w.nii.gz\nvalidate,sub-A/ses-2/anat/sub-A_ses-2_T2w.nii.gz\n",
     {"train": {"A"}, "validate": {"A"}}),
])  # fmt: skip
def test_splits_from_a_table(study, tmp_path, text, expected):
    (tmp_path / "splits.csv").write_text(text)
    assert subjects(splits.find_source(study, "axial", [str(tmp_path / "splits.csv")])) == expected


@pytest.mark.parametrize(("split", "message"), [
    (["0.8", "0.1"], "three shares"), (["0.8", "0.1", "0.2"], "add up to 1"), (["a", "b", "c"], "three shares"),
    (["0", "0.5", "0.5"], "three shares"), (["nowhere.csv"], "can't be read"),
    ("subject,split\nX,train\n", "line 2"), ("subject,split\nA,training set\n", "line 2"),
    ("subject,split\nA,train\nA,test\n", "twice"), ("a,b\n1,2\n", "line 2"),
])  # fmt: skip
def test_splits_that_cannot_be_used(study, tmp_path, split, message):
    if isinstance(split, str):
        (tmp_path / "splits.csv").write_text(split)
        split = [str(tmp_path / "splits.csv")]
    with pytest.raises(utils.DataError, match=message):
        splits.find_source(study, "axial", split)


def test_split_needs_an_axis_and_scans(tmp_path, study):
    with pytest.raises(utils.DataError, match="which --axis asks for"):
        splits.find_source(study, None, ["0.8", "0.1", "0.1"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(utils.DataError, match=r"no \.nii or \.nii\.gz file"):
        splits.find_source(tmp_path / "empty", "axial")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_subjects_are_told(study, count):
    for subject in "ABCDE"[count:]:
        for file in (study / f"sub-{subject}").rglob("*.nii.gz"):
            file.unlink()
    source = splits.find_source(study, "axial")
    assert any("scores say nothing about other people" in note for note in source.notes)
    assert source.splits["validate"] == source.splits["test"]
    assert (source.splits["train"] == source.splits["test"]) == (count == 1)


@pytest.mark.parametrize(("axis", "count", "size"), [
    ("sagittal", 16, (32, 32)), ("coronal", 19, (16, 32)), ("axial", 22, (16, 32)), ("2", 22, (16, 32)),
])  # fmt: skip
def test_scans_are_cut_and_empty_slices_left_out(study, tmp_path, axis, count, size):
    source = splits.find_source(study, axis)
    train_slices = dataset.load_split(
        source, "train", axis=axis, cache_dir=tmp_path / "cache", progress=False
    )
    assert len(train_slices) == 6 * count and train_slices.size == size
    through = int(axis) if axis == "2" else nifti.AXES[axis]
    plane = np.moveaxis(nib.load(train_slices.files[0]).get_fdata(), through, 0)[
        train_slices.names[0].slice
    ]
    resized = dataset.load_split(
        source, "train", axis=axis, size=plane.shape, cache_dir=tmp_path / "c", progress=False
    )
    expected = torch.from_numpy((plane - plane.mean()) / plane.std()).float()
    torch.testing.assert_close(resized[0][0], expected, atol=1e-3, rtol=0)
    spacing = np.delete([1.7, 1.5, 2.0], through)
    np.testing.assert_allclose(resized.description["spacing"], spacing, rtol=1e-5)


def test_a_run_with_a_table_of_splits_goes_on(study, tmp_path, monkeypatch, small, own_signals):
    (tmp_path / "splits.csv").write_text("subject,split\nA,train\nB,validate\nC,test\n")
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", "--split", "splits.csv", *small, "--name", "a"]
    assert train.main([*command, "--epochs", "1"]) == 0
    assert train.main([*command, "--epochs", "2", "--resume"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", "--runs-dir", "../runs", "--name", "a", "--epochs", "3"]) == 0


def test_slices_and_volumes_take_the_room_that_they_need(tmp_path):
    """Each file has as many rows of the cache as it has planes, whatever the deepest of them has."""
    for i in range(6):
        write(tmp_path / "mixed" / f"sub-{i}.nii.gz", volume((20, 28)) + i)
    write(tmp_path / "mixed" / "sub-3.nii.gz", volume((20, 40, 28)))
    everyone = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(6)}}
    source = splits.find_source(tmp_path / "mixed", "coronal", known=everyone)
    slices = dataset.load_split(
        source, "train", axis="coronal", size=(16, 32), cache_dir=tmp_path, progress=False
    )
    assert [name.case for name in slices.names] == ["0", "1", "2", *["3"] * 40, "4", "5"]
    assert np.load(next(tmp_path.glob("*/pixels.npy")), mmap_mode="r").shape == (45, 16, 32)
    means = [volume((20, 28)).mean() + i for i in (0, 1, 2, 4, 5)]
    np.testing.assert_allclose(slices.mean[[0, 1, 2, 43, 44]], means, atol=5)
    np.testing.assert_allclose(slices.mean[3:43], volume((20, 40, 28)).mean((0, 2)), atol=15)


def test_a_file_that_grows_while_it_is_read_takes_no_other_files_rows(tmp_path, monkeypatch):
    for i in range(3):
        write(tmp_path / "study" / f"sub-{i}.nii.gz", volume())
    everyone = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(3)}}
    source = splits.find_source(tmp_path / "study", "coronal", known=everyone)
    real = nifti.read_header
    write(tmp_path / "before.nii.gz", volume((20, 5, 28)))
    names = {"sub-1.nii.gz": tmp_path / "before.nii.gz"}
    monkeypatch.setattr(nifti, "read_header", lambda path: real(names.get(path.name, path)))
    with pytest.raises(
        utils.DataError, match=r"(?s)1 of the 3 files.*sub-1.nii.gz was changed while it was read"
    ):
        dataset.load_split(source, "train", axis="coronal", cache_dir=tmp_path, progress=False)


def test_a_model_of_scans_is_trained_evaluated_and_used(
    study, tmp_path, monkeypatch, small, own_signals, capsys
):
    monkeypatch.chdir(tmp_path)
    command = [
        "--data",
        str(study),
        "--axis",
        "sagittal",
        "--size",
        "32",
        "48",
        *small,
        "--epochs",
        "1",
    ]
    assert train.main([*command, "--name", "a"]) == 0
    assert "training and" in capsys.readouterr().out
    assert train.main([*command[:-1], "2", "--name", "a", "--resume"]) == 0
    assert predict.main(["--run", "runs/a"]) == 0
    file = next(study.rglob("*.nii.gz"))
    assert predict.main([str(file), "-o", "out", "--run", "runs/a"]) == 0
    assert rows_of(tmp_path / "out")[0]["slices"] == "20"  # cut as in training, without --axis
    with pytest.raises(UserError, match="divisible by 4"):
        train.main([*command[:5], "33", "48", *small])


def test_the_brain_comes_back_as_it_was(real_data, tmp_path, monkeypatch, small, own_signals):
    """Its oblique volume through planes and back; every sixth voxel of it, trained on by --axis and reconstructed."""
    brain = nib.load(real_data / "brain_volume" / "anat-T1w.nii.gz")
    scan = nifti.read_scan(brain.get_filename(), "axial")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.nii.gz").write_bytes(scan.to_bytes(scan.planes))
    brain.slicer[::6, ::6, ::6].to_filename("small.nii.gz")
    flags = ["--axis", "axial", "--size", "64", "48", "--epochs", "1", "--name", "a"]
    assert train.main(["--data", "small.nii.gz", *small, *flags]) == 0
    assert predict.main(["small.nii.gz", "-o", "out", "--run", "runs/a"]) == 0
    for one, other in (
        (brain, "whole.nii.gz"),
        (nib.load("small.nii.gz"), "out/small_reconstruction.nii.gz"),
    ):
        after = nib.load(other)
        assert one.shape == after.shape and one.get_data_dtype() == after.get_data_dtype()
        np.testing.assert_allclose(after.affine, one.affine, atol=1e-4)
        assert nib.aff2axcodes(one.affine) == nib.aff2axcodes(after.affine)
    np.testing.assert_array_equal(
        np.asarray(nib.load("whole.nii.gz").dataobj), np.asarray(brain.dataobj)
    )


# ---------------------------------------------------------------- other programs


@pytest.mark.parametrize("codebooks", [1, 2])
def test_exported_parts_do_what_the_model_does(tmp_path, codebooks, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = VQVAE(
        hidden_channels=8,
        residual_channels=4,
        num_embeddings=16,
        embedding_dim=4,
        num_codebooks=codebooks,
    )
    kept = {"format": 3, "model_args": model.arguments, "model": model.state_dict()}
    (tmp_path / "x").mkdir()
    write_checkpoint(tmp_path / "x" / "best.pt", kept)
    out = tmp_path / "out"
    assert (
        predict.main(["--export", "-o", str(out), "--run", str(tmp_path / "x"), "--device", "cpu"])
        == 0
    )
    encoder, decoder = (
        onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("encoder", "decoder")
    )
    model.eval()
    for shape in ((1, 1, 256, 128), (3, 1, 40, 36)):  # other sizes than the example's
        images = torch.randn(shape)
        with torch.no_grad():
            codes = model.encode(images)
            expected = model.decode_codes(codes)
        assert np.array_equal(encoder.run(None, {"images": images.numpy()})[0], codes.numpy())
        found = decoder.run(None, {"codes": codes.numpy()})[0]
        assert np.abs(found - expected.numpy()).max() < 1e-4


def test_export_without_its_packages_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.onnx,
        "export",
        lambda *_, **__: (_ for _ in ()).throw(ModuleNotFoundError("onnxscript")),
    )
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        predict.main(["--export", "-o", str(tmp_path), "--run", str(run), "--device", "cpu"])


def test_who_was_trained_on_stays_out_of_the_test_split(
    study, tmp_path, monkeypatch, small, own_signals, capsys
):
    """The run keeps its splits: scans that come or go move nobody; other folders are tested without its people."""
    monkeypatch.chdir(tmp_path)
    command = ["--data", str(study), "--axis", "axial", *small, "--epochs", "1", "--name", "a"]
    assert train.main(command) == 0
    assert (
        train.main(["--resume", "--name", "a", "--epochs", "2"]) == 0
    )  # of the size that was found
    kept = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    gone = next(iter(kept["validate"]))
    for file in (study / f"sub-{gone}").rglob("*.nii.gz"):
        file.unlink()
    for subject in "XYZ":
        write(study / f"sub-{subject}" / f"sub-{subject}_T2w.nii.gz", volume() + 50)
    found, _ = load_run_data(tmp_path / "runs" / "a", "test")
    assert {name.case for name in found.names} == {*kept["test"], "X", "Y", "Z"}
    other = tmp_path / "other"
    for subject in ("N", next(iter(kept["train"]))):
        write(other / f"sub-{subject}_T2w.nii.gz", volume() + 50)
    found, _ = load_run_data(tmp_path / "runs" / "a", "test", data=str(other))
    assert {name.case for name in found.names} == {"N"}


PATIENTS = [f"p{i:02d}" for i in range(4)]
LAYOUTS = {  # paths, whose they are, and --subjects
    "sub-": ([f"sub-{p}/anat/sub-{p}_T1w" for p in PATIENTS], PATIENTS, None),
    "flat sub-": ([f"sub-{p}_ses-{n}_T1w" for p in PATIENTS for n in (1, 2)], PATIENTS, None),
    "HipMRI's names": (
        ["a/Case_004_Week0", "a/Case_004_Week1", "b/Case_005_Week0"],
        ["004", "005"],
        None,
    ),
    "flat": (PATIENTS, PATIENTS, None),
    "flat, below other folders": ([f"a/b/{p}" for p in PATIENTS], PATIENTS, None),
    "a folder with one file each": ([f"images/{p}/T1" for p in PATIENTS], PATIENTS, None),
    "a folder each": (
        [f"{p}/{kind}" for p in PATIENTS for kind in ("T1", "T2")],
        PATIENTS,
        "^([^/]+)/",
    ),
    "a folder a sequence": (
        [f"{kind}/{p}" for p in PATIENTS for kind in ("T1", "T2")],
        PATIENTS,
        r"([^/]+)\.nii",
    ),
    "IXI": (
        [f"IXI-{kind}/{p}-{kind}" for p in PATIENTS for kind in ("T1", "T2")],
        PATIENTS,
        r"p\d+",
    ),
    "sites": ([f"site{p[-1] in '01'}/{p}" for p in PATIENTS], PATIENTS, r"p\d+"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whose_a_file_is(tmp_path, layout):
    """Told by the path, or by --subjects; never guessed where a wrong guess would put one person into two splits."""
    paths, expected, pattern = LAYOUTS[layout]
    for path in paths:
        write(tmp_path / "data" / f"{path}.nii.gz", volume((8, 8, 8)))
    if pattern:
        with pytest.raises(utils.DataError, match="whose scan is whose can't be told") as error:
            splits.find_source(tmp_path / "data", "axial")
        if pattern.startswith(("^", "(")):  # it is what the error proposes
            assert f"--subjects '{pattern}'" in str(error.value)
    source = splits.find_source(tmp_path / "data", "axial", None, 0, pattern)
    assert set(source.subjects.values()) == set(expected)
    assert all(whose in str(file.relative_to(tmp_path)) for file, whose in source.subjects.items())
    assert "is of" in source.notes[0] and ("another person's" in source.notes[0]) == (len(paths) == 4 and not (
        pattern or layout == "sub-"))  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"), [("q", r"finds nothing in the path of 2 scan"), ("(", "no regular exp")]
)
def test_patterns_that_cannot_be_used(tmp_path, pattern, message):
    for name in "ab":
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    with pytest.raises(utils.DataError, match=message):
        splits.find_source(tmp_path, "axial", None, 0, pattern)


def test_people_of_training_are_known_in_another_folder(tmp_path):
    """Whatever level it is: by the name of a file or of a folder that it is in."""
    known = {"train": {"p0": ["p0.nii.gz"], "p1": ["p1.nii.gz"]}, "validate": {"p2": ["p2.nii.gz"]}}
    names = ("p0", "p2", "p9", "batch/p1", "batch/p8", "p0/T1", "p7/T1", "p7/T2")
    for name in names:
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    source = splits.find_source(tmp_path, "axial", known=known)
    found = {
        split: {str(file.relative_to(tmp_path))[:-7] for file in files}
        for split, files in source.splits.items()
    }
    strangers = {"p9", "batch/p8", "p7/T1", "p7/T2"}
    assert found == {"train": {"p0"}, "validate": {"p2", *strangers}, "test": strangers}
    alone = splits.find_source(tmp_path, "axial", known=known, others=False)
    assert {split: len(files) for split, files in alone.splits.items()} == {
        "train": 1,
        "validate": 1,
    }


def test_folders_that_are_named_as_splits_are_the_splits(tmp_path):
    for name in ("train/a/1", "train/b/2", "val/3", "test/4", "test/5"):
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    source = splits.find_source(tmp_path, "axial")
    found = {split: [file.name[0] for file in files] for split, files in source.splits.items()}
    assert found == {"train": ["1", "2"], "validate": ["3"], "test": ["4", "5"]}
    assert any("those that the folders name" in note for note in source.notes)
    drawn = splits.find_source(tmp_path, "axial", ["0.6", "0.2", "0.2"], 0, r"([^/]+)\.nii")
    assert len(drawn.splits["train"]) == 3
    (tmp_path / "6.nii.gz").write_bytes((tmp_path / "val" / "3.nii.gz").read_bytes())
    with pytest.raises(utils.DataError, match=r"(?s)1 scan\(s\).*in none of the folders.*6.nii.gz"):
        splits.find_source(tmp_path, "axial")


@pytest.mark.parametrize("names", [("val/1", "test/2"), ("train/1", "test/2")])
def test_splits_that_lack_one(tmp_path, names, small):
    for name in names:
        write(tmp_path / "d" / f"{name}.nii.gz", volume())
    with pytest.raises(utils.DataError, match=r"is in the (train|validate) split .*Give --split"):
        train.main(["--data", str(tmp_path / "d"), "--axis", "axial", *small, "--dry-run"])


def test_one_person_in_two_splits_is_told(tmp_path):
    for name in ("train/sub-1", "val/sub-2", "test/sub-1"):
        write(tmp_path / f"{name}.nii.gz", volume((8, 8, 8)))
    notes = splits.find_source(tmp_path, "axial").notes
    assert any("1 subject(s) in both train and test (1)" in note for note in notes)
    known = {split: {"1": ["train/sub-1.nii.gz"]} for split in ("train", "validate", "test")}
    notes = splits.find_source(tmp_path, "axial", known=known).notes
    assert sum("in both train and" in note for note in notes) == 2


def test_segmentations_and_outputs_are_no_scans(tmp_path):
    for name in ("sub-0_T1w", "sub-0_dseg", "labelsTr/x", "sub-1_T1w_reconstruction"):
        write(tmp_path / f"{name}.nii.gz", volume())
    source = splits.find_source(tmp_path, "axial")
    assert len(source.subjects) == 1
    assert any(
        "3 file(s) that are named as segmentations or as outputs" in note for note in source.notes
    )


def test_slices_get_the_size_that_most_have(tmp_path):
    """Not that of the first files, and what is resized by much is told."""
    write(tmp_path / "d" / "sub-0.nii.gz", volume((20, 24, 3)))
    for i in range(1, 4):
        write(tmp_path / "d" / f"sub-{i}.nii.gz", volume((64, 96, 3)))
    everyone = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(4)}}
    source = splits.find_source(tmp_path / "d", "axial", known=everyone)
    slices = dataset.load_split(source, "train", axis="axial", cache_dir=tmp_path, progress=False)
    assert slices.size == (64, 96)
    assert any("3 slice(s) of 20 x 24 are resized to 64 x 96" in note for note in slices.notes)
    slices = dataset.load_split(
        source, "train", axis="axial", size=(32, 48), cache_dir=tmp_path, progress=False
    )
    assert any("9 slice(s) of 64 x 96 are resized to 32 x 48" in note for note in slices.notes)


def test_what_is_little_larger_is_cut_not_resampled(tmp_path):
    """SliceDataset, their segmentations and their affine; what would lose over a tenth is resized."""
    labels = np.random.default_rng(0).integers(0, 6, (34, 4, 50)).astype(np.uint8)
    for case in ("004", "005"):
        shape = (34, 4, 50) if case == "004" else (34, 4, 60)
        array = np.resize(labels, shape).astype(np.int16) * 100
        array[:, 1] += 7
        write(tmp_path / "semantic_MRs_anon" / f"Case_{case}_Week0_LFOV.nii.gz", array)
        write(
            tmp_path / "semantic_labels_anon" / f"Case_{case}_Week0_SEMANTIC_LFOV.nii.gz",
            np.resize(labels, shape),
        )
    everyone = {
        "train": {c: [f"semantic_MRs_anon/Case_{c}_Week0_LFOV.nii.gz"] for c in ("004", "005")}
    }
    source = splits.find_source(tmp_path, "coronal", known=everyone)
    slices = dataset.load_split(source, "train", axis="coronal", cache_dir=tmp_path, progress=False)
    assert slices.size == (32, 48) and slices.fit == "trim" and len(slices) == 8
    inside = labels[1:33, :, 1:49]
    images = slices.denormalise(slices.batch(torch.arange(4)), torch.arange(4))[:, 0].round()
    assert torch.equal(slices.labels()[:4], torch.from_numpy(inside).movedim(1, 0))
    assert torch.equal(images[0], torch.from_numpy(inside[:, 0]).float() * 100)
    np.testing.assert_allclose(
        slices.description["spacing"], [1.753125, 2.25], rtol=1e-5
    )  # medians of 1.7 and 1.80625, 2 and 2.5
    assert any("4 slice(s) of 34 x 50 are cut to 32 x 48" in note for note in slices.notes)
    assert slices.labels()[4:].shape == (4, 32, 48) and any(
        "34 x 60 are resized" in note for note in slices.notes
    )


def test_places_in_volumes_are_by_file(tmp_path):
    """Two volumes of one person are two volumes; 2D slices keep the numbers that their names have."""
    for depth, name in ((5, "a"), (9, "b")):
        write(tmp_path / "d" / f"sub-0_{name}.nii.gz", volume((16, 16, depth)))
    for number in (3, 4, 7):
        write(tmp_path / "d" / f"case_007_week_0_slice_{number}.nii.gz", volume((16, 16)))
    files = [path.name for path in (tmp_path / "d").iterdir()]
    everyone = {
        "train": {"0": [n for n in files if n[0] == "s"], "007": [n for n in files if n[0] == "c"]}
    }
    source = splits.find_source(tmp_path / "d", "axial", known=everyone)
    slices = dataset.load_split(source, "train", axis="axial", cache_dir=tmp_path, progress=False)
    expected = [0, 0.25, 1, *np.linspace(0, 1, 5), *np.linspace(0, 1, 9)]
    np.testing.assert_allclose(slices.positions, expected)
    assert [slices.names[i].stem for i in (1, 4)] == ["case_007_week_0_slice_4", "sub-0_a_slice_1"]


@pytest.mark.parametrize(
    "odd", [7, {"train": 7}, {"train": {"A": 7}}, {"train": {"A": [7]}}, {"else": {"A": ["a.nii"]}}]
)
def test_splits_of_a_run_that_are_none(tmp_path, odd):
    (tmp_path / "config.json").write_text(json.dumps({"scans": odd}))
    with pytest.raises(UserError, match="expected what train"):
        read_manifest(tmp_path)


def test_a_run_goes_on_when_scans_have_come(study, tmp_path, monkeypatch, small, own_signals):
    """With the people that it had, each in the split that it was in."""
    monkeypatch.chdir(tmp_path)
    command = ["--data", "study", "--axis", "axial", *small, "--name", "a", "--epochs"]
    assert train.main([*command, "1"]) == 0
    before = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    for name in "0Z":  # before and after the others
        write(study / f"sub-{name}" / f"sub-{name}_T2w.nii.gz", volume() + 50)
    assert train.main([*command, "2", "--resume"]) == 0
    assert utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"] == before


def test_an_empty_test_split_is_said(study, tmp_path, monkeypatch, small, own_signals, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(utils.DataError, match="Only the last, of the test split, may be 0"):
        train.main(["--data", "study", "--axis", "axial", "--split", "0.8", "0", "0.2", *small])
    command = [
        "--data",
        "study",
        "--axis",
        "axial",
        "--split",
        "0.8",
        "0.2",
        "0",
        *small,
        "--epochs",
        "1",
    ]
    assert train.main([*command, "--name", "a"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("--run runs/a --split validate")
    with pytest.raises(
        utils.DataError, match=r"is in the test split \(train 8, validate 2\): its share was 0"
    ):
        predict.main(["--run", "runs/a"])


def test_what_a_run_was_trained_on_is_told(
    study, tmp_path, monkeypatch, small, own_signals, capsys
):
    """In scores.csv, with the paths; and slices.csv has which file a slice is of."""
    monkeypatch.chdir(tmp_path)
    assert (
        train.main(["--data", "study", "--axis", "axial", *small, "--epochs", "1", "--name", "a"])
        == 0
    )
    kept = utils.read_json(tmp_path / "runs" / "a" / "config.json")["scans"]
    assert predict.main(["study", "-o", "out", "--device", "cpu"]) == 0
    rows = {row["path"]: row["in_training"] for row in rows_of(tmp_path / "out")}
    trained = {f"study/{file}" for files in kept["train"].values() for file in files}
    assert {path for path, told in rows.items() if told == "yes"} == trained and len(rows) == 10
    assert set(rows.values()) == {"yes", "no"}
    assert "note: 6 of 10 files are of the run's training" in capsys.readouterr().out
    assert predict.main(["--run", "runs/a", "--html", "--device", "cpu"]) == 0
    with open("runs/a/test/slices.csv") as file:
        slices = [(row["file"], row["slice"]) for row in csv.DictReader(file)]
    assert len(set(slices)) == len(slices) == 44
    assert {file for file, _ in slices} == {
        file for files in kept["test"].values() for file in files
    }
    assert f"{slices[0][0]}, slice" in (tmp_path / "runs" / "a" / "report.html").read_text()


def test_empty_slices_are_not_scored(tmp_path, reconstruct):
    array = np.zeros((24, 24, 10), np.int16)
    array[:, :, 3:7] = volume((24, 24, 4))
    array[0, 0, 8] = 900  # a slice of next to nothing
    folder = reconstruct(write(tmp_path / "scan.nii.gz", array), "--axis axial")
    row = rows_of(folder)[0]
    assert (row["slices"], row["empty_slices"]) == ("10", "6")
    back = np.moveaxis(np.asarray(nib.load(folder / "scan_reconstruction.nii.gz").dataobj), 2, 0)[
        3:7
    ]
    pair = [
        torch.from_numpy(x.astype(np.float32))[:, None]
        for x in (np.moveaxis(array, 2, 0)[3:7], back)
    ]
    assert float(row["psnr"]) == pytest.approx(float(slice_scores(*pair)["psnr"].mean()), abs=0.02)


def test_affines_of_zeros_are_no_matter_in_the_end(tmp_path, run, monkeypatch, small, own_signals):
    """SliceDataset whose form is of zeros are trained on, and reconstructed by models that know voxel sizes or don't."""
    for i in range(3):
        path = write(tmp_path / "d" / f"sub-{i}.nii.gz", volume((32, 32)))
        image = nib.load(path)
        header = image.header.copy()
        header["sform_code"], header["qform_code"] = 2, 0
        header["srow_x"] = header["srow_y"] = header["srow_z"] = 0
        path.write_bytes(
            gzip.compress(
                bytes(header.binaryblock) + bytes(4) + np.asarray(image.dataobj).tobytes("F")
            )
        )
    monkeypatch.chdir(tmp_path)
    assert (
        train.main(["--data", "d", "--axis", "axial", *small, "--epochs", "1", "--name", "a"]) == 0
    )
    for folder in ("runs/a", str(run)):
        assert predict.main(["d", "-o", "out", "--run", folder, "--device", "cpu"]) == 0
        assert len(rows_of(tmp_path / "out")) == 3


def test_headers_that_claim_more_than_files_hold_take_no_room(tmp_path):
    write(tmp_path / "d" / "sub-0.nii.gz", volume((16, 16, 4)))
    image = nib.Nifti1Image(np.zeros((16, 16, 4), np.int16), np.eye(4))
    content = bytearray(image.to_bytes())
    content[46:48] = (30000).to_bytes(2, "little")  # planes
    (tmp_path / "d" / "sub-1.nii").write_bytes(content)
    (tmp_path / "d" / "sub-2.nii.gz").write_bytes(gzip.compress(content))
    everyone = {"train": {"0": ["sub-0.nii.gz"], "1": ["sub-1.nii"], "2": ["sub-2.nii.gz"]}}
    source = splits.find_source(tmp_path / "d", "axial", known=everyone)
    options = {"axis": "axial", "cache_dir": tmp_path, "progress": False}
    with pytest.raises(
        utils.DataError,
        match=r"(?s)2 of the 3 files.*sub-1.nii is truncated.*sub-2.nii.gz is trunc",
    ):
        dataset.load_split(source, "train", **options)
    assert len(dataset.load_split(source, "train", skip_bad_files=True, **options)) == 4
    assert np.load(next(tmp_path.glob("*/pixels.npy")), mmap_mode="r").shape[0] == 6


def test_what_is_wrong_with_both_splits_is_told_at_once(tmp_path, write_slices, monkeypatch, small):
    data = write_slices(tmp_path / "d")
    for split, case in (("train", "004"), ("validate", "036")):
        (data / f"keras_slices_{split}" / f"case_{case}_week_0_slice_0.nii.gz").write_bytes(b"")
    with pytest.raises(utils.DataError, match=r"(?s)of the train split.*of the validate split"):
        train.main(["--data", str(data), *small, "--dry-run"])


def test_names_never_collide(tmp_path):
    files = [
        tmp_path / name for name in ("a/x.nii", "b/x.nii", "c/x_2.nii", "x_codes.npz", "x.npz")
    ]
    assert list(reconstruct.output_names(files)) == ["x", "x_2", "x_2_2", "x_3", "x_4"]


@pytest.mark.parametrize(("kind", "value"), [
    (np.int64, 2**40), (np.uint64, 2**40), (np.int32, 2**31 - 1), (np.uint16, 65535), (np.int8, -128),
])  # fmt: skip
def test_integers_of_every_kind_come_back(tmp_path, kind, value):
    array = (volume((9, 20, 30)) % 100).astype(kind)
    array[0, 0, 0] = value
    nib.Nifti1Image(array, AFFINE, dtype=kind).to_filename(tmp_path / "x.nii")
    scan = nifti.read_scan(tmp_path / "x.nii")
    (tmp_path / "y.nii.gz").write_bytes(scan.to_bytes(scan.planes))
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "y.nii.gz").dataobj), array)
    beyond = np.full(scan.planes.shape, 1e30)
    (tmp_path / "y.nii.gz").write_bytes(scan.to_bytes(beyond))
    assert np.asarray(nib.load(tmp_path / "y.nii.gz").dataobj).min() > np.iinfo(kind).max * 0.99


def test_an_affine_that_tells_nothing_is_no_matter_for_slices(
    tmp_path, reconstruct, monkeypatch, small, own_signals
):
    flat = AFFINE.copy()
    flat[:, 1] = 0
    header = nib.Nifti1Image(volume((30, 20)), None)
    header.set_sform(flat, code=1)
    for split in ("train", "validate", "test"):
        path = tmp_path / "d" / split / "x.nii"
        path.parent.mkdir(parents=True)
        path.write_bytes(header.to_bytes())
    folder = reconstruct(tmp_path / "d" / "test" / "x.nii")
    np.testing.assert_allclose(nib.load(folder / "x_reconstruction.nii.gz").affine, flat, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "d", *small, "--epochs", "1", "--name", "a"]) == 0


def test_many_embeddings_are_kept_as_they_are():
    torch.manual_seed(0)
    model = VQVAE(hidden_channels=8, residual_channels=4, num_embeddings=70_000, embedding_dim=4)
    array = np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32)
    coded = reconstruct.encode_planes(model, array)
    zscored = torch.from_numpy((array - array.mean()) / array.std())[None]
    assert coded.codes.dtype == np.uint32 and np.array_equal(
        coded.codes, model.encode(zscored).numpy()
    )
