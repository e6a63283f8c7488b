"""benchmarks/noise_ceiling.py: the score of a perfect denoiser of the phantom."""

import noise_ceiling
import pytest

from mri import phantom
from utils import UserError


def test_the_sample_has_the_ceiling_that_the_docs_state(capsys):
    assert noise_ceiling.main([]) == 0
    assert "noise ceiling: ssim 0.979" in capsys.readouterr().out


def test_every_slice_of_every_scan_is_scored():
    scores = noise_ceiling.noise_ceiling([(40, 0), (41, 0)], slices_per_scan=2)
    assert scores.shape == (4,)
    assert (scores > 0.85).all() and (scores < 0.995).all()


def test_without_noise_the_ceiling_is_1(monkeypatch):
    make_volume = phantom.make_volume

    def without_noise(*arguments, noise, **options):
        return make_volume(*arguments, noise=False, **options)

    monkeypatch.setattr(phantom, "make_volume", without_noise)
    scores = noise_ceiling.noise_ceiling([(40, 0)], slices_per_scan=1)
    assert scores == pytest.approx(1)


def test_the_scans_are_the_test_volumes_of_the_sample():
    expected = [job[1:3] for job in phantom.plan((12, 2, 2)) if job[0] == "test"]
    assert noise_ceiling.scans_of_test_split(2) == expected


@pytest.mark.parametrize("flag", ["--volumes", "--slices"])
def test_impossible_numbers_are_errors(flag):
    with pytest.raises(UserError, match=f"{flag}.* 0.*; expected"):
        noise_ceiling.main([flag, "0"])
