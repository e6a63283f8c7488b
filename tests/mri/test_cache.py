"""dataset.py: what is found, read, refused, normalised and cached."""

import errno
import gzip
import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
from mri import cache, preprocessing
from mri.hipmri import find_hipmri
from utils import DataError

SHAPE = (256, 128)


@pytest.fixture
def load(tmp_path):
    """`load_split` without a progress bar, its cache in the test's folder."""
    return partial(dataset.load_split, cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def one(tmp_path, write_nifti, load):
    """one(arrays, **options): a training split of these arrays, in order, loaded."""

    def make(*arrays: np.ndarray, affine=None, **options) -> dataset.SliceDataset:
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        for i, array in enumerate(arrays):
            write_nifti(tmp_path / "one/train" / f"case_004_week_0_slice_{i}.nii", array, affine)
        return load(find_hipmri(tmp_path / "one"), "train", **options)

    return make


def noise(shape=SHAPE, seed=0, dtype=np.int16, high=900) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def no_decoding(*_, **__):
    raise AssertionError("decoded a file although the cache holds it")


def die(*_):
    os._exit(1)  # what the kernel does to a process when memory runs out, seen from outside


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


# --------------------------------------------------------------------------------- names and finding


def test_second_load_decodes_nothing(tmp_path, write_slices, load, monkeypatch):
    data = write_slices(tmp_path / "d")
    first = load(find_hipmri(data), "train")
    monkeypatch.setattr(dataset.nifti, "read_nifti", no_decoding)
    again = load(find_hipmri(data), "train")
    assert again.names == first.names
    assert torch.equal(again.batch(torch.arange(4)), first.batch(torch.arange(4)))
    with pytest.raises(
        DataError, match="AssertionError"
    ):  # the patch works: another split must be decoded
        load(find_hipmri(data), "test")


@pytest.mark.parametrize("change", ["mtime", "size", "added", "removed"])
def test_changed_files_are_noticed_and_old_caches_deleted(
    tmp_path, write_slices, write_nifti, load, change
):
    data = write_slices(tmp_path / "d")
    load(find_hipmri(data), "train")
    load(find_hipmri(data), "test")
    before, path = (
        caches(tmp_path / "cache"),
        data / "keras_slices_train/case_004_week_0_slice_1.nii.gz",
    )
    expected, stat = 4, path.stat()
    if change == "mtime":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9) + b"\0" * 8)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "added":
        expected = 5
        write_nifti(path.with_name("case_004_week_0_slice_9.nii.gz"), noise())
    else:
        expected = 3
        path.unlink()
    assert len(load(find_hipmri(data), "train")) == expected
    after = caches(tmp_path / "cache")
    assert len(after) == 2 and [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_each_preprocessing_has_its_cache(tmp_path, one, monkeypatch):
    wide = noise((256, 144))
    resized, cropped = one(wide)[0], one(wide, fit="crop")[0]
    assert not torch.equal(resized, cropped) and len(caches(tmp_path / "cache")) == 2
    monkeypatch.setattr(dataset, "CACHE_FORMAT", 999)
    one(wide)
    assert len(caches(tmp_path / "cache")) == 3


def test_planes_have_their_own_caches(tmp_path, write_nifti, load):
    source = find_hipmri(write_3d(tmp_path / "release", write_nifti))
    assert [len(load(source, "train", planes=planes)) for planes in (2, 3, 2)] == [2, 3, 2]


@pytest.mark.parametrize(
    "damage", ["pixels.npy", "slices.npz", "both missing", "other type", "fewer rows"]
)
def test_damaged_cache_is_rebuilt(tmp_path, write_slices, load, damage):
    data = write_slices(tmp_path / "d")
    expected = load(find_hipmri(data), "train").batch(torch.arange(4))
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    if damage.startswith(("pixels", "slices")):
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-100])
    elif damage == "other type":
        np.save(folder / "pixels.npy", np.zeros((4, *SHAPE), np.float32))
    elif damage == "fewer rows":
        np.save(folder / "pixels.npy", np.zeros((3, *SHAPE), np.int16))
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert torch.equal(load(find_hipmri(data), "train").batch(torch.arange(4)), expected)
    assert caches(tmp_path / "cache") == [folder.name]


def test_the_first_of_two_runs_wins(tmp_path, write_slices, load, monkeypatch):
    """Another run finishes the same cache while this one builds: its folder stays, ours goes."""
    source, build = find_hipmri(write_slices(tmp_path / "d")), cache.build

    def race(folder, *args):
        build(folder, *args)
        final = folder.with_name(folder.name.split(".tmp-")[0])
        shutil.copytree(folder, final)
        (final / "winner").touch()

    monkeypatch.setattr(dataset, "build", race)
    assert len(load(source, "train")) == 4
    (folder,) = caches(tmp_path / "cache")
    assert (tmp_path / "cache" / folder / "winner").exists()


def test_leftovers_of_killed_runs(tmp_path, write_slices, load):
    source = find_hipmri(write_slices(tmp_path / "d"))
    load(source, "train")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    old, young = (folder.with_name(f"{folder.name}.tmp-1-{age}") for age in ("old", "young"))
    folder.rename(young)
    shutil.copytree(young, old)
    os.utime(old, (0, 0))
    assert len(load(source, "train")) == 4
    assert caches(tmp_path / "cache") == [
        folder.name,
        young.name,
    ]  # the young one's run may be alive


def test_an_interrupted_build_leaves_nothing(tmp_path, write_slices, load, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "decode_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(find_hipmri(write_slices(tmp_path / "d")), "train")
    assert caches(tmp_path / "cache") == []


def test_processes_give_the_same_cache_as_none(tmp_path, write_slices, load):
    data = write_slices(tmp_path / "d", train=150, shape=(64, 36))
    (data / "keras_slices_train/case_004_week_0_slice_70.nii.gz").write_bytes(b"")
    source = find_hipmri(data)
    here = load(source, "train", workers=1, skip_bad_files=True)
    there = load(source, "train", workers=2, skip_bad_files=True, cache_dir=tmp_path / "other")
    assert len(here) == 149 and here.names == there.names and here.notes == there.notes
    assert torch.equal(here.batch(torch.arange(149)), there.batch(torch.arange(149)))


def test_small_jobs_start_no_processes(tmp_path, write_slices, load, monkeypatch):
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", no_decoding)
    source = find_hipmri(write_slices(tmp_path / "d"))
    assert len(load(source, "train")) == 4
    monkeypatch.setattr(dataset, "POOL_FROM", 2)
    monkeypatch.setattr(dataset, "cores", lambda: 2)
    with pytest.raises(AssertionError):
        load(source, "train", cache_dir=tmp_path / "other")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_of_every_kind(tmp_path, write_slices, method):
    """What a pool is given pickles, a fresh interpreter can run it, and workers know when their parent has ended."""
    files = find_hipmri(write_slices(tmp_path / "d")).splits["train"]
    jobs = [cache.Job(i, file, range(i, i + 1)) for i, file in enumerate(files)]
    task = (tmp_path / "pixels.npy", jobs, preprocessing.Preprocessing("2D", "resize", 1))
    cache.reserve(task[0], 4, preprocessing.SIZE)
    expected = cache.decode_jobs(*pickle.loads(pickle.dumps(task)))
    pixels = np.load(task[0])
    cache.reserve(task[0], 4, preprocessing.SIZE)
    with ProcessPoolExecutor(1, multiprocessing.get_context(method), cache.start_worker) as pool:
        time.sleep(1)  # long enough for a worker that takes another process for its parent
        assert pool.submit(cache.decode_jobs, *task).result() == expected
    assert np.array_equal(np.load(task[0]), pixels) and pixels.any()


def test_a_killed_worker_is_reported(tmp_path, write_slices, load, monkeypatch):
    monkeypatch.setattr(dataset, "decode_jobs", die)
    with pytest.raises(DataError, match="want of memory"):
        load(find_hipmri(write_slices(tmp_path / "d")), "train", workers=2)
    assert caches(tmp_path / "cache") == []


def test_no_room_for_the_cache(tmp_path, write_slices, load, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    with pytest.raises(DataError, match=r"(?s)0.00 GB needed, 0.00 GB free.*--cache-dir"):
        load(find_hipmri(write_slices(tmp_path / "d")), "train")
    assert caches(tmp_path / "cache") == []


def test_a_full_quota_is_an_error_at_the_start(tmp_path, write_slices, load, monkeypatch):
    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"(?s)Disk quota exceeded.*--cache-dir"):
        load(find_hipmri(write_slices(tmp_path / "d")), "train")

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert len(load(find_hipmri(tmp_path / "d"), "train")) == 4


def test_cache_that_cannot_be_written(tmp_path, write_slices, load, monkeypatch):
    source = find_hipmri(write_slices(tmp_path / "d"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"can't write the cache .* (Not a directory|File exists)"):
        load(source, "train", cache_dir=tmp_path / "file")
    load(source, "train")

    def read_only(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert len(load(source, "train")) == 4  # a finished cache needs no writing
    with pytest.raises(DataError, match="Permission denied"):
        load(source, "test")


def test_where_the_cache_goes(tmp_path, write_slices, monkeypatch):
    source = find_hipmri(write_slices(tmp_path / "d"))
    for folder, argument in (("argument", tmp_path / "argument"), ("variable", None)):
        monkeypatch.setenv("HIPMRI_CACHE", str(tmp_path / "variable"))
        dataset.load_split(source, "train", cache_dir=argument, progress=False)
        assert len(caches(tmp_path / folder)) == 1
    monkeypatch.delenv("HIPMRI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root(None) == tmp_path / "xdg/hipmri-vqvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for platform, place in (
        ("linux", ".cache"),
        ("darwin", "Library/Caches"),
        ("win32", "AppData/Local"),
    ):
        monkeypatch.setattr(dataset.sys, "platform", platform)
        assert cache.cache_root(None) == tmp_path / place / "hipmri-vqvae"


# ------------------------------------------------------------------------------------------ real data
