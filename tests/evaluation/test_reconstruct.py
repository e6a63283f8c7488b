"""A person's own files: they come back as they were, at their own size; codes out and in; organs; odd ones."""

import csv
import gzip
import io
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch

import dataset
import predict
import train
from evaluation import reconstruct
from evaluation.metrics import ORGANS, organ_scores, slice_scores
from modules import VQVAE
from mri import hipmri, nifti
from mri.files import find_segmentation, is_segmentation
from training.checkpoint import load_model, write_checkpoint
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
