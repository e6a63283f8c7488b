"""The data set: z-scored slices, batches on a device, bad files, and augmentation."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import dataset
from mri.hipmri import find_hipmri
from mri.preprocessing import Preprocessing
from mri.splits import find_source
from utils import DataError

SIZE = (256, 128)


def noise(shape: tuple[int, ...] = SIZE, seed: int = 0, dtype=np.int16, high=900) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


# ---------------------------------------------------------------- z-scores


def test_each_slice_is_z_scored_by_its_own_mean_and_deviation(load_images):
    images = [noise(seed=i, high=10 ** (i + 2)) for i in range(3)]
    slices = load_images(*images)
    assert len(slices) == 3
    assert slices.split == "train"
    assert slices.mean.dtype == slices.std.dtype == torch.float32
    batch = slices.batch(torch.tensor([2, 0]))
    assert batch.shape == (2, 1, *SIZE)
    assert batch.dtype == torch.float32
    for zscored, image in zip(batch[:, 0], (images[2], images[0]), strict=True):
        expected = (image - image.mean()) / image.std()
        np.testing.assert_allclose(zscored.double(), expected, atol=2e-6)
    assert torch.equal(slices[1], slices.batch(torch.tensor([1]))[0])
    assert torch.equal(slices[-1], slices[2])
    with pytest.raises(IndexError):
        slices[3]


def test_deviations_have_a_floor_and_constant_slices_are_zero(load_images):
    nearly_empty = np.zeros(SIZE, np.int16)
    nearly_empty[0, 0] = 1
    varied = [noise(seed=i) for i in range(5)]
    slices = load_images(nearly_empty, np.full(SIZE, 77, np.int16), *varied)
    floor = 0.05 * np.median([nearly_empty.std(), *(image.std() for image in varied)])
    assert slices.std[:2].tolist() == pytest.approx([floor, floor], rel=1e-6)
    assert slices[0].abs().max() < 0.1  # its own deviation would make it 181
    assert slices.constant.tolist() == [False, True] + [False] * 5
    assert slices[1].count_nonzero() == 0
    assert torch.all(slices.denormalise(slices[1][None], torch.tensor([1])) == 77)


def test_a_split_of_constant_slices_has_finite_deviations(load_images):
    # The second image is resized, which adds rounding noise.
    slices = load_images(np.full(SIZE, 0.1), np.full((511, 255), 0.7))
    assert slices.constant.all()
    assert slices.batch(torch.arange(2)).count_nonzero() == 0
    assert torch.isfinite(slices.std).all()
    assert (slices.std > 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_integers_are_restored_exactly(load_images, dtype):
    high = min(65536, np.iinfo(dtype).max + 1) if np.dtype(dtype).kind in "iu" else 65536
    image = noise(dtype=dtype, high=high)
    slices = load_images(image)
    restored = slices.denormalise(slices[0][None], torch.tensor([0]))[0, 0].double().round()
    np.testing.assert_array_equal(restored, image.astype(np.float64))


def test_real_slices_are_read_exactly(real_data, load):
    source = find_hipmri(real_data)
    assert [len(source.splits[split]) for split in ("train", "validate", "test")] == [86, 38, 106]
    assert any("1 subject(s) in both train and validate (218)" in note for note in source.notes)
    assert not any("and test" in note for note in source.notes)
    for split, files in source.splits.items():
        slices = load(source, split)
        assert len(slices) == len(files)
        assert slices.notes == []
        assert not slices.constant.any()
        indices = torch.arange(len(slices))
        batch = slices.batch(indices)
        restored = slices.denormalise(batch, indices)[:, 0].round()
        for image, file in zip(restored, files, strict=True):
            np.testing.assert_array_equal(image, np.asarray(nib.load(file).dataobj))
        assert batch.mean((1, 2, 3)).abs().max() < 1e-5
        assert (batch.std((1, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_the_fingerprint_depends_on_contents_and_order(load_images):
    first, second = noise(seed=1), noise(seed=2)
    fingerprint = load_images(first, second).fingerprint
    assert load_images(first, second).fingerprint == fingerprint
    assert load_images(second, first).fingerprint != fingerprint
    assert load_images(first).fingerprint != fingerprint


# ---------------------------------------------------------------- bad files


@pytest.fixture
def damaged(tmp_path, write_slices) -> Path:
    """HipMRI's 2D version with 4 good training slices, and 3 files that cannot be used."""
    data = write_slices(tmp_path / "d")
    folder = data / "keras_slices_train"
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii.gz").write_bytes(b"slice,score\n" * 99)
    (folder / "dangling.nii.gz").symlink_to(tmp_path / "nowhere")
    return data


REASONS = {"dangling": "No such file", "empty": "is empty", "text": "is not a NIfTI file"}


def test_bad_files_are_listed_in_one_error(damaged, load):
    for _ in range(2):  # decoded, then from the cache
        with pytest.raises(DataError) as error:
            load(find_hipmri(damaged), "train")
        first, *listed, last = str(error.value).splitlines()
        assert first == "3 of the 7 files of the train split cannot be used:"
        for line, (name, reason) in zip(listed, REASONS.items(), strict=True):
            assert f"{name}.nii.gz" in line
            assert reason in line
        assert "--skip-bad-files" in last
    load(find_hipmri(damaged), "validate")  # the other splits can be used


def test_bad_files_can_be_skipped(tmp_path, write_slices, damaged, load):
    good = load(find_hipmri(write_slices(tmp_path / "good")), "train")
    for _ in range(2):
        slices = load(find_hipmri(damaged), "train", skip_bad_files=True)
        assert slices.names == good.names
        assert torch.equal(slices.batch(torch.arange(4)), good.batch(torch.arange(4)))
        (note,) = slices.notes
        assert "3 bad file(s) skipped" in note
        for name in REASONS:
            assert f"/{name}.nii.gz " in note


def test_a_split_without_good_files_is_an_error(tmp_path, write_slices, load):
    data = write_slices(tmp_path / "d", train=0)
    (data / "keras_slices_train").mkdir()
    (data / "keras_slices_train/a.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)a.nii.gz is empty.*No file of this split is left"):
        load(find_hipmri(data), "train", skip_bad_files=True)
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())


def test_unknown_splits_are_refused(tmp_path, write_slices, load):
    with pytest.raises(DataError, match="split is 'all'; expected train, validate or test"):
        load(find_hipmri(write_slices(tmp_path / "d")), "all")


# ---------------------------------------------------------------- augmentation


def test_crops_are_squares_of_the_slices_at_every_place():
    torch.manual_seed(0)
    slices = torch.arange(500 * 1 * 6 * 4.0).view(500, 1, 6, 4)
    squares = dataset.random_crop(slices, 3)
    assert squares.shape == (500, 1, 3, 3)
    places = set()
    for i, square in enumerate(squares[:, 0]):
        top, left = divmod(int(square[0, 0]) - 24 * i, 4)
        assert torch.equal(square, slices[i, 0, top : top + 3, left : left + 3])
        places.add((top, left))
    assert places == {(top, left) for top in range(4) for left in range(2)}


def test_slices_are_flipped_along_both_axes_independently():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 8, 4).expand(64, 1, 8, 4)
    variants = [images[0], images[0].flip(-1), images[0].flip(-2), images[0].flip(-1, -2)]
    drawn = set()
    for image in dataset.random_flip(images):
        drawn.add([torch.equal(image, variant) for variant in variants].index(True))
    assert drawn == {0, 1, 2, 3}


def test_squares_are_drawn_in_all_eight_symmetries():
    torch.manual_seed(0)
    square = torch.rand(1, 1, 4, 4)
    expected = set()
    for image in (square, square.mT):
        for axes in ((), (-1,), (-2,), (-1, -2)):
            expected.add(tuple(image.flip(axes).flatten().tolist()))
    flipped = dataset.random_flip(square.expand(200, 1, 4, 4))
    assert {tuple(image.flatten().tolist()) for image in flipped} == expected
    assert len(expected) == 8


@pytest.mark.parametrize(
    ("crop", "shape"), [(0, (72, 56)), (32, (32, 32)), (48, (48, 48)), (64, (48, 48))]
)
def test_augmentation_crops_to_the_largest_square_that_fits(crop, shape):
    images = torch.rand(3, 1, 72, 56)
    assert dataset.augment(images, crop, flip=True).shape == (3, 1, *shape)


def test_augmentation_without_crop_and_flip_changes_nothing():
    images = torch.rand(3, 1, 72, 56)
    assert torch.equal(dataset.augment(images, crop=0, flip=False), images)


def test_augmentation_draws_the_crop_before_the_flips():
    images = torch.rand(3, 1, 72, 56)
    torch.manual_seed(0)
    expected = dataset.random_flip(dataset.random_crop(images, 32))
    torch.manual_seed(0)
    assert torch.equal(dataset.augment(images, crop=32, flip=True), expected)


# ---------------------------------------------------------------- batches on a device


CPU = torch.device("cpu")


@pytest.fixture
def nine_slices(tmp_path, write_slices, load) -> dataset.SliceDataset:
    return load(find_hipmri(write_slices(tmp_path / "d", train=9)), "train")


def check_batches(slices: dataset.SliceDataset, device: torch.device, expected: list) -> None:
    """Check the batches of groups of 4, 4, 1 and 0 slices."""
    batches = [images.clone() for images in slices.batches(shuffled_groups(), device)]
    assert [len(images) for images in batches] == [4, 4, 1, 0]
    for images, expected_images in zip(batches, expected, strict=True):
        assert torch.equal(images, expected_images)


def shuffled_groups() -> list[torch.Tensor]:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    return [*order.split(4), torch.tensor([], dtype=torch.long)]


def test_batches_are_those_of_the_groups(nine_slices):
    expected = [nine_slices.batch(group) for group in shuffled_groups()]
    check_batches(nine_slices, CPU, expected)
    assert list(nine_slices.batches([], CPU)) == []


def test_batches_read_ahead_by_a_thread_are_the_same(nine_slices, monkeypatch):
    expected = [nine_slices.batch(group) for group in shuffled_groups()]
    mps = torch.device("mps")  # neither a CPU nor cached on the device: a thread reads
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, device, **_: to(x, CPU if device == mps else device)
    )
    check_batches(nine_slices, mps, expected)


def test_batches_of_pixels_on_the_device_are_the_same(nine_slices, monkeypatch):
    expected = [nine_slices.batch(group) for group in shuffled_groups()]
    monkeypatch.setattr(dataset, "free_memory", lambda device: 9 * 256 * 128 * 2 * 4)
    line = nine_slices.cache_on_device(CPU, max_fraction=0.2)
    assert "more than 20% of the free memory of cpu" in line
    check_batches(nine_slices, CPU, expected)
    assert "in the memory of cpu" in nine_slices.cache_on_device(CPU, max_fraction=0.25)

    def fail(*_):
        raise AssertionError("was read from disk, not from the device")

    monkeypatch.setattr(dataset.SliceDataset, "batch", fail)
    check_batches(nine_slices, CPU, expected)
    assert list(nine_slices.batches([], CPU)) == []


def test_prefetching_keeps_the_order_and_is_bounded():
    read = []

    def double(group: int) -> int:
        read.append(group)
        return 2 * group

    results = []
    for number in dataset.prefetch(double, range(20), depth=2):
        results.append(number)
        assert len(read) <= len(results) + 3
    assert read == list(range(20))
    assert results == [2 * group for group in read]


def test_prefetching_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        list(dataset.prefetch(lambda group: 1 // group, [1, 0]))


def test_prefetching_stops_with_its_reader():
    read = []
    reader = dataset.prefetch(read.append, range(100), depth=2)
    next(reader)
    reader.close()
    assert len(read) < 30


# ---------------------------------------------------------------- names and positions


def test_positions_of_2d_slices_are_relative_to_their_case_and_week(tmp_path, write_nifti, load):
    names = [f"case_004_week_0_slice_{number}" for number in (0, 5, 20)]
    names += [f"case_004_week_1_slice_{number}" for number in (3, 7)]
    for name in [*names, "case_005_week_0_slice_4", "scan"]:
        write_nifti(tmp_path / "d" / "train" / f"{name}.nii.gz", noise())
    slices = load(find_hipmri(tmp_path / "d"), "train")
    stems = [name.stem for name in slices.names]
    positions = dict(zip(stems, slices.positions.tolist(), strict=True))
    assert [positions[name] for name in names] == [0, 0.25, 1, 0, 1]
    assert np.isnan(positions["case_005_week_0_slice_4"])  # the only slice of its volume
    assert np.isnan(positions["scan"])


def test_positions_and_names_of_planes_are_those_in_their_file(tmp_path, write_nifti, load):
    folder = tmp_path / "d"
    volumes = [
        write_nifti(folder / "sub-0_a.nii.gz", noise((16, 16, 5))),
        write_nifti(folder / "sub-0_b.nii.gz", noise((16, 16, 9))),
    ]
    flat = []
    for number in (3, 4, 7):
        path = folder / f"case_007_week_0_slice_{number}.nii.gz"
        flat.append(write_nifti(path, noise((16, 16))))
    manifest = {"0": [path.name for path in volumes], "007": [path.name for path in flat]}
    source = find_source(folder, "axial", manifest={"train": manifest})
    slices = load(source, "train", Preprocessing.resolve(source, axis="axial"))
    expected = [0, 0.25, 1, *np.linspace(0, 1, 5), *np.linspace(0, 1, 9)]
    np.testing.assert_allclose(slices.positions, expected)
    assert slices.names[1].stem == "case_007_week_0_slice_4"
    assert slices.names[4].stem == "sub-0_a_slice_1"
    assert slices.names[4].case == "0"


# ---------------------------------------------------------------- single slices


@pytest.mark.parametrize("shape", [(256, 128), (300, 144), (256, 128, 1)])
def test_a_single_slice_is_read_as_in_the_data_set(tmp_path, write_nifti, load, shape):
    path = write_nifti(tmp_path / "d/train/case_004_week_0_slice_0.nii.gz", noise(shape))
    slices = load(find_hipmri(tmp_path / "d"), "train")
    image = dataset.read_slice(path, slices.preprocessing)
    torch.testing.assert_close(image, slices[0], rtol=1e-4, atol=1e-4)


def test_single_slices_that_cannot_be_used_are_refused(tmp_path, write_nifti):
    constant = write_nifti(tmp_path / "constant.nii.gz", np.full(SIZE, 7, np.int16))
    volume = write_nifti(tmp_path / "volume.nii.gz", np.zeros((20, 20, 20), np.int16))
    messages = {
        constant: "has a single value",
        volume: "has shape 20 x 20 x 20",
        tmp_path / "no": "No such file",
    }
    for path, message in messages.items():
        with pytest.raises(DataError, match=message):
            dataset.read_slice(path, Preprocessing("2D"))
