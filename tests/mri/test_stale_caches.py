"""mri/stale_caches.py: which caches of decoded slices coexist, and which are deleted."""

import os
import shutil
from pathlib import Path

import pytest

from mri import cache, stale_caches
from mri.preprocessing import Preprocessing
from mri.splits import find_source
from utils import DataError


@pytest.fixture
def load_subjects(study, load, monkeypatch):
    """load_subjects("AB") loads a training split of these subjects; `.built` counts new caches.

    Other values of --seed, --split or --subjects give such splits of one folder.
    """
    build = cache.build

    def count(*arguments):
        load_subjects.built += 1
        return build(*arguments)

    def load_subjects(subjects: str):
        train = {}
        for subject in subjects:
            paths = (study / f"sub-{subject}").rglob("*.nii.gz")
            train[subject] = [str(path.relative_to(study)) for path in paths]
        source = find_source(study, "coronal", manifest={"train": train})
        return load(source, "train", Preprocessing.resolve(source, size=(32, 32)))

    load_subjects.built = 0
    monkeypatch.setattr(cache, "build", count)
    return load_subjects


def list_caches(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}


def test_caches_of_several_splits_coexist(load_subjects):
    splits = ("ABC", "BCD", "CDE")
    names = [load_subjects(subjects).names for subjects in splits]
    for _ in range(2):
        assert [load_subjects(subjects).names for subjects in splits] == names
    assert load_subjects.built == 3


def test_the_cache_that_was_not_used_for_the_longest_time_is_deleted(
    tmp_path, load_subjects, monkeypatch
):
    monkeypatch.setattr(stale_caches, "MAX_CACHES", 2)
    load_subjects("A")
    (first,) = list_caches(tmp_path)
    load_subjects("B")
    (second,) = list_caches(tmp_path) - {first}
    for name, time in ((first, 100), (second, 200)):
        os.utime(tmp_path / "cache" / name, (time, time))
    load_subjects("A")  # now the other one is the older one
    load_subjects("C")
    assert len(list_caches(tmp_path)) == 2
    assert first in list_caches(tmp_path)
    assert second not in list_caches(tmp_path)


@pytest.mark.parametrize("change", ["touched", "removed"])
def test_caches_of_files_that_have_changed_are_deleted(tmp_path, study, load_subjects, change):
    path = study / "sub-A" / "ses-1" / "anat" / "sub-A_ses-1_T2w.nii.gz"
    path = path.rename(path.with_name("sub-A_\n_T2w.nii.gz"))
    load_subjects("B")
    without = list_caches(tmp_path)
    load_subjects("AB")
    load_subjects("AC")
    assert len(list_caches(tmp_path)) == 3  # no file has changed
    if change == "touched":
        os.utime(path)
    else:
        path.unlink()
    load_subjects("D")
    assert len(list_caches(tmp_path)) == 2
    assert without < list_caches(tmp_path)


def test_caches_of_earlier_versions_are_used_and_limited(tmp_path, load_subjects, monkeypatch):
    load_subjects("A")
    load_subjects("B")
    for path in (tmp_path / "cache").glob("*/files"):
        path.unlink()
    load_subjects("C")
    load_subjects("A")
    assert load_subjects.built == 3
    monkeypatch.setattr(stale_caches, "MAX_CACHES", 1)
    load_subjects("D")
    assert len(list_caches(tmp_path)) == 1


def test_another_process_cannot_delete_a_cache_before_it_is_opened(
    tmp_path, load_subjects, monkeypatch
):
    """Caches are opened before the lock is released; other processes delete inside the lock."""
    delete = cache.delete_caches

    def delete_all(root, prefix, current, *arguments):
        delete(root, prefix, current, *arguments)
        if os.name != "nt":
            shutil.rmtree(current)

    monkeypatch.setattr(cache, "delete_caches", delete_all)
    slices = load_subjects("A")
    assert list_caches(tmp_path) == set()
    assert slices[0].isfinite().all()


def test_a_cache_that_another_program_deletes_is_an_error(load_subjects, monkeypatch):
    rename = Path.rename

    def rename_and_delete(path: Path, target: Path):
        rename(path, target)
        shutil.rmtree(target)

    monkeypatch.setattr(Path, "rename", rename_and_delete)
    with pytest.raises(DataError, match=r"was deleted .* by another program .* run the command"):
        load_subjects("A")
