"""Preprocessing: settings, planes of volumes, fitting slices to one size, and their geometry."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resize

from mri import nifti
from mri.files import Source
from mri.preprocessing import (
    Preprocessing,
    crop_box,
    fit_slice,
    floor_std,
    is_constant,
    median_spacing,
    parse_axis,
    read_planes,
    read_segmentation,
    slice_affine,
    usual_size,
)
from mri.splits import find_source
from utils import DataError

SIZE = (256, 128)
AFFINE = np.diag([1.7, 1.5, 2.0, 1])


def noise(shape: tuple[int, ...] = SIZE, seed: int = 0, dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(dtype)


# ---------------------------------------------------------------- settings


def test_defaults_depend_on_the_form_of_the_data(tmp_path, write_nifti):
    assert Preprocessing.resolve(Source(tmp_path, "2D", {}, [])) == Preprocessing(
        form="2D", size=SIZE, fit="resize", axis="coronal", planes=1
    )
    assert Preprocessing.resolve(Source(tmp_path, "3D", {}, [])) == Preprocessing(
        form="3D", size=SIZE, fit="resize", axis="coronal", planes=60
    )
    scan = write_nifti(tmp_path / "a.nii", noise((64, 50, 96)))
    source = Source(tmp_path, "scans", {"train": [scan]}, [])
    assert Preprocessing.resolve(source) == Preprocessing(
        form="scans", size=(64, 96), fit="trim", axis="coronal", planes=nifti.MAX_VOXELS
    )
    assert Preprocessing.resolve(source, size=[32, 48], fit="crop", axis="0", planes=5) == (
        Preprocessing(form="scans", size=(32, 48), fit="crop", axis=0, planes=5)
    )


def test_axes_are_names_or_numbers():
    assert [parse_axis(axis) for axis in ("axial", "0", "2", 1)] == ["axial", 0, 2, 1]


# ---------------------------------------------------------------- planes of volumes


@pytest.mark.parametrize(
    ("axis", "count", "size"),
    [
        ("sagittal", 16, (32, 32)),
        ("coronal", 19, (16, 32)),
        ("axial", 22, (16, 32)),
        ("2", 22, (16, 32)),
    ],
)
def test_scans_are_cut_without_their_empty_planes(study, load, axis, count, size):
    source = find_source(study, axis)
    preprocessing = Preprocessing.resolve(source, axis=axis)
    slices = load(source, "train", preprocessing)
    assert len(slices) == 6 * count
    assert slices.size == size
    array_axis = int(axis) if axis == "2" else nifti.AXES[axis]
    spacing = np.delete([1.7, 1.5, 2.0], array_axis) * np.delete((20, 24, 28), array_axis) / size
    np.testing.assert_allclose(slices.description["spacing"], spacing, rtol=1e-5)
    for plane, image in read_planes(slices.files[0], preprocessing):
        volume = nifti.read_scan(slices.files[0], "axial").planes.transpose(1, 2, 0)
        np.testing.assert_array_equal(image, np.moveaxis(volume, array_axis, 0)[plane])


def test_the_central_planes_are_used(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii", noise((16, 9, 16)))
    for planes, expected in ((4, [2, 3, 4, 5]), (5, [2, 3, 4, 5, 6]), (60, [*range(9)])):
        preprocessing = Preprocessing("3D", planes=planes)
        assert [plane for plane, _ in read_planes(path, preprocessing)] == expected


def test_scans_with_only_empty_planes_are_refused(tmp_path, write_nifti):
    volume = np.zeros((20, 9, 20), np.int16)
    volume[3, :, 5] = 900
    path = write_nifti(tmp_path / "a.nii", volume)
    with pytest.raises(ValueError, match="has only empty slices"):
        list(read_planes(path, Preprocessing("scans", planes=9)))


# ---------------------------------------------------------------- one size


@pytest.mark.parametrize("shape", [(256, 144), (128, 64), (300, 100), (511, 255)])
def test_resizing_matches_torchvision(load_images, shape):
    image = noise(shape, dtype=np.float32)
    slices = load_images(image)
    expected = resize(torch.from_numpy(image)[None], list(SIZE), antialias=True)
    restored = slices.denormalise(slices[0][None], torch.tensor([0]))[0]
    assert restored.shape == (1, *SIZE)
    assert (restored - expected).abs().max() < 900 / 131070 + 1e-3


@pytest.mark.parametrize(
    ("shape", "fit", "expected"),
    [
        ((256, 144), "resize", (0, 0, 256, 144)),
        ((256, 144), "crop", (0, 8, 256, 128)),
        ((300, 128), "crop", (22, 0, 256, 128)),
        ((512, 300), "crop", (0, 22, 512, 256)),
        ((256, 140), "trim", (0, 6, 256, 128)),
        ((280, 140), "trim", (12, 6, 256, 128)),
        ((256, 144), "trim", (0, 0, 256, 144)),  # would lose more than a tenth
        ((250, 128), "trim", (0, 0, 250, 128)),  # too small
    ],
)
def test_the_used_part_of_a_slice(shape, fit, expected):
    assert crop_box(shape, fit, SIZE) == expected


def test_cropped_slices_keep_their_values():
    image = noise((256, 144))
    assert np.array_equal(fit_slice(image, "crop", SIZE), image[:, 8:136])
    tall = noise((300, 128))
    assert np.array_equal(fit_slice(tall, "crop", SIZE), tall[22:278])
    large = noise((512, 300), dtype=np.float32)
    resized = fit_slice(large[:, 22:278], "resize", SIZE)
    assert np.allclose(fit_slice(large, "crop", SIZE), resized)


def test_the_size_of_most_slices_is_used(tmp_path, write_nifti):
    files = [write_nifti(tmp_path / "0.nii.gz", noise((20, 24, 3)))]
    for i in range(1, 4):
        files.append(write_nifti(tmp_path / f"{i}.nii.gz", noise((64, 96, 3))))
    assert usual_size(files, "axial") == (64, 96)
    assert usual_size(files[:1], "axial") == (
        16,
        32,
    )
    assert usual_size([tmp_path / "missing.nii"], "axial") == SIZE


@pytest.mark.parametrize(("side", "expected"), [(35, 32), (50, 48), (40, 32), (60, 64), (9, 16)])
def test_sides_are_rounded_to_multiples_of_16(tmp_path, write_nifti, side, expected):
    path = write_nifti(tmp_path / "a.nii", noise((side, 64)))
    assert usual_size([path], "axial") == (expected, 64)


def test_slightly_larger_slices_are_trimmed_with_their_labels(tmp_path, write_nifti, load):
    labels = np.random.default_rng(0).integers(0, 6, (34, 4, 50)).astype(np.uint8)
    for case, shape in (("004", (34, 4, 50)), ("005", (34, 4, 60))):
        case_labels = np.resize(labels, shape)
        scan = case_labels.astype(np.int16) * 100
        scan[:, 1] += 7
        image_path = tmp_path / "semantic_MRs_anon" / f"Case_{case}_Week0_LFOV.nii.gz"
        labels_folder = tmp_path / "semantic_labels_anon"
        labels_path = labels_folder / f"Case_{case}_Week0_SEMANTIC_LFOV.nii.gz"
        write_nifti(image_path, scan, AFFINE)
        write_nifti(labels_path, case_labels, AFFINE)
    paths = {case: [f"semantic_MRs_anon/Case_{case}_Week0_LFOV.nii.gz"] for case in ("004", "005")}
    source = find_source(tmp_path, "coronal", manifest={"train": paths})
    slices = load(source, "train")
    assert (slices.size, slices.fit, len(slices)) == ((32, 48), "trim", 8)

    trimmed = torch.from_numpy(labels[1:33, :, 1:49]).movedim(1, 0)  # (4, 32, 48)
    assert torch.equal(slices.labels()[:4], trimmed)
    assert slices.labels()[4:].shape == (4, 32, 48)
    images = slices.denormalise(slices.batch(torch.arange(4)), torch.arange(4))[:, 0].round()
    assert torch.equal(images[0], trimmed[0].float() * 100)
    assert any("4 slice(s) of 34 x 50 are cut to 32 x 48" in note for note in slices.notes)
    assert any("4 slice(s) of 34 x 60 are resized to 32 x 48" in note for note in slices.notes)
    # The medians of 1.7 and 1.7 * 34 / 32, and of 2 and 2 * 60 / 48.
    np.testing.assert_allclose(slices.description["spacing"], [1.753125, 2.25], rtol=1e-5)


def test_segmentations_of_another_shape_are_refused(tmp_path, write_nifti):
    image = write_nifti(tmp_path / "image.nii", noise((20, 5, 20)))
    path = write_nifti(tmp_path / "seg.nii", np.zeros((20, 4, 20), np.uint8))
    message = r"seg\.nii and its image differ in shape: 4 x 20 x 20 and 5 x 20 x 20 planes;"
    with pytest.raises(DataError, match=message):
        read_segmentation(path, image, [2], Preprocessing("3D"))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"seg\.nii is empty .*the shape of its image, image\.nii"):
        read_segmentation(path, image, [2], Preprocessing("3D"))


# ---------------------------------------------------------------- intensities


def test_the_floor_of_the_deviations_is_a_twentieth_of_their_median():
    std = np.array([0.1, 10.0, 20.0, 30.0, 0.0])
    constant = np.array([False, False, False, False, True])
    np.testing.assert_allclose(floor_std(std, constant), [0.75, 10, 20, 30, 0.75])
    np.testing.assert_allclose(floor_std(np.zeros(2), np.array([True, True])), [1, 1])


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e20])
def test_constant_slices_are_recognised_in_every_unit(factor):
    assert not is_constant(0.0, 900 * factor)
    assert is_constant(900 * factor, 900 * factor * (1 + 1e-10))
    assert not is_constant(900 * factor, 901 * factor)
    assert is_constant(0.0, 0.0)


# ---------------------------------------------------------------- geometry


def test_the_affine_of_a_resized_slice_keeps_its_extent(tmp_path, write_nifti):
    # Rows run to the right, columns up.
    affine = np.array([[1.5, 0, 0, -80], [0, 0, 3.0, 7], [0, 2.0, 0, 11], [0, 0, 0, 1]])
    path = write_nifti(tmp_path / "slice.nii.gz", np.zeros((128, 64, 1), np.int16), affine)
    fitted = slice_affine(path, Preprocessing("2D"))
    np.testing.assert_allclose(fitted[:3, :3], [[0.75, 0, 0], [0, 0, 3], [0, 1, 0]])
    np.testing.assert_allclose(fitted @ [127.5, 63.5, 0, 1], [0, 0, 0, 1], atol=1e-6)


def test_the_affine_of_a_cropped_slice_keeps_its_voxel_size(tmp_path, write_nifti):
    affine = np.diag([1.5, 2.0, 3.0, 1])
    path = write_nifti(tmp_path / "wide.nii.gz", np.zeros((256, 144), np.int16), affine)
    resized = slice_affine(path, Preprocessing("2D"))
    cropped = slice_affine(path, Preprocessing("2D", fit="crop"))
    np.testing.assert_allclose(np.diag(resized), [1.5, 2 * 144 / 128, 3, 1])
    np.testing.assert_allclose(np.diag(cropped), [1.5, 2, 3, 1])


def test_the_affine_of_planes_follows_the_stored_orientation(tmp_path, write_nifti):
    # Stored axes run anterior, superior, left.
    affine = np.array([[0, 0, -1.68, 200], [2.5, 0, 0, -90], [0, 1.56, 0, -100], [0, 0, 0, 1]])
    path = write_nifti(tmp_path / "volume.nii.gz", np.zeros((60, 128, 256), np.int16), affine)
    fitted = slice_affine(path, Preprocessing("3D"))
    expected = [[1.68, 0, 0], [0, 0, 2.5], [0, 1.56, 0]]
    np.testing.assert_allclose(fitted[:3, :3], expected, atol=1e-6)


def test_the_affine_of_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        slice_affine(tmp_path / "no", Preprocessing("2D"))


def test_files_without_a_voxel_size_do_not_count_for_the_spacing(tmp_path, write_nifti):
    good = write_nifti(tmp_path / "good.nii", noise(), AFFINE)
    zero = write_nifti(tmp_path / "zero.nii", noise(), AFFINE)
    content = bytearray(zero.read_bytes())
    content[280:328] = bytes(48)  # the rows of the sform
    content[252:254] = bytes(2)  # no qform
    zero.write_bytes(content)
    preprocessing = Preprocessing("2D")
    spacing = median_spacing([good, zero, tmp_path / "missing.nii"], preprocessing)
    np.testing.assert_allclose(spacing, [1.7, 1.5], rtol=1e-6)
    assert median_spacing([zero], preprocessing) is None
