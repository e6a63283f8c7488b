"""Scores inside organs, and the segmentations that they need."""

import numpy as np
import pytest
import torch

import dataset
from evaluation.organs import ORGANS, evaluate_organs, organ_scores
from modules import VQVAE
from mri.hipmri import find_hipmri
from mri.preprocessing import Preprocessing


def test_organ_scores_measure_the_organ_only():
    images = torch.randn(2, 1, 64, 48, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 64, 48, dtype=torch.uint8)
    labels[0, 8:40, 8:40] = ORGANS.index("bone")
    labels[0, 40:44, 8:12] = ORGANS.index("bladder")  # 16 pixels: too few
    changed = images.clone()
    changed[0, 0][labels[0] == 0] += 1  # outside all organs
    changed[0, 0, 20:30, 20:30] += 0.5
    scores = organ_scores(images, changed, labels)
    assert list(scores) == list(ORGANS[1:])
    bone = scores["bone"]
    std = images[0].std(correction=0)
    assert bone["bias"][0] == pytest.approx(float(0.5 * 100 / 32**2 / std), rel=1e-4)
    value_range = images[0].max() - images[0].min()
    squared_error = ((changed[0] - images[0]) / value_range).square()
    expected_psnr = -10 * squared_error[labels[0][None] == 2].mean().log10()
    assert bone["psnr"][0] == pytest.approx(float(expected_psnr), abs=0.1)  # without clipping
    assert bone["ssim"][0] < 0.999
    assert bone["psnr"][1].isnan()
    for organ in ("bladder", "rectum"):  # too small; not shown
        for values in scores[organ].values():
            assert values.isnan().all()


@pytest.mark.parametrize(("fit", "expected"), [("resize", 128 * 64), ("crop", 128 * 72)])
def test_segmentations_of_a_split_are_fitted_like_its_slices(
    tmp_path, write_nifti, noise, fit, expected
):
    labels = np.zeros((256, 144), np.uint8)
    labels[64:192, 36:108] = 5
    for split in ("train", "validate", "test"):
        path = tmp_path / f"keras_slices_{split}" / "case_040_week_0_slice_1.nii.gz"
        write_nifti(path, noise((256, 144)))
    write_nifti(tmp_path / "keras_slices_seg_test" / "seg_040_week_0_slice_1.nii.gz", labels)
    source = find_hipmri(tmp_path)
    preprocessing = Preprocessing.resolve(source, fit=fit)
    train = dataset.load_split(source, "train", preprocessing, progress=False)
    test = dataset.load_split(source, "test", preprocessing, progress=False)
    assert train.labels() is None
    fitted = test.labels()
    assert fitted.shape == (1, 256, 128)
    assert fitted.unique().tolist() == [0, 5]
    assert int((fitted == 5).sum()) == expected
    model = VQVAE(hidden_channels=8, residual_channels=4).eval()
    assert evaluate_organs(model, train, 2) == {}
    assert list(evaluate_organs(model, test, 2)) == ["prostate"]
