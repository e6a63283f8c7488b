"""What is found in folders: links, content that is missing, copies, and other formats."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mri.folders import find_images, search_folder, select_images
from mri.formats import describe_formats
from mri.hipmri import find_hipmri
from mri.splits import find_source
from utils import DataError


def make_files(root: Path, *names: str) -> Path:
    """Make empty files."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def names_in(root: Path) -> list[str]:
    """Return the images that are found in a folder, relative to it."""
    return [file.relative_to(root).as_posix() for file in find_images(root)[0]]


def notes_on(root: Path) -> str:
    return "\n".join(find_images(root)[1])


# ---------------------------------------------------------------- segmentations


def test_segmentations_in_split_folders_are_left_out_and_reported(tmp_path):
    """Without --axis. Some are recognised by name, one by its header."""
    make_files(
        tmp_path, "train/p0.nii.gz", "train/p0_seg.nii.gz", "train/p10.nii", "val/p1Mask.nii"
    )
    make_files(tmp_path, "val/p1.nii", "val/p1_error.nii.gz", "masks/train/p0.nii")
    image = nib.Nifti1Image(np.zeros((9, 9), np.int16), np.eye(4))
    image.header.set_intent("label")
    (tmp_path / "val" / "organs.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    source = find_hipmri(tmp_path)
    folder = tmp_path / "train"
    assert source.splits == {
        "train": [folder / "p0.nii.gz", folder / "p10.nii"],
        "validate": [tmp_path / "val" / "p1.nii"],
    }
    assert source.notes == [
        f"{tmp_path}: train 2, validate 1 slices",
        "2 file(s) are left out because they are named like segmentations; for example, "
        "train/p0_seg.nii.gz",
        "1 file(s) are left out because their headers mark them as label maps (NIfTI intent code "
        "1002 or 1003); for example, val/organs.nii.gz",
        "1 file(s) are left out because they are named like outputs of predict.py; for example, "
        "val/p1_error.nii.gz",
        "the paths of 3 slices name no subject; each of these slices counts as a subject of its "
        "own",
    ]


def test_folders_of_segmentations_are_not_a_second_data_set(tmp_path):
    make_files(tmp_path, "pelvis/train/p0.nii", "pelvis_masks/train/p0.nii")
    assert find_hipmri(tmp_path).root == tmp_path / "pelvis"


def test_volumes_may_be_in_a_folder_named_labelled(tmp_path):
    folder = tmp_path / "Labelled_weekly_MR_images"
    make_files(folder, "Case_004_Week0_LFOV.nii.gz", "Case_004_Week0_SEMANTIC_LFOV.nii.gz")
    source = find_hipmri(folder)
    assert source.splits == {"train": [folder / "Case_004_Week0_LFOV.nii.gz"]}
    assert "1 file(s) are left out because they are named like segmentations" in source.notes[2]


def test_names_above_the_folder_do_not_count(tmp_path):
    root = make_files(tmp_path / "labelsTr", "p0.nii.gz", "p1.nii.gz")
    assert names_in(root) == ["p0.nii.gz", "p1.nii.gz"]


@pytest.mark.parametrize("axis", [None, "axial"])
def test_a_folder_without_images_says_what_it_contains(tmp_path, axis):
    make_files(tmp_path, "train/p0_reconstruction.nii.gz", "train/p0_seg.nii", "train/a.png")
    with pytest.raises(DataError) as error:
        find_source(tmp_path, axis)
    lines = str(error.value).splitlines()
    if axis:
        problem = f"none of the 2 .nii or .nii.gz file(s) in {tmp_path} is an image:"
        assert lines[0] == problem
    for line in (
        "  1 file(s) are left out because they are named like outputs of predict.py; for example, "
        "train/p0_reconstruction.nii.gz",
        "  1 file(s) are left out because they are named like segmentations; for example, "
        "train/p0_seg.nii",
        "  files with other endings: 1 .png",
    ):
        assert line in lines


# ---------------------------------------------------------------- links


def test_linked_folders_and_files_are_searched(tmp_path):
    make_files(tmp_path / "store", "a/T1.nii.gz", "b/T1.nii.gz", "c.nii.gz")
    root = make_files(tmp_path / "d", "sub-0/T1.nii.gz")
    link(root / "sub-1", tmp_path / "store" / "a")
    link(root / "sub-2", "../store/b")
    link(root / "sub-3" / "T1.nii.gz", tmp_path / "store" / "c.nii.gz")
    assert names_in(root) == [f"sub-{i}/T1.nii.gz" for i in range(4)]
    assert len(find_source(root, "axial").subjects) == 4
    link(tmp_path / "d2", root)
    assert names_in(tmp_path / "d2") == names_in(root)


def test_loops_of_links_end_and_folders_are_searched_once(tmp_path):
    root = make_files(tmp_path / "d", "b/T1.nii.gz", "outside/T1.nii.gz")
    (root / "outside").rename(tmp_path / "outside")
    link(root / "b" / "up", "..")
    link(root / "b" / "all", tmp_path)  # contains d: would lead out of the data
    link(root / "a", root / "b")  # before b in every order
    link(root / "self", "self")
    link(root / "x", tmp_path / "outside")
    link(root / "y", tmp_path / "outside")
    link(tmp_path / "outside" / "back", root)
    assert names_in(root) == ["b/T1.nii.gz", "x/T1.nii.gz"]
    notes = notes_on(root)
    assert "3 link(s) are not followed because their folders are searched anyway" in notes
    assert "self is a link to self, which cannot be opened (Too many levels" in notes


def test_a_data_set_and_a_link_to_it_are_one(tmp_path, write_slices):
    data = write_slices(tmp_path / "v2")
    link(tmp_path / "latest", data)
    assert find_hipmri(tmp_path).root == data


def test_broken_links_and_unreadable_folders_are_listed(tmp_path, monkeypatch):
    root = make_files(tmp_path / "d", "sub-0/T1.nii.gz", "sub-7/T1.nii.gz")
    link(root / "sub-1", "/nowhere/sub-1")
    link(root / "sub-2" / "T1.nii.gz", "../../../.git/annex/objects/x/MD5E-s9--1.nii.gz")
    link(root / "sub-2" / "T1.json", "../../../.git/annex/objects/x/MD5E-s9--2.json")
    link(root / "README", ".git/annex/objects/x/MD5E-s9--3")
    (root / "sub-3").mkdir()
    (root / "sub-3" / "T1.nii.gz").write_text("/annex/objects/MD5E-s9--1.nii.gz\n")
    (root / "sub-4").mkdir()
    (root / "sub-4" / "T1.nii").write_text("version https://git-lfs.github.com/spec/v1\n")
    os.mkfifo(root / "pipe.nii")
    scandir = os.scandir

    def scandir_or_fail(folder):
        if Path(folder).name == "sub-7":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir_or_fail)
    assert names_in(root) == ["sub-0/T1.nii.gz"]
    annex = "its content is missing; fetch it with `datalad get` or `git annex get`"
    assert notes_on(root).splitlines() == [
        "warning: 6 file(s) or folder(s) cannot be read:",
        "  pipe.nii is a pipe, a socket or a device",
        "  sub-1 is a link to /nowhere/sub-1, which cannot be opened (No such file or directory)",
        f"  sub-2/T1.nii.gz is a git-annex link; {annex}",
        f"  sub-3/T1.nii.gz is a git-annex pointer; {annex}",
        "  sub-4/T1.nii is a Git LFS pointer; its content is missing; fetch it with `git lfs pull`",
        "  ... and 1 more",
    ]


@pytest.mark.parametrize("axis", [None, "axial"])
def test_a_data_set_without_content_says_so(tmp_path, load, axis):
    for name in ("train/p0.nii.gz", "val/p1.nii.gz"):
        link(tmp_path / name, "../.git/annex/objects/x/MD5E-s9--1.nii.gz")
    with pytest.raises(DataError, match=r"(?s)is a git-annex link; .*`datalad get`"):
        load(find_source(tmp_path, axis), "train")


# ---------------------------------------------------------------- copies


def test_a_scan_that_is_there_twice_is_used_once(tmp_path):
    make_files(tmp_path, "train/x.nii", "train/x.nii.gz", "train/y.nii", "other/y.nii.gz")
    link(tmp_path / "train" / "alias.nii.gz", "x.nii.gz")
    assert names_in(tmp_path) == ["other/y.nii.gz", "train/x.nii.gz", "train/y.nii"]
    note = "2 file(s) are left out because the same scan is next to them"
    assert note in notes_on(tmp_path)
    source = find_hipmri(tmp_path)
    assert [file.name for file in source.splits["train"]] == ["x.nii.gz", "y.nii"]
    assert note in source.notes[1]


@pytest.mark.parametrize(
    "name", ["x (1)", "x(2)", "x - Copy", "x - Copy (2)", "x copy 2", "x Kopie"]
)
def test_copies_by_file_managers_are_used_once(tmp_path, name):
    make_files(tmp_path, "x.nii.gz", f"{name}.nii.gz", "y (1).nii.gz")
    assert names_in(tmp_path) == ["x.nii.gz", "y (1).nii.gz"]
    (tmp_path / f"{name}.nii.gz").write_bytes(b"another scan")
    assert len(names_in(tmp_path)) == 3


def test_folders_of_the_system_are_not_searched(tmp_path):
    folders = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", ".Trash-1000")
    make_files(tmp_path, "sub-1.nii", *(f"{folder}/sub-2.nii" for folder in folders))
    assert names_in(tmp_path) == ["sub-1.nii"]


def test_links_to_a_file_of_another_split_are_reported(tmp_path):
    make_files(tmp_path, "train/a.nii", "val/b.nii")
    link(tmp_path / "test" / "c.nii", "../train/a.nii")
    for axis in (None, "axial"):
        notes = find_source(tmp_path, axis).notes
        assert sum("of train and test are links to the same file" in note for note in notes) == 1


def test_a_copy_of_a_segmentation_does_not_replace_an_image(tmp_path):
    files = [tmp_path / name for name in ("x.nii", "x_seg.nii.gz")]
    assert select_images(files, tmp_path)[0] == files[:1]


# ---------------------------------------------------------------- other formats


def write_dicom(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")
    return path


@pytest.mark.parametrize("axis", [None, "axial"])
@pytest.mark.parametrize("name", ["IM001.dcm", "IM001", "1.2.840.113.7", "IM001.IMA"])
def test_folders_of_dicom_files_say_how_to_convert_them(tmp_path, axis, name):
    folder = write_dicom(tmp_path / "sub-1" / name).parent
    with pytest.raises(DataError) as error:
        find_source(tmp_path, axis)
    line = "  1 DICOM file(s) are not read; convert them to .nii.gz: dcm2niix -z y -o OUT "
    assert f"{line}'{folder}'" in str(error.value)


@pytest.mark.parametrize("axis", [None, "axial"])
def test_pairs_of_files_are_converted_by_the_printed_command(tmp_path, monkeypatch, axis):
    voxels = np.arange(8**3, dtype=np.int16).reshape(8, 8, 8)
    nib.Nifti1Pair(voxels, np.eye(4)).to_filename(tmp_path / "p0.hdr")
    with pytest.raises(DataError) as error:
        find_source(tmp_path, axis)
    (line,) = [line for line in str(error.value).splitlines() if ".hdr/.img" in line]
    assert line.startswith("  1 .hdr/.img file(s) are not read; convert them to .nii.gz: python -c")
    monkeypatch.chdir(tmp_path)
    exec(line.split('"')[1])
    assert np.array_equal(nib.load("scan.nii.gz").dataobj, voxels)


def test_other_formats_next_to_images_are_reported(tmp_path):
    make_files(tmp_path, "sub-1.nii.gz", "sub-2.hdr", "sub-2.img", "sub-3.mgz", "sub-4.nrrd")
    make_files(tmp_path, "sub-5.nii.bz2", "sub-6.nii.xz", "sub-7.nii.zst", "sub-8.mnc")
    notes = find_source(tmp_path, "axial").notes
    others = ("MINC", ".nii.bz2", ".nii.xz", ".nii.zst")
    for name in (".hdr/.img", "FreeSurfer", ".mha/.mhd/.nrrd", *others):
        assert any(note.startswith(f"1 {name} file(s) are not read") for note in notes)


def test_one_file_of_another_format_is_refused(tmp_path):
    path = write_dicom(tmp_path / "scan.dcm")
    with pytest.raises(DataError, match=r"is not a NIfTI file: 1 DICOM .* dcm2niix -z y"):
        find_source(path, "axial")
    path = write_dicom(tmp_path / "notes")
    path.write_bytes(b"text")
    assert describe_formats([path], read_files=True) == []


def test_the_search_for_an_error_message_is_limited(tmp_path):
    make_files(tmp_path, *(f"{i}/x.txt" for i in range(20)))
    assert len(search_folder(tmp_path, max_files=5).files) == 5


def test_a_copy_that_cannot_be_read_does_not_replace_an_image(tmp_path):
    files = [make_files(tmp_path, "x.nii") / "x.nii", tmp_path / "x.nii.gz"]
    link(files[1], "nowhere")
    assert files[0] in select_images(files, tmp_path)[0]
