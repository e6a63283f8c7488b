"""The cache of decoded slices: when it is used, replaced or shared, and where it is."""

import errno
import gzip
import multiprocessing
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import processes
import pytest
import torch

import dataset
from mri import cache, nifti
from mri.encoding import SliceRecord
from mri.files import Source
from mri.hipmri import find_hipmri
from mri.preprocessing import Preprocessing
from mri.splits import find_source
from utils import DataError

SIZE = (256, 128)


def noise(shape: tuple[int, ...] = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


def list_caches(tmp_path: Path, folder: str = "cache") -> list[str]:
    return sorted(path.name for path in (tmp_path / folder).iterdir() if path.is_dir())


def fail(*_, **__):
    raise AssertionError("was called although the cache is complete")


@pytest.fixture
def source(tmp_path, write_slices) -> Source:
    """HipMRI's 2D version with 4 training and 2 test slices."""
    return find_hipmri(write_slices(tmp_path / "d"))


def read_all(slices: dataset.SliceDataset) -> torch.Tensor:
    return slices.batch(torch.arange(len(slices)))


# ---------------------------------------------------------------- when a cache is stale


def test_a_cache_is_read_without_decoding(source, load, monkeypatch):
    first = load(source, "train")
    monkeypatch.setattr(cache, "decode_file", fail)
    second = load(source, "train")
    assert second.names == first.names
    assert torch.equal(read_all(second), read_all(first))
    with pytest.raises(AssertionError):  # another split must be decoded
        load(source, "test")


@pytest.mark.parametrize("change", ["time", "size", "added", "removed", "renamed"])
def test_a_changed_file_makes_a_new_cache_and_deletes_the_old(
    tmp_path, source, write_nifti, load, change
):
    load(source, "train")
    load(source, "test")
    before = list_caches(tmp_path)
    path = source.splits["train"][1]
    status = path.stat()
    expected = 4
    if change == "time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9) + b"\0" * 8)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "added":
        expected = 5
        write_nifti(path.with_name("case_004_week_0_slice_9.nii.gz"), noise())
    elif change == "removed":
        expected = 3
        path.unlink()
    else:
        path.rename(path.with_name("case_004_week_0_slice_9.nii.gz"))
    assert len(load(find_hipmri(tmp_path / "d"), "train")) == expected
    after = list_caches(tmp_path)
    assert len(after) == 2
    assert after[0] == before[0]  # of the test split
    assert after[1] != before[1]


def test_each_preprocessing_and_format_has_its_own_cache(tmp_path, load_images, monkeypatch):
    wide = noise((256, 144))
    resized = load_images(wide)
    cropped = load_images(wide, fit="crop")
    assert not torch.equal(resized[0], cropped[0])
    assert len(list_caches(tmp_path)) == 2
    monkeypatch.setattr(cache, "CACHE_FORMAT", 999)
    load_images(wide)
    assert len(list_caches(tmp_path)) == 3


def test_each_number_of_planes_has_its_own_cache(tmp_path, write_nifti, load):
    path = tmp_path / "release" / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz"
    write_nifti(path, noise((24, 20, 16)))
    source = find_hipmri(tmp_path / "release")
    for planes in (2, 3, 2):
        assert len(load(source, "train", Preprocessing.resolve(source, planes=planes))) == planes


def test_a_bad_file_is_tried_again(source, load, monkeypatch):
    open_path = Path.open

    def refuse(path: Path, *args, **kwargs):
        if path.name == "case_004_week_0_slice_2.nii.gz":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_path(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match=r"slice_2.nii.gz cannot be read \(Permission denied"):
            load(source, "train")
        assert len(load(source, "train", skip_bad_files=True)) == 3
    assert len(load(source, "train")) == 4


@pytest.mark.parametrize(
    "damage", ["pixels.npy", "slices.npz", "both missing", "other type", "fewer rows"]
)
def test_a_damaged_cache_is_replaced(tmp_path, source, load, damage):
    expected = read_all(load(source, "train"))
    (name,) = list_caches(tmp_path)
    folder = tmp_path / "cache" / name
    if damage == "other type":
        np.save(folder / "pixels.npy", np.zeros((4, *SIZE), np.float32))
    elif damage == "fewer rows":
        np.save(folder / "pixels.npy", np.zeros((3, *SIZE), np.int16))
    elif damage == "both missing":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-100])
    assert torch.equal(read_all(load(source, "train")), expected)
    assert list_caches(tmp_path) == [name]


# ---------------------------------------------------------------- what is stored


def test_records_have_the_fields_of_slice_record():
    assert cache.SLICE_DTYPE.names == ("row", "file", *SliceRecord._fields)


def test_each_file_has_as_many_rows_as_planes(tmp_path, write_nifti, load):
    for i in range(6):
        shape = (20, 40, 28) if i == 3 else (20, 28)
        write_nifti(tmp_path / "mixed" / f"sub-{i}.nii.gz", noise(shape) + i)
    manifest = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(6)}}
    source = find_source(tmp_path / "mixed", "coronal", manifest=manifest)
    slices = load(source, "train", Preprocessing.resolve(source, size=(16, 32)))
    assert [name.case for name in slices.names] == ["0", "1", "2", *["3"] * 40, "4", "5"]
    (pixels_path,) = tmp_path.glob("cache/*/pixels.npy")
    assert np.load(pixels_path, mmap_mode="r").shape == (45, 16, 32)
    means = [noise((20, 28)).mean() + i for i in (0, 1, 2, 4, 5)]
    np.testing.assert_allclose(slices.mean[[0, 1, 2, 43, 44]], means, atol=5)
    np.testing.assert_allclose(slices.mean[3:43], noise((20, 40, 28)).mean((0, 2)) + 3, atol=15)


def test_files_that_change_while_they_are_read_do_not_overwrite_others(
    tmp_path, write_nifti, load, monkeypatch
):
    for i in range(3):
        write_nifti(tmp_path / "d" / f"sub-{i}.nii.gz", noise((20, 24, 28)))
    manifest = {"train": {str(i): [f"sub-{i}.nii.gz"] for i in range(3)}}
    source = find_source(tmp_path / "d", "coronal", manifest=manifest)
    earlier = {"sub-1.nii.gz": write_nifti(tmp_path / "earlier.nii.gz", noise((20, 5, 28)))}
    read_header = nifti.read_header
    monkeypatch.setattr(
        nifti, "read_header", lambda path: read_header(earlier.get(path.name, path))
    )
    message = r"(?s)1 of the 3 files.*sub-1.nii.gz was changed while it was read"
    with pytest.raises(DataError, match=message):
        load(source, "train")


def test_headers_that_claim_too_many_planes_reserve_no_rows(tmp_path, write_nifti, load):
    write_nifti(tmp_path / "d" / "sub-0.nii.gz", noise((16, 16, 4)))
    content = bytearray(nib.Nifti1Image(noise((16, 16, 4)), np.eye(4)).to_bytes())
    content[46:48] = (30000).to_bytes(2, "little")  # planes
    (tmp_path / "d" / "sub-1.nii").write_bytes(content)
    (tmp_path / "d" / "sub-2.nii.gz").write_bytes(gzip.compress(content))
    manifest = {"train": {"0": ["sub-0.nii.gz"], "1": ["sub-1.nii"], "2": ["sub-2.nii.gz"]}}
    source = find_source(tmp_path / "d", "axial", manifest=manifest)
    preprocessing = Preprocessing.resolve(source, axis="axial")
    message = r"(?s)2 of the 3 files.*sub-1.nii is truncated.*sub-2.nii.gz is trunc"
    with pytest.raises(DataError, match=message):
        load(source, "train", preprocessing)
    assert len(load(source, "train", preprocessing, skip_bad_files=True)) == 4
    (pixels_path,) = tmp_path.glob("cache/*/pixels.npy")
    assert len(np.load(pixels_path, mmap_mode="r")) == 6


# ---------------------------------------------------------------- several runs, and killed ones


def test_the_first_of_two_runs_wins(tmp_path, source, load, monkeypatch):
    """Another run finishes the same cache during a build, as on a file system without locks."""
    load(source, "train", cache_dir=tmp_path / "other")
    (name,) = list_caches(tmp_path, "other")
    final = tmp_path / "cache" / name
    decode_file = cache.decode_file

    def decode_late(*args):
        if not final.exists():
            shutil.copytree(tmp_path / "other" / name, final)
            (final / "winner").touch()
        return decode_file(*args)

    monkeypatch.setattr(cache, "decode_file", decode_late)
    assert len(load(source, "train")) == 4
    assert list_caches(tmp_path) == [name]
    assert (final / "winner").exists()


def test_remains_of_killed_runs_are_deleted_after_a_day(tmp_path, source, load):
    load(source, "train")
    (name,) = list_caches(tmp_path)
    recent = tmp_path / "cache" / f"{name}.tmp-1-recent"
    old = tmp_path / "cache" / f"{name}.tmp-1-old"
    (tmp_path / "cache" / name).rename(recent)
    shutil.copytree(recent, old)
    os.utime(old, (0, 0))
    assert len(load(source, "train")) == 4
    assert list_caches(tmp_path) == [name, recent.name]  # the recent one may belong to a live run


def test_an_interrupted_build_leaves_nothing(tmp_path, source, load, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "decode_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(source, "train")
    assert list_caches(tmp_path) == []


# ---------------------------------------------------------------- worker processes


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_give_the_same_cache_as_one_process(
    tmp_path, write_slices, load, monkeypatch, method
):
    data = write_slices(tmp_path / "d", train=80, shape=(64, 36))
    (data / "keras_slices_train/case_004_week_0_slice_70.nii.gz").write_bytes(b"")
    source = find_hipmri(data)
    alone = load(source, "train", workers=1, skip_bad_files=True)
    worker_pool = cache.worker_pool
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context = processes.fork_context()
    num_workers = 2 if method == "fork" else 1  # the others import torch again, which is slow

    def idle_pool(_):
        pool = worker_pool(num_workers, context)
        pool.submit(os.getpid).result()
        time.sleep(0.5)  # for a worker that takes another process for its parent to end
        return pool

    monkeypatch.setattr(cache, "worker_pool", idle_pool)
    other = tmp_path / "other"
    pooled = load(source, "train", workers=2, skip_bad_files=True, cache_dir=other)
    assert len(alone) == 79
    assert pooled.names == alone.names
    assert pooled.notes == alone.notes
    assert torch.equal(read_all(pooled), read_all(alone))


def test_few_slices_are_decoded_without_processes(tmp_path, source, load, monkeypatch):
    monkeypatch.setattr(cache, "worker_pool", fail)
    assert len(load(source, "train")) == 4
    monkeypatch.setattr(cache, "POOL_FROM", 2)
    monkeypatch.setattr(cache, "cores", lambda: 2)
    with pytest.raises(AssertionError):
        load(source, "train", cache_dir=tmp_path / "other")


def test_a_killed_worker_is_reported(tmp_path, source, load, monkeypatch):
    context = multiprocessing.get_context("fork")  # workers inherit the patch below
    monkeypatch.setattr(cache, "worker_pool", partial(cache.worker_pool, context=context))
    monkeypatch.setattr(cache, "decode_file", lambda *_: os._exit(1))
    with pytest.raises(DataError, match="was killed, most likely because memory ran out"):
        load(source, "train", workers=2)
    assert list_caches(tmp_path) == []


# ---------------------------------------------------------------- where it is, and disk space


def test_too_little_disk_space_is_reported_at_the_start(tmp_path, source, load, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"(?s)0.00 GB needed, 0.00 GB free.*--cache-dir"):
        load(source, "train")
    assert list_caches(tmp_path) == []


def test_a_full_quota_is_reported_at_the_start(source, load, monkeypatch):
    def fail_with(number: int):
        def fallocate(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)

    fail_with(errno.EDQUOT)
    with pytest.raises(DataError, match=r"(?s)quota exceeded.*--cache-dir"):
        load(source, "train")
    fail_with(errno.EOPNOTSUPP)  # a file system that cannot reserve space
    assert len(load(source, "train")) == 4


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, source, load, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    message = r"cannot write the cache .* (Not a directory|File exists)"
    with pytest.raises(DataError, match=message):
        load(source, "train", cache_dir=tmp_path / "file")
    load(source, "train")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert len(load(source, "train")) == 4  # a complete cache is only read
    with pytest.raises(DataError, match="Permission denied"):
        load(source, "test")


def test_the_argument_comes_before_the_environment(tmp_path, source, monkeypatch):
    monkeypatch.setenv("HIPMRI_CACHE", str(tmp_path / "variable"))
    for folder, argument in (("argument", tmp_path / "argument"), ("variable", None)):
        dataset.load_split(source, "train", cache_dir=argument, progress=False)
        assert len(list_caches(tmp_path, folder)) == 1


@pytest.mark.parametrize(
    ("platform", "folder"),
    [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")],
)
def test_the_default_is_the_cache_folder_of_the_user(tmp_path, monkeypatch, platform, folder):
    monkeypatch.delenv("HIPMRI_CACHE")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache.cache_root(None) == tmp_path / "xdg/hipmri-vqvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root(None) == tmp_path / folder / "hipmri-vqvae"
