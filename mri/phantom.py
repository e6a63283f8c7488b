"""Simulate sample data: a phantom of the male pelvis, as NIfTI slices in HipMRI's layout.

    python -m mri.phantom                     # sample_data/: 12 + 2 + 2 volumes of 20 slices each
    python -m mri.phantom --out full_size --volumes 191 11 9 --slices 60       # the size of HipMRI
    python -m mri.phantom --out many --patients 200 40 40                      # 280 patients
    python train.py                           # without --data, trains on the sample

HipMRI may not be redistributed, so this module simulates pelves with the same geometry and
contrast. An atlas defines the shapes in millimetres. Its axes are x to the right, y to anterior and
z to superior. x = 0 is the midline, y = 0 the middle plane and z = 0 column 0. The shapes are
warped slightly for each case and week, filled with texture, shaded as if by surface coils, and
given Rician noise. The phantom shows that the code works, and is useful for comparing settings.
Results on it say nothing about patients.

A volume depends only on (seed, case, week), not on the number of workers or on other volumes.
Different cases are different patients. --volumes draws scans of HipMRI's cases, 004-042, at most 39
patients. --patients draws one scan each of as many patients as requested: the cases from 1001
(train), 2001 (validate) and 3001 (test) upwards. None of them is a patient of the sample, and the
test patients do not depend on the number of training patients.
"""

import argparse
import gzip
import itertools
import math
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from tqdm import tqdm

ROWS = 256  # rows of a HipMRI slice
COLUMNS = 128  # columns of most HipMRI slices
WIDE_COLUMNS = 144  # of the few wider slices in HipMRI
PLANES = 60  # coronal slices of each volume in HipMRI's 2D version
# mm between rows (to the right), columns (to superior) and planes (to anterior)
SPACING = (1.68, 1.56, 1.68)
# The cases in each of HipMRI's splits.
CASES = {"train": range(4, 36), "validate": range(36, 40), "test": range(40, 43)}
# The first case in each split of a data set of many patients. None of its cases is in CASES.
FIRST_CASES = {"train": 1001, "validate": 2001, "test": 3001}
MAX_PATIENTS = 999  # patients in each split
SAMPLE_VOLUMES = (12, 2, 2)  # training, validation and test volumes of the sample
BACKGROUND, BODY, BONE, BLADDER, RECTUM, PROSTATE = range(6)
MAX_WORKERS = 61  # Windows cannot wait for more than 61 processes

# Names of the random streams. The streams of a patient are the same in every week.
PATIENT_STREAMS = ("patient", "patient warp", "texture", "fibres", "vessels")
STREAMS = (*PATIENT_STREAMS, "scan", "scan warp", "outline", "bowel", "shading", "noise")

Shape = tuple[tuple[slice, ...], np.ndarray]  # a box of voxels, and signed distances (mm) in it

FAR = np.float32(1e3)  # mm: exceeds the distance to any shape
HEAD = np.array([103, 3, 94])  # mm: centre of the femoral head on the right, where x > 0
HEAD_RADIUS = 22.5  # mm

# The atlas. Of paired structures, only the right one (x > 0) is listed.
# fmt: off
# Muscles: points (x, y, z) of the axis in mm; radii in mm at both ends, before swelling; factors
# that multiply the coordinates. A factor below 1 widens the muscle into a sheet.
MUSCLES = {
    "obturator internus": ([(71, 20, 96), (64, -28, 74)], (6, 7), (1, 0.8, 0.4)),
    "obturator externus": ([(32, 30, 62), (92, -8, 66)], (11, 9), (1, 1, 1)),
    "pectineus": ([(42, 46, 92), (112, 22, 40)], (12, 11), (1, 1, 1)),
    "adductor longus": ([(18, 48, 60), (102, 40, -20)], (11, 15), (1, 1, 1)),
    "adductor brevis": ([(22, 34, 52), (112, 18, -8)], (11, 15), (1, 1, 1)),
    "adductor magnus": ([(48, -14, 30), (104, -12, -25)], (15, 24), (1, 1, 1)),
    "gracilis": ([(14, 28, 48), (50, 16, -25)], (6, 9), (1, 0.7, 1)),
    "quadratus femoris": ([(74, -26, 42), (126, -24, 46)], (11, 10), (1, 1, 1)),
    "hamstrings": ([(64, -38, 28), (92, -46, -30)], (12, 18), (1, 1, 1)),
    "psoas": ([(52, 0, 215), (92, 33, 118)], (14, 12), (1, 1, 1)),
    "iliacus": ([(95, 12, 215), (98, 34, 116), (121, -2, 52)], (18, 13), (1, 0.7, 1)),
    "gluteus minimus": ([(122, 10, 165), (142, 0, 98)], (10, 8), (1, 0.5, 1)),
    "gluteus medius": ([(138, 0, 190), (152, -8, 92)], (19, 9), (1, 0.5, 1)),
    "gluteus medius, dorsal": ([(98, -36, 195), (150, -16, 100)], (17, 8), (1, 0.7, 1)),
    "gluteus maximus": ([(62, -76, 150), (146, -42, 40)], (38, 26), (1, 1, 1)),
    "gluteus maximus, caudal": ([(40, -76, 105), (128, -56, 20)], (30, 26), (1, 1, 1)),
    "piriformis": ([(28, -58, 150), (132, -16, 108)], (14, 6), (1, 1, 1)),
    "gemelli": ([(66, -38, 82), (134, -16, 96)], (8, 6), (1, 1, 1)),
    "tensor fasciae latae": ([(146, 48, 150), (160, 34, 30)], (11, 11), (1, 0.7, 1)),
    "sartorius": ([(132, 58, 130), (96, 58, 0)], (9, 9), (1, 1, 1)),
    "rectus femoris": ([(116, 38, 92), (128, 48, -30)], (10, 20), (1, 1, 1)),
    "vastus lateralis": ([(158, 2, 52), (158, 8, -35)], (11, 22), (1, 0.5, 1)),
    "vastus intermedius": ([(134, 26, 42), (130, 32, -30)], (11, 18), (1, 1, 1)),
    "vastus medialis": ([(120, 8, 32), (112, 22, -30)], (7, 14), (1, 1, 1)),
    "levator ani": ([(58, -8, 98), (8, -12, 56)], (-3.4, -2.2), (1, 0.09, 1)),  # a thin sheet
}
HIP_BONE = (  # axis, radii, stretch
    ([(106, 22, 124), (136, 48, 205)], (9, 6), (1, 0.5, 1)),  # ilium, anterior
    ([(96, 0, 126), (116, 6, 210)], (9, 5), (1, 0.35, 1)),  # ilium, middle
    ([(84, -22, 122), (64, -52, 175)], (11, 11), (1, 0.7, 1)),  # ilium, towards the sacrum
    ([(64, -52, 175), (72, -58, 215)], (11, 9), (1, 0.7, 1)),
    ([(80, -16, 84), (63, -27, 34)], (13, 15), (1, 1, 1)),  # ischium and its tuberosity
    ([(62, -24, 30), (16, 36, 62)], (10, 6), (1, 1, 1)),  # inferior ramus
    ([(82, 24, 100), (18, 42, 82)], (9, 8), (1, 1, 1)),  # superior ramus
    ([(14, 42, 84), (13, 37, 64)], (10, 8), (1, 1, 1)),  # body of the pubis
)
FEMUR = (
    ([(112, 1, 87), (137, -5, 66)], (15, 16)),  # neck
    ([(139, -4, 58), (135, 2, -45)], (17, 13.5)),  # shaft
    ([(128, -14, 50), (123, -19, 44)], (8, 7)),  # lesser trochanter
)
SACRUM = (
    ([(0, -24, 232), (0, -50, 180)], (24, 19), (0.5, 1, 1)),
    ([(0, -50, 180), (0, -70, 145)], (19, 13), (0.5, 1, 1)),
    ([(0, -70, 145), (0, -62, 112)], (13, 8), (0.6, 1, 1)),
    ([(0, -62, 112), (0, -48, 96)], (6, 3), (1, 1, 1)),  # coccyx
)
VESSELS = (  # axis, radius: artery and vein
    ([(44, -8, 225), (64, 12, 145), (80, 50, 104), (88, 56, -20)], 4.0),  # external iliac, femoral
    ([(35, -15, 225), (55, 5, 145), (71, 43, 104), (79, 49, -20)], 4.8),
    ([(46, -14, 200), (58, -30, 140), (54, -22, 100)], 3.2),  # internal iliac
    ([(52, -20, 200), (62, -24, 140), (46, -18, 104)], 3.8),
)
PENIS_ROOT = (  # axis, radii
    ((0, 16, 46), (0, 50, 40), (8, 8)),  # bulb
    ((8, 46, 52), (40, 6, 38), (7, 4)),  # crus
    ((8, 46, 52), (9, 66, 40), (7, 8)),  # corpus cavernosum
)
RECTUM_COURSE = (  # axis: anal canal, rectum, start of the sigmoid; radii
    ((0, -14, 44), (0, -20, 70), (0, -29, 92), (3, -38, 124), (10, -42, 148), (26, -26, 170)),
    (8, 10, 15, 17, 15, 12),
)
# fmt: on


# ---------------------------------------------------------------- a scan


class PhantomScan:
    """One scan of one patient: its parameters, and the atlas position and texture of each voxel.

    Attributes:
        x, y, z: float32 (256, columns, slices), atlas coordinates of each voxel in mm.
        rough, coarse, medium, fine: smooth noise of the same shape, of mean 0 and variance 1, with
            lattice spacings of 11, 7, 3.2 and 1.7 mm.
    """

    def __init__(self, seed: int, case: int, week: int, slices: int, columns: int):
        self.key = (seed, case, week)

        rng = self.random("patient")
        self.size = rng.uniform(0.95, 1.05)  # relative size of the whole body
        self.fat = rng.uniform(10, 22)  # thickness under the skin of the hips, in mm
        self.muscle = rng.uniform(5.5, 9)  # swelling of muscles beyond the atlas, in mm
        self.prostate = rng.uniform(0.88, 1.22)  # linear size, relative
        self.perineum = rng.uniform(14, 34)  # z at which the thighs separate, in mm
        self.coils = [rng.uniform(0.7, 1.5), rng.uniform(0.1, 0.6)]  # gain at the skin of each side
        rng.shuffle(self.coils)

        rng = self.random("scan")
        self.bladder = rng.uniform(0.78, 1.22)  # linear size, relative
        self.rectum = rng.uniform(0.8, 1.35)  # radius, relative
        self.gas = rng.uniform(0.1, 0.9)  # fraction of the rectum that is filled with gas
        self.shift = rng.normal(0, (3, 3, 4))  # position of the patient in x, y and z, in mm
        self.roll = rng.normal(0, 0.02)  # rotation in the coronal plane, in radians
        # Standard deviation of the noise in the real and imaginary channels; urine has signal 0.8.
        self.sigma = rng.uniform(0.0025, 0.005)
        self.scale = rng.uniform(250, 900)  # stored value of a signal of 1

        self.planes = plane_numbers(slices)
        # Positions of rows, columns and planes in mm. A wider slice extends further at both ends.
        self.axes = (
            (np.arange(ROWS) - (ROWS - 1) / 2) * SPACING[0],
            (np.arange(columns) - (columns - COLUMNS) / 2) * SPACING[1],
            (self.planes - (PLANES - 1) / 2) * SPACING[2],
        )
        self._place_voxels()

        rng = self.random("texture")
        self.rough = self.noise(rng, 11)
        self.coarse = self.noise(rng, 7)
        self.medium = self.noise(rng, 3.2)
        self.fine = self.noise(rng, 1.7)

    def random(self, stream: str, plane: int = -1) -> np.random.Generator:
        """Return the random generator of one stream in STREAMS, or of one plane in that stream."""
        seed, case, week = self.key
        if stream in PATIENT_STREAMS:
            week = -1
        return np.random.default_rng([STREAMS.index(stream), seed, case, week + 1, plane + 1])

    def noise(self, rng: np.random.Generator, spacing: float) -> np.ndarray:
        """Return smooth noise of mean 0 and variance 1: cubic B-splines on a random lattice.

        The lattice covers every possible scan, so the noise of a plane does not depend on which
        other planes are simulated.

        Args:
            rng: generator of the lattice's values.
            spacing: spacing of the lattice points, in mm.

        Returns:
            float32 (256, columns, slices).
        """
        spans = ((-225, 225), (-30, 230), (-55, 55))  # mm, of rows, columns and planes
        lattice_shape = [int((high - low) / spacing) + 5 for low, high in spans]
        field = rng.standard_normal(lattice_shape, dtype=np.float32)
        # 151/315 is the mean sum of the squared weights of a cubic B-spline in one dimension.
        field *= np.float32((151 / 315) ** -1.5)
        for axis in (2, 0, 1):
            position = (self.axes[axis] - spans[axis][0]) / spacing
            first = np.floor(position).astype(int)
            t = (position - first).astype(np.float32).reshape(np.roll([-1, 1, 1], axis))
            weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * (t + t**2 - t**3), t**3)
            field = sum(np.take(field, first + i, axis) * (w / 6) for i, w in enumerate(weights))
        return field

    def _place_voxels(self) -> None:
        """Set x, y and z: the voxel positions, shifted, rolled, scaled and smoothly warped."""
        axes = [axis.astype(np.float32) for axis in self.axes]
        x, z, y = np.meshgrid(*axes, indexing="ij", sparse=True)
        x = x + float(self.shift[0])
        y = y + float(self.shift[1])
        z = z + float(self.shift[2] - HEAD[2])
        cos = float(np.cos(self.roll) / self.size)
        sin = float(np.sin(self.roll) / self.size)
        patient_rng = self.random("patient warp")
        scan_rng = self.random("scan warp")
        warp = []
        for _ in range(3):
            warp.append(2.6 * self.noise(patient_rng, 34) + 1.1 * self.noise(scan_rng, 30))
        self.x = cos * x + sin * z + warp[0]
        self.y = y * float(1 / self.size) + warp[1]
        self.z = cos * z - sin * x + warp[2] + float(HEAD[2])

        # For use in `box`: the range of x in each row, of y in each plane, and of z in each column
        self._ranges = []
        for axis, coordinate in ((0, self.x), (2, self.y), (1, self.z)):
            others = tuple(i for i in range(3) if i != axis)
            self._ranges.append((axis, coordinate.min(others), coordinate.max(others)))

    def box(self, low, high, margin: float = 6.0) -> tuple[slice, ...]:
        """Return the index ranges of a box of voxels that contains all points from `low` to `high`.

        Args:
            low: (3,) smallest x, y and z in mm.
            high: (3,) largest x, y and z in mm.
            margin: distance by which the box is enlarged on all sides, in mm.
        """
        box = [slice(0)] * 3
        for (axis, least, most), start, end in zip(self._ranges, low, high, strict=True):
            inside = np.flatnonzero((most >= start - margin) & (least <= end + margin))
            if inside.size:
                box[axis] = slice(inside[0], inside[-1] + 1)
        return tuple(box)

    def capsule(self, start, end, radii, stretch=(1, 1, 1)) -> Shape:
        """Return a rod with round ends, as signed distances to its surface in mm (negative inside).

        Args:
            start: (3,) x, y, z of one end of the axis, in mm.
            end: (3,) x, y, z of the other end, in mm.
            radii: (2,) radii at both ends in mm; the radius changes linearly between them.
            stretch: (3,) factors that multiply x, y and z relative to the start.
        """
        a, b, s = (np.asarray(vector, dtype=np.float32) for vector in (start, end, stretch))
        margin = (max(radii) + 8) / s
        box = self.box(np.minimum(a, b) - margin, np.maximum(a, b) + margin)
        p = [(self.x[box] - a[0]) * s[0], (self.y[box] - a[1]) * s[1], (self.z[box] - a[2]) * s[2]]
        d = (b - a) * s
        t = np.clip((p[0] * d[0] + p[1] * d[1] + p[2] * d[2]) / np.sum(d * d), 0, 1)
        to_axis = np.sqrt(sum((q - t * e) ** 2 for q, e in zip(p, d, strict=True)))
        return box, to_axis - (float(radii[0]) + t * float(radii[1] - radii[0]))

    def ellipsoid(self, centre, semi_axes) -> Shape:
        """Return an ellipsoid, as signed distances to its surface in mm (approximate far from it).

        Args:
            centre: (3,) x, y, z in mm.
            semi_axes: (3,) half lengths in x, y and z, in mm.
        """
        c, s = (np.asarray(vector, dtype=np.float32) for vector in (centre, semi_axes))
        box = self.box(c - s - 6, c + s + 6)
        p = [(self.x[box] - c[0]) / s[0], (self.y[box] - c[1]) / s[1], (self.z[box] - c[2]) / s[2]]
        k1 = np.sqrt(p[0] ** 2 + p[1] ** 2 + p[2] ** 2)
        k2 = np.sqrt(sum((q / k) ** 2 for q, k in zip(p, s, strict=True)))
        return box, k1 * (k1 - 1) / np.maximum(k2, 1e-4)

    def empty_distance(self) -> np.ndarray:
        """Return the distance field of a group without shapes, to be passed to `merge`."""
        return np.full(self.x.shape, FAR)


def plane_numbers(slices: int) -> np.ndarray:
    """Return the plane numbers, 0 to 59, of evenly spaced slices: (slices,)."""
    return (np.arange(slices) * PLANES + PLANES // 2) // slices


# ---------------------------------------------------------------- shapes on an image


def mirror(points, side: int) -> list[np.ndarray]:
    """Return atlas points unchanged if `side` is 1 (right), mirrored to the left if it is -1."""
    return [np.array(point, dtype=np.float32) * (side, 1, 1) for point in points]


def coverage(distance: np.ndarray, edge: float = 1.7) -> np.ndarray:
    """Return the fraction of each voxel that a shape covers; the soft edge is `edge` mm wide."""
    return np.clip(0.5 - distance * (1 / edge), 0, 1)


def paint(image: np.ndarray, box, distance: np.ndarray, signal, edge: float = 1.7) -> None:
    """Paint a shape over the image in place, with the given signal."""
    part = image[box]
    part += coverage(distance, edge) * (signal - part)


def merge(group: np.ndarray, shape: Shape, blend: float = 6.0) -> None:
    """Merge a shape into the distance field of a group in place, with a fillet of `blend` mm."""
    box, distance = shape
    part = group[box]
    overlap = np.maximum(blend - np.abs(part - distance), 0)
    np.minimum(part, distance, out=part)
    part -= overlap * overlap * (0.25 / blend)


def sheets(noise: np.ndarray, width: float) -> np.ndarray:
    """Return thin sheets, such as septa: 1 where noise crosses zero, fading to 0 on both sides."""
    return np.exp(-((noise * (1 / width)) ** 2))


# ---------------------------------------------------------------- tissues

# Each `paint_` function paints one tissue in place, over the tissues that were painted before.


def body_depth(scan: PhantomScan) -> np.ndarray:
    """Return the depth of each voxel under the skin in mm; it is negative outside the body.

    The body is a rounded trunk whose lower end divides into two thighs.
    """
    width = 165 + scan.fat - (14 - 0.35 * scan.fat) * np.clip((scan.z - 95) / 110, 0, 1) ** 2
    width -= 7 * np.clip((40 - scan.z) / 60, 0, 1)
    thickness = 112 + 8 * np.clip(scan.z / 120, 0, 1)
    across = (np.abs(scan.x) / width) ** 2.6
    along = (np.abs(scan.y + 12) / thickness) ** 2.6
    radius = (across + along) ** (1 / 2.6)
    trunk = (1 - radius) * width + 3 * scan.noise(scan.random("outline"), 38) + 0.3 * scan.rough
    # The cleft between the thighs reaches higher at the back.
    cleft_top = scan.perineum + 50 * np.clip((-30 - scan.y) / 15, 0, 1)
    above = scan.z - cleft_top
    below_perineum = np.maximum(scan.perineum - scan.z, 0)
    half_gap = 1.1 * np.sqrt(np.maximum(-above, 0)) + 0.22 * below_perineum  # mm
    half_gap -= 1.5 * np.maximum(above, 0)
    return np.minimum(trunk, np.abs(scan.x) - half_gap + 0.6 * scan.rough)


def paint_fat(image: np.ndarray, scan: PhantomScan, depth: np.ndarray, fat: np.ndarray) -> None:
    """Paint fat everywhere, brightest under the skin, with thin septa and deep small vessels."""
    image[:] = (0.25 + 0.15 * coverage(depth - fat, 6)) * (
        1 + 0.06 * scan.medium + 0.07 * scan.fine
    )
    septa = 0.25 * sheets(scan.coarse, 0.3) * coverage(fat - depth, 6)
    image *= 1 - 0.2 * sheets(scan.rough, 0.2) - septa
    vessels = sheets(scan.coarse, 0.22) * sheets(scan.noise(scan.random("vessels"), 8), 0.22)
    image *= 1 - 0.7 * vessels * coverage(fat - depth, 4)


def paint_bowel(image: np.ndarray, scan: PhantomScan) -> None:
    """Paint loops of bowel above and around the bladder.

    Walls and folds are dark; the loops contain fluid, paste or gas.
    """
    rng = scan.random("bowel")
    box, cavity = scan.ellipsoid((0, 14, 200), (84, 76, 72))
    nearest = scan.empty_distance()
    second = scan.empty_distance()
    content = np.zeros(scan.x.shape, dtype=np.float32)
    signals = [0.5, 0.34, 0.24, 0.18, 0.03]
    for _ in range(90):
        start = rng.uniform((-80, -45, 134), (80, 70, 212))
        loop, distance = scan.capsule(
            start, start + rng.normal(0, (24, 14, 9)), rng.uniform(9, 16, 2)
        )
        closer = distance < nearest[loop]
        second[loop] = np.minimum(second[loop], np.maximum(nearest[loop], distance))
        nearest[loop] = np.minimum(nearest[loop], distance)
        content[loop][closer] = rng.choice(signals, p=[0.15, 0.25, 0.3, 0.2, 0.1])
    wall = np.maximum(nearest[box], cavity)
    lumen = np.maximum(wall + 2.4, 2.6 - (second - nearest)[box])
    paint(image, box, wall, 0.11)
    folds = 1 - 0.5 * sheets(scan.medium[box], 0.25)
    paint(image, box, lumen, content[box] * folds * (1 + 0.12 * scan.fine[box]))


def nearest_muscle(
    scan: PhantomScan,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the muscle segment that is nearest to each voxel; a muscle has one or more segments.

    Returns:
        Three arrays of the scan's shape: the distance to the nearest segment in mm, the additional
        distance to the second nearest segment in mm, and the index of the nearest segment. A
        fourth array contains the direction of each segment, (segments, 3).
    """
    nearest = scan.empty_distance()
    second = scan.empty_distance()
    index = np.zeros(scan.x.shape, dtype=np.uint8)
    directions = []
    for side in (-1, 1):
        for points, (first_radius, last_radius), stretch in MUSCLES.values():
            points = mirror(points, side)
            radii = np.linspace(first_radius, last_radius, len(points))
            for i in range(len(points) - 1):
                start, end = points[i : i + 2]
                box, distance = scan.capsule(start, end, radii[i : i + 2], stretch)
                nearest_in_box = nearest[box]
                closer = distance < nearest_in_box
                second[box] = np.minimum(second[box], np.maximum(nearest_in_box, distance))
                nearest_in_box[closer] = distance[closer]
                index[box][closer] = len(directions)
                directions.append((end - start) / np.linalg.norm(end - start))
    return nearest, second - nearest, index, np.array(directions, dtype=np.float32)


def fibre_noise(scan: PhantomScan, mask: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return noise that is stretched about eightfold along the muscle fibres.

    Args:
        scan: the scan.
        mask: bool (256, columns, slices), true in n voxels.
        directions: (3, n), direction of the fibres in each of these voxels.

    Returns:
        float32 (n,).
    """
    p = np.stack([scan.x[mask], scan.y[mask], scan.z[mask]])
    # Positions in a periodic lattice of 64 x 64 x 64 cells
    p = (p - directions * (p * directions).sum(0) * 0.87) * (1 / 4.2)
    cell = np.floor(p).astype(np.int32)
    t = p - cell
    t = t * t * (3 - 2 * t)
    lattice = scan.random("fibres").standard_normal(64**3, dtype=np.float32)
    value = np.zeros(p.shape[1], dtype=np.float32)
    for corner in np.ndindex(2, 2, 2):
        i, j, k = ((c + offset) & 63 for c, offset in zip(cell, corner, strict=True))
        u, v, w = (f if offset else 1 - f for f, offset in zip(t, corner, strict=True))
        value += lattice[(i << 12) | (j << 6) | k] * (u * v * w)
    return value


def paint_muscles(image: np.ndarray, scan: PhantomScan, depth: np.ndarray, fat: np.ndarray) -> None:
    """Paint dark muscles with bright streaks, swollen until only seams of fat separate them."""
    distance, gap, index, directions = nearest_muscle(scan)
    amount = coverage(distance + 1.2 * scan.rough - scan.muscle, 2.5)
    amount *= coverage(1.2 + 0.9 * scan.rough - gap, 2.6) * coverage(fat + 2 - depth, 3)
    mask = amount > 0
    fibres = fibre_noise(scan, mask, directions[index[mask]].T)
    patches = np.clip(0.25 + 0.5 * scan.rough[mask], 0, 1) ** 2
    streaks = (0.02 + 0.2 * patches) * sheets(fibres, 0.4)
    signal = 0.085 + 0.013 * scan.fine[mask] + 0.02 * fibres + streaks
    image[mask] += amount[mask] * (signal - image[mask])


def paint_tubes(image: np.ndarray, scan: PhantomScan) -> None:
    """Paint large vessels, the root of the penis and the urethra.

    Vessels are flow voids (black); the root of the penis is grey, with dark sheaths.
    """
    for side in (-1, 1):
        for points, radius in VESSELS:
            for start, end in itertools.pairwise(mirror(points, side)):
                box, distance = scan.capsule(start, end, (radius, radius))
                paint(image, box, distance - 1.2, 0.14)
                paint(image, box, distance, 0.02)
        for start, end, radii in PENIS_ROOT:
            box, distance = scan.capsule(*mirror((start, end), side), radii)
            paint(image, box, distance, 0.08)
            paint(image, box, distance + 1.6, 0.27)
    paint(image, *scan.capsule((0, 8, 76), (0, 20, 50), (6, 5)), 0.13)  # urethra in its sphincter


def bone_distances(scan: PhantomScan) -> list[np.ndarray]:
    """Return signed distances in mm to the femora, the hip bones and the sacrum, in this order."""
    femur = scan.empty_distance()
    hip = scan.empty_distance()
    sacrum = scan.empty_distance()
    for side in (-1, 1):
        head = HEAD * np.array([side, 1, 1])
        merge(femur, scan.ellipsoid(head, (HEAD_RADIUS,) * 3))
        for points, radii in FEMUR:
            merge(femur, scan.capsule(*mirror(points, side), radii), 9)
        merge(femur, scan.ellipsoid((146 * side, -11, 76), (13, 15, 20)), 9)  # greater trochanter

        for points, radii, stretch in HIP_BONE:
            merge(hip, scan.capsule(*mirror(points, side), radii, stretch))
        merge(hip, scan.ellipsoid((97 * side, 2, 122), (15, 20, 13)))  # roof of the socket
        merge(hip, scan.ellipsoid((86 * side, -18, 97), (13, 15, 24)))  # its posterior wall
        box, shell = scan.ellipsoid(head, (HEAD_RADIUS + 7,) * 3)
        x = scan.x[box] - float(head[0])
        y = scan.y[box] - float(head[1])
        z = scan.z[box] - float(head[2])
        outwards = 0.72 * side * x + 0.2 * y - 0.66 * z  # mm towards the socket's opening
        merge(hip, (box, np.maximum(np.abs(shell) - 4, outwards - 4)), 4)
        hip[box] = np.maximum(hip[box], -4.4 - shell)  # room for the head and the joint
    for points, radii, stretch in SACRUM:
        merge(sacrum, scan.capsule(*points, radii, stretch))
    return [femur, np.maximum(hip, 2.2 - np.abs(scan.x)), np.maximum(sacrum, 2.5 - hip)]


def paint_bones(image: np.ndarray, scan: PhantomScan) -> np.ndarray:
    """Paint black cortex, light mottled marrow and grey cartilage; return the mask of all bones."""
    mask = np.zeros(image.shape, dtype=bool)
    marrow = 0.32 * (1 + 0.08 * scan.coarse + 0.13 * scan.medium + 0.15 * scan.fine)
    unevenness = 1 + 0.3 * scan.coarse
    shaft = np.clip((62 - scan.z) / 30, 0, 1)
    paint(image, *scan.ellipsoid((0, 42, 74), (7, 12, 20)), 0.1)  # disc of the symphysis
    for side in (-1, 1):
        cartilage = scan.ellipsoid(HEAD * (side, 1, 1), (HEAD_RADIUS + 2.4,) * 3)
        paint(image, *cartilage, 0.2)
    thicknesses = (1.4 + 3.5 * shaft, 1.7, 1.3)  # mm of cortex
    for distance, cortex in zip(bone_distances(scan), thicknesses, strict=True):
        mask |= distance < 0
        paint(image, ..., distance - 0.3, 0.02)
        paint(image, ..., distance + cortex * unevenness, marrow, 2.4)
    return mask


def paint_rectum(image: np.ndarray, scan: PhantomScan) -> np.ndarray:
    """Paint the anal canal, the rectum and the start of the sigmoid; return their mask.

    The wall is dark, stool is grey and gas is black.
    """
    distance = scan.empty_distance()
    points, radii = RECTUM_COURSE
    radii = np.array(radii) * ([1, 1] + [scan.rectum] * 4)
    for i in range(len(points) - 1):
        merge(distance, scan.capsule(points[i], points[i + 1], radii[i : i + 2]), 5)
    distance += 0.9 * scan.rough
    stool = 0.25 + 0.05 * scan.medium + 0.03 * scan.fine
    height = scan.y + 34 + 6 * scan.coarse  # gas collects in front: the patient lies supine
    gas = np.clip((height - 12 + 24 * scan.gas) * 0.4, 0, 1)
    paint(image, ..., distance, 0.11)
    wall = 3.4 + np.clip(80 - scan.z, 0, 6)  # mm; the sphincter thickens its lower end
    paint(image, ..., distance + wall, stool * (1 - gas) + 0.015 * gas)
    return distance < 0


def paint_prostate(image: np.ndarray, scan: PhantomScan) -> np.ndarray:
    """Paint the seminal vesicles and the prostate; return the mask of the prostate.

    The prostate has a mottled central gland in a bright peripheral zone.
    """
    for side in (-1, 1):
        box, distance = scan.capsule(*mirror([(7, -12, 112), (34, -14, 122)], side), (5, 6))
        paint(image, box, distance, 0.08)
        paint(image, box, distance + 1.5, 0.5 - 0.32 * sheets(scan.medium[box], 0.5))
    size = scan.prostate
    centre = np.array([0, 8, 111 - 19 * size])
    box, distance = scan.ellipsoid(centre, np.array([26, 18, 20.5]) * size)
    distance = distance + 0.7 * scan.coarse[box]
    paint(image, box, distance - 0.8, 0.06)
    paint(image, box, distance + 1.2, 0.4 + 0.05 * scan.medium[box] + 0.04 * scan.fine[box])
    mask = np.zeros(image.shape, dtype=bool)
    mask[box] = distance < 0
    gland_centre = centre + np.array([0, 4, 4.2]) * size
    box, distance = scan.ellipsoid(gland_centre, np.array([20, 14, 15.5]) * size)
    mottle = 0.2 + 0.05 * scan.medium + 0.03 * scan.fine - 0.07 * sheets(scan.medium, 0.3)
    paint(image, box, distance, 0.1)
    paint(image, box, distance + 1.4, mottle[box])
    return mask


def paint_bladder(image: np.ndarray, scan: PhantomScan) -> np.ndarray:
    """Paint the bladder (bright urine in a thin dark wall); return its mask."""
    semi_axes = np.array([39, 28, 27]) * scan.bladder
    box, distance = scan.ellipsoid((0, 16, 108 + semi_axes[2]), semi_axes)
    distance = distance + 1.1 * scan.rough[box]
    paint(image, box, distance, 0.07)
    paint(image, box, distance + 3.2, 0.78 + 0.012 * scan.coarse[box])
    mask = np.zeros(image.shape, dtype=bool)
    mask[box] = distance < 0
    return mask


# ---------------------------------------------------------------- a volume


def draw_tissues(scan: PhantomScan) -> tuple[np.ndarray, np.ndarray]:
    """Paint all tissues; return the signal before shading (float32) and the labels (uint8)."""
    depth = body_depth(scan)
    fat = scan.fat * (0.9 + 0.1 * scan.rough)  # mm: thickness under the skin
    image = np.empty(scan.x.shape, dtype=np.float32)
    labels = np.full(image.shape, BODY, dtype=np.uint8)
    paint_fat(image, scan, depth, fat)
    paint_bowel(image, scan)
    paint_muscles(image, scan, depth, fat)
    paint_tubes(image, scan)
    labels[paint_bones(image, scan)] = BONE
    labels[paint_rectum(image, scan)] = RECTUM
    labels[paint_prostate(image, scan)] = PROSTATE
    labels[paint_bladder(image, scan)] = BLADDER
    paint(image, ..., depth - 1.6, 0.2)  # skin
    image *= coverage(-depth)
    labels[depth <= 0] = BACKGROUND
    return image, labels


def shade(image: np.ndarray, scan: PhantomScan) -> np.ndarray:
    """Return the image with the shading of surface coils.

    The image is brightest at the skin of one side, and darker towards the upper and lower ends.
    """
    left_gain = scan.coils[0] / (1 + np.exp((150 + scan.x) / 12))
    right_gain = scan.coils[1] / (1 + np.exp((150 - scan.x) / 12))
    gain = 1 + (left_gain + right_gain)
    ends = 1 - 0.35 * np.abs((scan.z - 100) / 115) ** 3
    image = image * (gain * ends * (1 + 0.08 * scan.noise(scan.random("shading"), 55)))
    # The scanner's own correction dims the brightest regions.
    return image / np.sqrt(np.sqrt(1 + image**4))


def make_volume(
    case: int,
    week: int,
    slices: int = PLANES,
    columns: int = COLUMNS,
    seed: int = 0,
    noise: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate the slices of one scan, evenly spaced over the 60 planes of its volume.

    Args:
        case: number of the patient, at least 0; different numbers are different patients.
        week: number of the scan.
        slices: number of slices, 1 to 60.
        columns: 128 or 144.
        seed: a different seed gives different patients.
        noise: whether to add noise; without it, the scan and its intensity scale are the same.

    Returns:
        The image (int16) and the labels (uint8), both (256, columns, slices), from back to front.
    """
    scan = PhantomScan(seed, case, week, slices, columns)
    image, labels = draw_tissues(scan)
    image = shade(image, scan)
    if noise:
        for i, plane in enumerate(scan.planes):
            rng = scan.random("noise", int(plane))
            real, imaginary = rng.normal(0, scan.sigma, (2, ROWS, columns))
            image[..., i] = np.hypot(image[..., i] + real, imaginary)  # Rician
    return np.rint(image * scan.scale).astype(np.int16), labels


# ---------------------------------------------------------------- files


class Volume(NamedTuple):
    """One volume of the data set."""

    split: str
    case: int
    week: int
    columns: int


def plan(volumes: Sequence[int]) -> list[Volume]:
    """Plan the volumes of a data set of HipMRI's cases so that no patient is in two splits.

    Args:
        volumes: number of training, validation and test volumes.
    """
    plans: list[Volume] = []
    for (split, cases), count in zip(CASES.items(), volumes, strict=True):
        # Two thirds of the volumes are first scans of a patient, or fewer if cases run out.
        patients = min(len(cases), math.ceil(2 * count / 3))
        plans += sorted(
            Volume(split, cases[i % patients], i // patients, COLUMNS) for i in range(count)
        )
    return widen_last_training_volume(plans)


def plan_patients(patients: Sequence[int]) -> list[Volume]:
    """Plan one volume of each patient; no patient is in two splits, or one of HipMRI's cases.

    Args:
        patients: number of training, validation and test patients, 1 to 999 each.
    """
    plans: list[Volume] = []
    for (split, first), count in zip(FIRST_CASES.items(), patients, strict=True):
        plans += [Volume(split, first + i, 0, COLUMNS) for i in range(count)]
    return widen_last_training_volume(plans)


def widen_last_training_volume(plans: list[Volume]) -> list[Volume]:
    """Return the volumes, of which the last for training is wider, unless it is the only one."""
    training = [i for i, volume in enumerate(plans) if volume.split == "train"]
    if len(training) == 1:
        return plans
    last = training[-1]
    return [*plans[:last], plans[last]._replace(columns=WIDE_COLUMNS), *plans[last + 1 :]]


def write_volume(root: Path, slices: int, seed: int, volume: Volume) -> None:
    """Write the slices and masks of one volume (at module level, so that it can be pickled)."""
    image, labels = make_volume(volume.case, volume.week, slices, volume.columns, seed)
    # Rows run to the right, columns to superior, planes to anterior.
    affine = np.zeros((4, 4))
    affine[[0, 2, 1, 3], [0, 1, 2, 3]] = [*SPACING, 1]
    affine[0, 3] = -(ROWS - 1) / 2 * SPACING[0]
    affine[2, 3] = -(volume.columns - 1) / 2 * SPACING[1]
    for i, plane in enumerate(plane_numbers(slices)):
        affine[1, 3] = (plane - (PLANES - 1) / 2) * SPACING[2]
        name = f"{volume.case:03d}_week_{volume.week}_slice_{i}.nii.gz"
        image_path = root / f"keras_slices_{volume.split}" / f"case_{name}"
        mask_path = root / f"keras_slices_seg_{volume.split}" / f"seg_{name}"
        write_slice(image_path, image[..., i], affine)
        write_slice(mask_path, labels[..., i], affine)


def write_slice(path: Path, pixels: np.ndarray, affine: np.ndarray) -> None:
    """Write a slice as a compressed NIfTI file without a date, so that it is reproducible."""
    nifti = nib.Nifti1Image(np.ascontiguousarray(pixels), affine)
    nifti.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=4, mtime=0))


def plan_request(volumes: Sequence[int] | None, patients: Sequence[int] | None) -> list[Volume]:
    """Plan the volumes that `write_phantom` writes, from its arguments.

    Raises:
        ValueError: if both arguments are given, or a number is out of range.
    """
    if volumes is not None and patients is not None:
        raise ValueError(
            "volumes and patients cannot be combined; expected either volumes (several weeks of "
            "some patients) or patients (one week of each)"
        )
    if patients is not None:
        if len(patients) != 3 or min(patients) < 1 or max(patients) > MAX_PATIENTS:
            raise ValueError(
                f"patients are {' '.join(map(str, patients))}; expected three numbers of 1 to "
                f"{MAX_PATIENTS}, for train, validate and test"
            )
        return plan_patients(patients)
    volumes = SAMPLE_VOLUMES if volumes is None else volumes
    if len(volumes) != 3 or min(volumes) < 1:
        raise ValueError(
            f"volumes are {' '.join(map(str, volumes))}; expected three numbers of at least 1, for "
            "train, validate and test"
        )
    return plan(volumes)


def check_request(out: Path, slices: int, seed: int) -> None:
    """Check the other arguments of `write_phantom`.

    Raises:
        ValueError: if a number is out of range.
        FileExistsError: if `out` exists and is not an empty folder.
    """
    if not 1 <= slices <= PLANES:
        raise ValueError(f"slices are {slices}; expected 1 to {PLANES}, the planes of a volume")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected at least 0")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(
            f"{out} exists and is not an empty folder; delete it, or choose another folder"
        )


def write_phantom(
    out: str | Path,
    volumes: Sequence[int] | None = None,
    slices: int = 20,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    patients: Sequence[int] | None = None,
) -> Path:
    """Write a phantom data set. Its folder gets its final name only when the set is complete.

    Args:
        out: folder to create.
        volumes: number of training, validation and test volumes of HipMRI's cases (default: 12, 2
            and 2); no patient is in two splits.
        slices: number of slices of each volume, 1 to 60.
        seed: a different seed gives different patients.
        workers: number of processes (default: one per core); it does not change the files.
        progress: whether to show a progress bar.
        patients: number of training, validation and test patients, 1 to 999 each, with one volume
            each; replaces `volumes`.

    Returns:
        The folder.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        ValueError: if a number is out of range, or both `volumes` and `patients` are given.
    """
    out = Path(out)
    plans = plan_request(volumes, patients)
    check_request(out, slices, seed)
    workers = min(workers or os.cpu_count() or 1, len(plans), MAX_WORKERS)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        root = Path(temporary) / "set"
        for split in CASES:
            (root / f"keras_slices_{split}").mkdir(parents=True)
            (root / f"keras_slices_seg_{split}").mkdir()
        write = partial(write_volume, root, slices, seed)
        bar = partial(
            tqdm, total=len(plans), desc=f"phantom -> {out}", unit="volume", disable=not progress
        )
        if workers == 1:
            list(bar(map(write, plans)))
        else:
            # Spawn, do not fork: the caller may have threads (torch) that do not survive a fork.
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                list(bar(pool.map(write, plans)))
        check_request(out, slices, seed)  # another process may have made `out`
        if out.exists():
            out.rmdir()
        os.rename(root, out)
    return out


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage text."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m mri.phantom",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("sample_data"),
        metavar="DIR",
        help="folder to create (default: sample_data)",
    )
    parser.add_argument(
        "--volumes",
        type=int,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="number of volumes in each split (default: 12 2 2; HipMRI has 191 11 9), of at most "
        "32, 4 and 3 patients",
    )
    parser.add_argument(
        "--patients",
        type=int,
        nargs=3,
        metavar=("TRAIN", "VALIDATE", "TEST"),
        help="number of patients in each split, 1 to 999, with one volume each; replaces --volumes",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=20,
        metavar="N",
        help="number of coronal slices of each volume, 1 to 60 (default: 20)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed; a different seed gives different patients (default: 0)",
    )
    args = parser.parse_args(arguments)
    try:
        out = write_phantom(args.out, args.volumes, args.slices, args.seed, patients=args.patients)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = sum(args.patients or args.volumes or SAMPLE_VOLUMES)
    print(f"{out}: {count * args.slices} slices of {count} volumes, and as many masks")


if __name__ == "__main__":
    main()
