"""The user's own files: geometry and data type stay, scores are right, bad files are reported."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import torch

import predict
import train
from evaluation import reconstruct, score_table
from evaluation.metrics import slice_scores
from mri import nifti
from mri.files import find_segmentation
from utils import UserError

AFFINE = np.array([[1.7, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1.0]])


def to_images(planes) -> torch.Tensor:
    return torch.from_numpy(planes.astype(np.float32))[:, None]


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("shape", "dtype", "expected_dtype"),
    [
        ((30, 20), np.int16, np.int16),
        ((30, 20, 1), np.uint8, np.uint8),
        ((30, 20), np.float64, np.float32),
        ((9, 20, 30), ">i2", np.int16),
        ((9, 20, 30, 1, 1), np.int16, np.int16),
    ],
)
def test_shape_affine_and_data_type_stay(
    tmp_path, noise, reconstruct_path, shape, dtype, expected_dtype
):
    image = nib.Nifti1Image(noise(shape, dtype), AFFINE)
    image.header["descrip"] = b"DOE^JANE"
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(image.to_bytes()))
    folder = reconstruct_path(path, "--export-codes")
    result = nib.load(folder / "scan_reconstruction.nii.gz")
    assert result.shape == shape
    assert result.get_data_dtype() == expected_dtype
    np.testing.assert_allclose(result.affine, AFFINE, atol=1e-5)
    assert (folder / "scan.png").stat().st_size > 5000
    # Only the geometry of the header is copied.
    assert result.header["descrip"].item() == b""
    with np.load(folder / "scan_codes.npz") as file:
        for name in file.files:
            assert b"DOE" not in file[name].tobytes()


def test_transforms_and_units_stay(tmp_path, noise, reconstruct_path, capsys):
    image = nib.Nifti1Image(noise((20, 9, 30)), None)
    image.set_qform(AFFINE, code=1)
    image.set_sform(AFFINE, code=3)
    image.header.set_xyzt_units("micron")
    image.to_filename(tmp_path / "x.nii")
    first = reconstruct_path(tmp_path / "x.nii", "--export-codes")
    assert "its pixels are 0.00 x 0.00 mm" in capsys.readouterr().out
    again = reconstruct_path(first, "--from-codes", "again")
    for folder in (first, again):
        result = nib.load(folder / "x_reconstruction.nii.gz")
        for name in ("get_qform", "get_sform"):
            matrix, code = getattr(result, name)(coded=True)
            expected, expected_code = getattr(image, name)(coded=True)
            np.testing.assert_array_equal(matrix, expected)
            assert code == expected_code
        assert result.header.get_xyzt_units() == ("micron", "unknown")
        assert result.header.get_zooms() == image.header.get_zooms()


def test_nan_is_replaced_on_request(tmp_path, write_nifti, noise, reconstruct_path, read_scores):
    array = noise((20, 9, 30), np.float32)
    array[:5] = np.nan
    path = write_nifti(tmp_path / "x.nii.gz", array)
    with pytest.raises(UserError, match="has 1,350 NaN or infinite voxels; --nan-value X"):
        reconstruct_path(path)
    first = reconstruct_path(path, "--nan-value -10")
    filled = write_nifti(tmp_path / "filled" / "x.nii.gz", np.nan_to_num(array, nan=-10))
    second = reconstruct_path(filled, "", "out2")
    name = "x_reconstruction.nii.gz"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert read_scores(first)[0]["ssim"] == read_scores(second)[0]["ssim"] != ""


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((20, 20, 9), "cut along coronal, its planes have 20 x 9 pixels, expected at least 11 x"),
        ((20, 9), "it has 20 x 9 pixels, expected at least 11 x 11"),
    ],
)
def test_slices_without_scores_are_reported(
    tmp_path, write_nifti, noise, reconstruct_path, read_scores, capsys, shape, message
):
    folder = reconstruct_path(write_nifti(tmp_path / "x.nii", noise(shape)))
    printed = capsys.readouterr().out
    assert f"gets no scores: {message}" in printed
    assert ("--axis chooses another direction" in printed) == (len(shape) == 3)
    assert read_scores(folder)[0]["ssim"] == ""


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (np.int64, 2**40),
        (np.uint64, 2**40),
        (np.int32, 2**31 - 1),
        (np.uint16, 65535),
        (np.int8, -128),
    ],
)
def test_integers_of_every_type_keep_their_values(tmp_path, noise, dtype, value):
    array = (noise((9, 20, 30)) % 100).astype(dtype)
    array[0, 0, 0] = value
    nib.Nifti1Image(array, AFFINE, dtype=dtype).to_filename(tmp_path / "x.nii")
    scan = nifti.read_scan(tmp_path / "x.nii")
    (tmp_path / "y.nii.gz").write_bytes(scan.to_bytes(scan.planes))
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "y.nii.gz").dataobj), array)


def test_slices_are_resized_only_on_request(
    tmp_path, write_nifti, noise, reconstruct_path, read_scores
):
    path = write_nifti(tmp_path / "scan.nii.gz", noise((40, 30)))
    row = read_scores(reconstruct_path(path))[0]
    # Each of the 16 codes has 4 bits; two float32 are the slice's mean and std.
    assert int(row["code_bytes"]) == 10 * 8 * 4 // 8 + 8
    row = read_scores(reconstruct_path(path, "--resize --export-codes", "resized"))[0]
    assert int(row["code_bytes"]) == 64 * 32 * 4 // 8 + 8
    assert nib.load(tmp_path / "resized" / "scan_reconstruction.nii.gz").shape == (40, 30)


def test_constant_slices_are_restored_exactly(
    tmp_path, write_nifti, noise, reconstruct_path, read_scores
):
    array = noise((20, 6, 28))
    array[:, 2:4] = [[0], [7]]
    folder = reconstruct_path(write_nifti(tmp_path / "scan.nii.gz", array))
    result = np.asarray(nib.load(folder / "scan_reconstruction.nii.gz").dataobj)
    np.testing.assert_array_equal(result[:, 2:4], array[:, 2:4])
    assert read_scores(folder)[0]["ssim"] != ""


def test_scores_and_error_are_those_of_the_written_file(
    tmp_path, write_nifti, noise, reconstruct_path, read_scores
):
    array = noise((40, 5, 32))
    folder = reconstruct_path(write_nifti(tmp_path / "scan.nii.gz", array), "--error-map")
    result = np.asarray(nib.load(folder / "scan_reconstruction.nii.gz").dataobj)
    scores = slice_scores(to_images(array.swapaxes(0, 1)), to_images(result.swapaxes(0, 1)))
    row = read_scores(folder)[0]
    for name in ("ssim", "ssim_body", "psnr"):  # the file is rounded to int16
        assert float(row[name]) == pytest.approx(float(scores[name].mean()), abs=0.02)
    error = np.asarray(nib.load(folder / "scan_error.nii.gz").dataobj)
    assert np.abs(error - np.abs(result - array)).max() <= 1
    bits = 5 * 10 * 8 * 4 + 5 * 64
    assert float(row["bits_per_pixel"]) == pytest.approx(bits / array.size, abs=1e-5)


def test_empty_slices_are_not_scored(tmp_path, write_nifti, noise, reconstruct_path, read_scores):
    array = np.zeros((24, 24, 10), np.int16)
    array[:, :, 3:7] = noise((24, 24, 4))
    array[0, 0, 8] = 900  # a single bright pixel
    folder = reconstruct_path(write_nifti(tmp_path / "scan.nii.gz", array), "--axis axial")
    row = read_scores(folder)[0]
    assert (row["slices"], row["empty_slices"]) == ("10", "6")
    result = np.asarray(nib.load(folder / "scan_reconstruction.nii.gz").dataobj)
    originals = np.moveaxis(array, 2, 0)[3:7]
    reconstructions = np.moveaxis(result, 2, 0)[3:7]
    scores = slice_scores(to_images(originals), to_images(reconstructions))
    assert float(row["psnr"]) == pytest.approx(float(scores["psnr"].mean()), abs=0.02)


def test_a_file_of_empty_slices_has_no_scores(
    tmp_path, write_nifti, reconstruct_path, read_scores, capsys
):
    folder = reconstruct_path(write_nifti(tmp_path / "x.nii", np.full((20, 20), 7, np.int16)))
    assert "x has only empty slices; it gets no figure and no scores" in capsys.readouterr().out
    assert read_scores(folder)[0]["ssim"] == ""
    assert not (folder / "x.png").exists()


def test_unusual_voxel_sizes_are_reported(tmp_path, write_nifti, noise, reconstruct_path, capsys):
    reconstruct_path(write_nifti(tmp_path / "same.nii.gz", noise((30, 9, 30)), AFFINE))
    assert "warning" not in capsys.readouterr().out
    affine = np.diag([0.5, 1, 0.5, 1])
    reconstruct_path(write_nifti(tmp_path / "fine.nii.gz", noise((30, 9, 30)), affine))
    expected = "0.50 x 0.50 mm, but those of the training slices are about 1.70 x"
    assert expected in capsys.readouterr().out


def test_organs_are_scored_if_there_is_a_segmentation(
    tmp_path, write_nifti, noise, reconstruct_path, read_scores
):
    labels = np.zeros((40, 32), np.uint8)
    labels[5:20, 5:20] = 2  # bone
    images = tmp_path / "2d" / "keras_slices_test"
    masks = tmp_path / "2d" / "keras_slices_seg_test"
    write_nifti(images / "case_040_week_0_slice_1.nii.gz", noise((40, 32)))
    write_nifti(images / "case_041_week_0_slice_1.nii.gz", noise((40, 32)))
    write_nifti(masks / "seg_040_week_0_slice_1.nii.gz", labels)
    assert find_segmentation(images / "case_041_week_0_slice_1.nii.gz") is None
    segmented, other = read_scores(reconstruct_path(images))
    assert segmented["bone_ssim"] and segmented["bone_bias"]
    assert segmented["prostate_ssim"] == ""
    assert other["bone_ssim"] == ""

    image = tmp_path / "3d" / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz"
    mask = tmp_path / "3d" / "semantic_labels_anon" / "Case_004_Week0_SEMANTIC_LFOV.nii.gz"
    write_nifti(image, noise((40, 5, 32)))
    write_nifti(mask, np.repeat(labels[:, None], 5, 1))
    assert find_segmentation(image) == mask
    assert read_scores(reconstruct_path(image, "", "3d_out"))[0]["bone_ssim"]

    write_nifti(mask, labels)
    message = r"reconstructed but not scored, because its segmentation .* differ in shape"
    with pytest.raises(UserError, match=message):
        reconstruct_path(image, "", "bad_out")
    assert (tmp_path / "bad_out" / "Case_004_Week0_LFOV_reconstruction.nii.gz").exists()


# ---------------------------------------------------------------- files and folders


def test_folders_are_searched_and_bad_files_reported(
    tmp_path, write_nifti, noise, reconstruct_path, read_scores
):
    inputs = tmp_path / "in"
    for folder in ("a", "b/c", "keras_slices_seg_test", ".hidden"):
        write_nifti(inputs / folder / "scan.nii.gz", noise((30, 20)))
    (inputs / "bad.nii.gz").write_bytes(b"text")
    message = r"(?s)1 of 3 files cannot be used:.*bad\.nii\.gz is not a NIfTI file"
    with pytest.raises(UserError, match=message):
        reconstruct_path(inputs)
    out = tmp_path / "out"
    names = sorted(path.name for path in out.glob("*.nii.gz"))
    assert names == ["scan_2_reconstruction.nii.gz", "scan_reconstruction.nii.gz"]
    assert [row["file"] for row in read_scores(out)] == ["scan", "scan_2"]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere.nii", "nowhere.nii does not exist"), (".", r"no \.nii or \.nii\.gz file in \., at")],
)
def test_paths_without_files_are_an_error(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        predict.main([path, "-o", "out"])


def test_output_names_are_unique(tmp_path):
    names = ("a/x.nii", "b/x.nii", "c/x_2.nii", "x_codes.npz", "x.npz")
    paths = [tmp_path / name for name in names]
    assert score_table.output_names(paths) == ["x", "x_2", "x_2_2", "x_3", "x_4"]


# ---------------------------------------------------------------- models


def test_the_newest_run_is_used_with_its_description(
    tmp_path, write_slices, read_scores, monkeypatch, small, capsys
):
    monkeypatch.chdir(tmp_path)
    write_slices(tmp_path / "d")
    assert train.main(["--data", "d", *small, "--epochs", "1", "--name", "a"]) == 0
    inputs = ["d/keras_slices_train", "d/keras_slices_test"]
    assert predict.main([*inputs, "-o", "out", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "model: runs/a/best.pt" in printed
    assert "the model was trained on 4 of 6 files" in printed
    in_training = [row["in_training"] for row in read_scores(tmp_path / "out")]
    assert in_training == ["yes"] * 4 + ["no"] * 2
    run = reconstruct.find_run(None, "runs")
    _, description = reconstruct.load_run_model(run, torch.device("cpu"))
    expected = {"size": [256, 128], "spacing": [1.0, 1.0], "axis": "coronal", "nan_value": None}
    assert description == expected


def test_the_bundled_model_is_used_before_any_training(
    tmp_path, write_nifti, read_scores, monkeypatch, capsys
):
    """`python predict.py scan.nii.gz -o out` in a fresh clone."""
    monkeypatch.chdir(tmp_path)
    assert reconstruct.PELVIS_MODEL.stat().st_size < 5e6
    rows, columns = np.mgrid[:200, :120] / 30
    array = (500 + 300 * np.sin(rows) * np.cos(columns)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", array)
    assert predict.main(["scan.nii.gz", "-o", "out", "--device", "cpu"]) == 0
    assert "pelvis.pt" in capsys.readouterr().out
    assert float(read_scores(tmp_path / "out")[0]["ssim"]) > 0.9


def test_a_model_of_scans_cuts_volumes_along_its_own_axis(
    tmp_path, write_nifti, noise, read_scores, monkeypatch, small, capsys
):
    monkeypatch.chdir(tmp_path)
    for subject in "ABCDE":
        write_nifti(tmp_path / "d" / f"sub-{subject}_T2w.nii.gz", noise((20, 24, 28)))
    command = ["--data", "d", "--axis", "sagittal", "--size", "32", "48", *small, "--name", "a"]
    assert train.main([*command, "--epochs", "1"]) == 0
    assert train.main([*command, "--epochs", "2", "--resume"]) == 0
    assert predict.main(["--run", "runs/a"]) == 0
    assert predict.main(["d/sub-A_T2w.nii.gz", "-o", "out", "--run", "runs/a"]) == 0
    assert read_scores(tmp_path / "out")[0]["slices"] == "20"
    with pytest.raises(UserError, match="divisible by 4"):
        train.main([*command[:5], "33", "48", *small])


def test_a_real_brain_keeps_its_geometry(real_data, tmp_path, monkeypatch, small):
    """An oblique volume, written back; and fewer of its planes, trained on and reconstructed."""
    monkeypatch.chdir(tmp_path)
    brain = nib.load(real_data / "brain_volume" / "anat-T1w.nii.gz").slicer[::2, ::2, ::2]
    brain.to_filename("brain.nii.gz")
    brain = nib.load("brain.nii.gz")
    scan = nifti.read_scan("brain.nii.gz", "axial")
    (tmp_path / "whole.nii.gz").write_bytes(scan.to_bytes(scan.planes))
    brain.slicer[::3, ::3, ::3].to_filename("small.nii.gz")
    flags = ["--axis", "axial", "--size", "64", "48", "--epochs", "1", "--name", "a"]
    assert train.main(["--data", "small.nii.gz", *small, *flags]) == 0
    assert predict.main(["small.nii.gz", "-o", "out", "--run", "runs/a"]) == 0
    results = {"whole.nii.gz": brain}
    results["out/small_reconstruction.nii.gz"] = nib.load("small.nii.gz")
    for path, original in results.items():
        result = nib.load(path)
        assert original.shape == result.shape
        assert original.get_data_dtype() == result.get_data_dtype()
        np.testing.assert_allclose(result.affine, original.affine, atol=1e-4)
        assert nib.aff2axcodes(original.affine) == nib.aff2axcodes(result.affine)
    written = np.asarray(nib.load("whole.nii.gz").dataobj)
    np.testing.assert_array_equal(written, np.asarray(brain.dataobj))


# ---------------------------------------------------------------- unusable affines


def test_files_with_an_affine_of_zeros_are_reconstructed(
    tmp_path, write_nifti, noise, untrained_run, read_scores, monkeypatch, small
):
    """By models with and without a known voxel spacing."""
    for i in range(3):
        path = write_nifti(tmp_path / "d" / f"sub-{i}.nii", noise((32, 32)))
        image = nib.load(path)
        header = image.header.copy()
        header["sform_code"], header["qform_code"] = 2, 0
        header["srow_x"] = header["srow_y"] = header["srow_z"] = 0
        voxels = np.asarray(image.dataobj).tobytes("F")
        path.write_bytes(bytes(header.binaryblock) + bytes(4) + voxels)
    monkeypatch.chdir(tmp_path)
    command = ["--data", "d", "--axis", "axial", *small, "--epochs", "1", "--name", "a"]
    assert train.main(command) == 0
    for run in ("runs/a", str(untrained_run)):
        assert predict.main(["d", "-o", "out", "--run", run, "--device", "cpu"]) == 0
        assert len(read_scores(tmp_path / "out")) == 3


def test_slices_with_a_singular_affine_are_trained_on_and_reconstructed(
    tmp_path, noise, reconstruct_path, monkeypatch, small
):
    flat = AFFINE.copy()
    flat[:, 1] = 0
    image = nib.Nifti1Image(noise((30, 20)), None)
    image.set_sform(flat, code=1)
    for split in ("train", "validate", "test"):
        path = tmp_path / "d" / split / "x.nii"
        path.parent.mkdir(parents=True)
        path.write_bytes(image.to_bytes())
    folder = reconstruct_path(tmp_path / "d" / "test" / "x.nii")
    affine = nib.load(folder / "x_reconstruction.nii.gz").affine
    np.testing.assert_allclose(affine, flat, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "d", *small, "--epochs", "1", "--name", "a"]) == 0
