"""benchmarks/image_codecs.py: codecs reproduce slices, and their bytes are counted correctly."""

import image_codecs
import numpy as np
import pytest
from image_codecs import CODECS, search

from utils import UserError

CODERS = [(name, depth) for name, codec in CODECS.items() for depth in codec.depths]


@pytest.mark.parametrize(("name", "depth"), CODERS)
def test_the_payload_is_the_file_without_headers(smooth_slices, name, depth):
    codec = CODECS[name]
    header_sizes = []
    for image, fraction in ((smooth_slices[0], 4), (smooth_slices[1], 4), (smooth_slices[1], 2)):
        coded = codec.encode(image, codec.settings[len(codec.settings) // fraction], depth)
        assert 0 < coded.payload < coded.file <= len(coded.data)
        header_sizes.append(coded.file - coded.payload)
        error = np.abs(codec.decode(coded.data, depth) - image).mean()
        assert error < 0.1
    assert error < 0.01  # at the finest of the three settings
    if name == "jpeg":  # either set of tables may be the smaller one
        assert min(header_sizes) > 100
    elif name == "webp":  # chunks are padded to even lengths
        assert {size // 2 for size in header_sizes} == {15}
    else:  # AVIF's lengths take one or two bytes
        assert max(header_sizes) - min(header_sizes) <= 2


def test_only_standard_jpeg_tables_are_free(smooth_slices):
    samples = np.rint(smooth_slices[0] * 255).astype(np.uint8)
    encode = image_codecs.imagecodecs.jpeg8_encode
    standard = encode(samples, level=50, optimize=False)
    optimised = encode(samples, level=50, optimize=True)
    scans = [file[file.index(b"\xff\xda") + 10 : -2] for file in (standard, optimised)]
    assert image_codecs.jpeg_payload(standard) == len(scans[0]) + 1
    size_of_tables = 0
    for marker, start, end in image_codecs.segments(optimised):
        if marker == 0xFFDA:  # start of the scan
            break
        if marker == 0xFFC4:  # Huffman tables
            size_of_tables += end - start
    assert size_of_tables > 34
    assert image_codecs.jpeg_payload(optimised) == len(scans[1]) + size_of_tables + 1


def test_jpeg_xl_headers_are_the_same_for_all_slices(smooth_slices):
    for depth in CODECS["jpegxl"].depths:
        files = []
        for image in smooth_slices:
            for setting in (5, 60):
                files.append(CODECS["jpegxl"].encode(image, setting, depth).data)
        assert len({file[:8] for file in files}) == 1
        assert len({file[8:12] for file in files}) > 1


def test_linear_light_is_the_inverse_of_srgb():
    values = np.linspace(0, 1, 101)
    light = image_codecs.to_linear(values)
    assert image_codecs.from_linear(light) == pytest.approx(values)
    assert light[50] == pytest.approx(0.214, abs=1e-3)


@pytest.mark.parametrize("name", CODECS)
def test_each_slice_is_within_budget(smooth_slices, name):
    codec = CODECS[name]
    image = smooth_slices[0]
    results = search(codec, 8, (0.5625, 1.125), image)
    assert len(results) == 4
    for (rate, accounting), coded in results.items():
        assert 0.7 * rate < 8 * getattr(coded, accounting) / image.size <= rate
        assert codec.payload(coded.data) <= coded.file
    # The payload has more room than the file.
    assert results[1.125, "payload"].payload >= results[1.125, "file"].payload


def test_a_slice_that_does_not_fit_has_no_result():
    noise = np.random.default_rng(1).random((256, 128))
    results = search(CODECS["jpeg"], 8, (0.05,), noise)
    assert results == {(0.05, "file"): None, (0.05, "payload"): None}


def test_versions_of_codecs_are_reported():
    versions = image_codecs.versions(["jpeg", "webp"])
    assert list(versions) == ["imagecodecs", "jpeg", "webp"]


def test_missing_packages_are_errors(monkeypatch):
    def version():
        raise ImportError("no libavif")

    monkeypatch.setattr(image_codecs.imagecodecs, "avif_version", version, raising=False)
    message = r"this build of imagecodecs has no avif .*omit it from --codecs"
    with pytest.raises(UserError, match=message):
        image_codecs.versions(["avif"])
    monkeypatch.setattr(image_codecs, "imagecodecs", None)
    with pytest.raises(UserError, match=r"imagecodecs, .* is not installed; run pip install -r"):
        image_codecs.versions([])
