"""Sample data: a procedural male-pelvis MRI phantom, written as NIfTI slices in HipMRI's 2D layout.

    python phantom.py                                                  # 12 + 2 + 2 volumes of 20 slices each
    python phantom.py --out full_size --volumes 191 11 9 --slices 60   # as many slices as HipMRI has
    python train.py                                                    # without data, trains on the sample

HipMRI may not be redistributed, so this draws pelves with its geometry and contrast. Shapes in the
millimetres of an atlas (x right, y anterior, z superior; x = 0 on the midline, y = 0 on the middle plane,
z = 0 at column 0) are warped a little for each case and week, filled with texture, shaded as by surface
coils, and given Rician noise. Figures on it show that the code works and let settings be compared; they say
nothing about patients.

A volume depends on (seed, case, week) only: neither on the number of workers nor on the other volumes.
"""

import argparse
import gzip
import itertools
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

ROWS, COLUMNS, WIDE_COLUMNS = 256, 128, 144  # a HipMRI slice, and its rare wider kind
PLANES = 60  # coronal slices that HipMRI's 2D form has of each volume
SPACING = (
    1.68,
    1.56,
    1.68,
)  # mm between rows (to right), columns (to superior), planes (to anterior)
CASES = {
    "train": range(4, 36),
    "validate": range(36, 40),
    "test": range(40, 43),
}  # as HipMRI splits patients
BACKGROUND, BODY, BONE, BLADDER, RECTUM, PROSTATE = range(6)
# What random numbers are drawn for: the first kinds are a patient's, the same every week.
PATIENT_STREAMS = ("patient", "patient warp", "texture", "fibres", "vessels")
STREAMS = (*PATIENT_STREAMS, "scan", "scan warp", "outline", "bowel", "shading", "noise")
FAR = np.float32(1e3)  # mm: outside every shape
HEAD, HEAD_RADIUS = (
    np.array([103, 3, 94]),
    22.5,
)  # mm: the femoral head on the side where x is positive

# Shapes that come in pairs are given where x is positive. Muscles: the points (x, y, z) in mm that the axis
# runs through, the radii at both ends before swelling, and a stretch of the coordinates, which below 1 widens
# the muscle into a sheet.
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
    "levator ani": (
        [(58, -8, 98), (8, -12, 56)],
        (-3.4, -2.2),
        (1, 0.09, 1),
    ),  # swells to a thin sheet
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


# --- a scan: what varies, and where its voxels lie ----------------------------------------------------------


class Scan:
    """One scan of one patient: its parameters, the place of each voxel in the atlas, and its textures.

    x, y, z: float32 (256, columns, slices), mm in the atlas. rough, coarse, medium, fine: smooth noise of the
    same shape, mean 0, variance 1, made on lattices of 11, 7, 3.2 and 1.7 mm.
    """

    def __init__(self, seed: int, case: int, week: int, slices: int, columns: int):
        self.key = (seed, case, week)
        rng = self.random("patient")
        self.size = rng.uniform(0.95, 1.05)  # of everything, relative
        self.fat = rng.uniform(10, 22)  # mm under the skin of the hips
        self.muscle = rng.uniform(5.5, 9)  # mm that muscles swell beyond the atlas
        self.prostate = rng.uniform(0.88, 1.22)  # linear size, relative
        self.perineum = rng.uniform(14, 34)  # mm: the height where the thighs part
        self.coils = [
            rng.uniform(0.7, 1.5),
            rng.uniform(0.1, 0.6),
        ]  # gain at the skin of either side
        rng.shuffle(self.coils)
        rng = self.random("scan")
        self.bladder = rng.uniform(0.78, 1.22)  # linear size, relative
        self.rectum = rng.uniform(0.8, 1.35)  # radius, relative
        self.gas = rng.uniform(0.1, 0.9)  # how much of the rectum it fills
        self.shift = rng.normal(0, (3, 3, 4))  # mm: how the patient lies
        self.roll = rng.normal(0, 0.02)  # radians, in the coronal plane
        self.sigma = rng.uniform(
            0.0025, 0.005
        )  # noise of each channel, where urine's signal is about 0.8
        self.scale = rng.uniform(250, 900)  # integer units of a unit of signal

        self.planes = plane_numbers(slices)
        self.axes = (  # mm; a wider slice shows more at both ends
            (np.arange(ROWS) - (ROWS - 1) / 2) * SPACING[0],
            (np.arange(columns) - (columns - COLUMNS) / 2) * SPACING[1],
            (self.planes - (PLANES - 1) / 2) * SPACING[2],
        )
        self.place_voxels()
        rng = self.random("texture")
        self.rough, self.coarse, self.medium, self.fine = (
            self.noise(rng, mm) for mm in (11, 7, 3.2, 1.7)
        )

    def random(self, stream: str, plane: int = -1) -> np.random.Generator:
        """The random numbers for one purpose."""
        seed, case, week = self.key
        week = -1 if stream in PATIENT_STREAMS else week
        return np.random.default_rng([STREAMS.index(stream), seed, case, week + 1, plane + 1])

    def noise(self, rng: np.random.Generator, pitch: float) -> np.ndarray:
        """Smooth noise of mean 0 and variance 1 at every voxel: cubic B-splines on a lattice of `pitch` mm.

        The lattice covers any scan, so a plane's noise does not depend on which others are drawn.
        """
        spans = ((-225, 225), (-30, 230), (-55, 55))
        field = rng.standard_normal(
            [int((hi - lo) / pitch) + 5 for lo, hi in spans], dtype=np.float32
        )
        field *= np.float32((151 / 315) ** -1.5)  # 151/315: a spline's mean sum of squared weights
        for axis in (2, 0, 1):
            at = (self.axes[axis] - spans[axis][0]) / pitch
            first = np.floor(at).astype(int)
            t = (at - first).astype(np.float32).reshape(np.roll([-1, 1, 1], axis))
            weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * (t + t**2 - t**3), t**3)
            field = sum(np.take(field, first + i, axis) * (w / 6) for i, w in enumerate(weights))
        return field

    def place_voxels(self) -> None:
        """Where each voxel lies in the atlas: shifted, rolled, scaled and smoothly warped."""
        x, z, y = np.meshgrid(
            *(a.astype(np.float32) for a in self.axes), indexing="ij", sparse=True
        )
        x, y, z = (
            x + float(self.shift[0]),
            y + float(self.shift[1]),
            z + float(self.shift[2] - HEAD[2]),
        )
        cos, sin = float(np.cos(self.roll) / self.size), float(np.sin(self.roll) / self.size)
        patient, scan = self.random("patient warp"), self.random("scan warp")
        warp = [2.6 * self.noise(patient, 34) + 1.1 * self.noise(scan, 30) for _ in range(3)]
        self.x = cos * x + sin * z + warp[0]
        self.y = y * float(1 / self.size) + warp[1]
        self.z = cos * z - sin * x + warp[2] + float(HEAD[2])
        self.reach = []  # for `box`: the range of x in each row, of y in each plane, of z in each column
        for axis, coordinate in ((0, self.x), (2, self.y), (1, self.z)):
            others = tuple(i for i in range(3) if i != axis)
            self.reach.append((axis, coordinate.min(others), coordinate.max(others)))

    def box(self, low, high, margin: float = 6.0) -> tuple[slice, ...]:
        """The index range that holds all atlas points between `low` and `high` (x, y, z in mm), and a bit."""
        box = [slice(0)] * 3
        for (axis, least, most), lo, hi in zip(self.reach, low, high, strict=True):
            inside = np.flatnonzero((most >= lo - margin) & (least <= hi + margin))
            box[axis] = slice(inside[0], inside[-1] + 1) if inside.size else slice(0)
        return tuple(box)

    def capsule(self, a, b, radii, stretch=(1, 1, 1)):
        """A rod from a to b whose radius changes evenly: (box, signed distance in mm, negative inside)."""
        a, b, s = (np.asarray(v, dtype=np.float32) for v in (a, b, stretch))
        room = (max(radii) + 8) / s
        box = self.box(np.minimum(a, b) - room, np.maximum(a, b) + room)
        p = [(c[box] - o) * k for c, o, k in zip((self.x, self.y, self.z), a, s, strict=True)]
        d = (b - a) * s
        t = np.clip((p[0] * d[0] + p[1] * d[1] + p[2] * d[2]) / np.sum(d * d), 0, 1)
        away = np.sqrt(sum((q - t * e) ** 2 for q, e in zip(p, d, strict=True)))
        return box, away - (float(radii[0]) + t * float(radii[1] - radii[0]))

    def ellipsoid(self, centre, semi):
        """An ellipsoid: (box, signed distance in mm, nearly right close to the surface)."""
        centre, semi = (np.asarray(v, dtype=np.float32) for v in (centre, semi))
        box = self.box(centre - semi - 6, centre + semi + 6)
        p = [
            (c[box] - o) / k for c, o, k in zip((self.x, self.y, self.z), centre, semi, strict=True)
        ]
        k1 = np.sqrt(p[0] ** 2 + p[1] ** 2 + p[2] ** 2)
        k2 = np.sqrt(sum((q / k) ** 2 for q, k in zip(p, semi, strict=True)))
        return box, k1 * (k1 - 1) / np.maximum(k2, 1e-4)

    def blank(self) -> np.ndarray:
        """A distance to nothing yet."""
        return np.full(self.x.shape, FAR)


def plane_numbers(slices: int) -> np.ndarray:
    """Which of the 60 planes `slices` slices are: evenly spread, and all of them at 60."""
    return (np.arange(slices) * PLANES + PLANES // 2) // slices


def mirrored(points, side: int) -> list[np.ndarray]:
    return [np.array(p, dtype=np.float32) * (side, 1, 1) for p in points]


def cover(distance: np.ndarray, soft: float = 1.7) -> np.ndarray:
    """How much of a voxel a shape covers, 0 to 1: the soft edge of a partial volume, `soft` mm wide."""
    return np.clip(0.5 - distance * (1 / soft), 0, 1)


def paint(image: np.ndarray, box, distance: np.ndarray, signal, soft: float = 1.7) -> None:
    """Lay a tissue over the image, in place."""
    part = image[box]
    part += cover(distance, soft) * (signal - part)


def merge(group: np.ndarray, shape, blend: float = 6.0) -> None:
    """Join a (box, distance) to a group's distance, in place, rounding the seam over `blend` mm."""
    box, distance = shape
    part = group[box]
    overlap = np.maximum(blend - np.abs(part - distance), 0)
    np.minimum(part, distance, out=part)
    part -= overlap * overlap * (0.25 / blend)


def lines(noise: np.ndarray, width: float) -> np.ndarray:
    """1 on the sheets where noise crosses zero, fading on both sides: septa, fascia, folds."""
    return np.exp(-((noise * (1 / width)) ** 2))


# --- tissues: each function paints one kind, in place, over what is there -----------------------------------


def body_depth(scan: Scan) -> np.ndarray:
    """Depth under the skin in mm, negative outside: a rounded trunk whose lower end parts into two thighs."""
    width = 165 + scan.fat - (14 - 0.35 * scan.fat) * np.clip((scan.z - 95) / 110, 0, 1) ** 2
    width -= 7 * np.clip((40 - scan.z) / 60, 0, 1)
    thickness = 112 + 8 * np.clip(scan.z / 120, 0, 1)
    radius = ((np.abs(scan.x) / width) ** 2.6 + (np.abs(scan.y + 12) / thickness) ** 2.6) ** (
        1 / 2.6
    )
    trunk = (1 - radius) * width + 3 * scan.noise(scan.random("outline"), 38) + 0.3 * scan.rough
    top = scan.perineum + 50 * np.clip(
        (-30 - scan.y) / 15, 0, 1
    )  # behind, the cleft reaches higher
    above = scan.z - top
    half_gap = 1.1 * np.sqrt(np.maximum(-above, 0)) + 0.22 * np.maximum(
        scan.perineum - scan.z, 0
    )  # mm
    half_gap -= 1.5 * np.maximum(above, 0)
    return np.minimum(trunk, np.abs(scan.x) - half_gap + 0.6 * scan.rough)


def paint_fat(image: np.ndarray, scan: Scan, depth: np.ndarray, fat: np.ndarray) -> None:
    """Fat everywhere, brightest under the skin, with thin septa; small vessels wind through the deep part."""
    image[:] = (0.25 + 0.15 * cover(depth - fat, 6)) * (1 + 0.06 * scan.medium + 0.07 * scan.fine)
    image *= (
        1 - 0.2 * lines(scan.rough, 0.2) - 0.25 * lines(scan.coarse, 0.3) * cover(fat - depth, 6)
    )
    vessels = lines(scan.coarse, 0.22) * lines(scan.noise(scan.random("vessels"), 8), 0.22)
    image *= 1 - 0.7 * vessels * cover(fat - depth, 4)


def paint_bowel(image: np.ndarray, scan: Scan) -> None:
    """Loops of bowel above and around the bladder: dark walls and folds, filled with fluid, paste or gas."""
    rng = scan.random("bowel")
    box, cavity = scan.ellipsoid((0, 14, 200), (84, 76, 72))
    nearest, second, content = scan.blank(), scan.blank(), np.zeros(scan.x.shape, dtype=np.float32)
    for _ in range(90):
        start = rng.uniform((-80, -45, 134), (80, 70, 212))
        loop, d = scan.capsule(start, start + rng.normal(0, (24, 14, 9)), rng.uniform(9, 16, 2))
        closer = d < nearest[loop]
        second[loop] = np.minimum(second[loop], np.maximum(nearest[loop], d))
        nearest[loop] = np.minimum(nearest[loop], d)
        content[loop][closer] = rng.choice(
            [0.5, 0.34, 0.24, 0.18, 0.03], p=[0.15, 0.25, 0.3, 0.2, 0.1]
        )
    wall = np.maximum(nearest[box], cavity)
    lumen = np.maximum(wall + 2.4, 2.6 - (second - nearest)[box])
    paint(image, box, wall, 0.11)
    folds = 1 - 0.5 * lines(scan.medium[box], 0.25)
    paint(image, box, lumen, content[box] * folds * (1 + 0.12 * scan.fine[box]))


def nearest_muscle(scan: Scan):
    """Distance (mm) to the nearest muscle, how much farther the next is, the nearest's number, all axes."""
    nearest, second, which, axes = (
        scan.blank(),
        scan.blank(),
        np.zeros(scan.x.shape, dtype=np.uint8),
        [],
    )
    for side in (-1, 1):
        for points, (first, last), stretch in MUSCLES.values():
            points = mirrored(points, side)
            radii = np.linspace(first, last, len(points))
            for i in range(len(points) - 1):
                a, b = points[i : i + 2]
                box, d = scan.capsule(a, b, radii[i : i + 2], stretch)
                near = nearest[box]
                closer = d < near
                second[box] = np.minimum(second[box], np.maximum(near, d))
                near[closer], which[box][closer] = d[closer], len(axes)
                axes.append((b - a) / np.linalg.norm(b - a))
    return nearest, second - nearest, which, np.array(axes, dtype=np.float32)


def fibre_noise(scan: Scan, where: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Noise at the voxels `where`, drawn out eightfold along each one's muscle axis: `axes` (3, voxels)."""
    p = np.stack([scan.x[where], scan.y[where], scan.z[where]])
    p = (p - axes * (p * axes).sum(0) * 0.87) * (
        1 / 4.2
    )  # in cells of a 64 x 64 x 64 lattice that repeats
    cell = np.floor(p).astype(np.int32)
    t = p - cell
    t = t * t * (3 - 2 * t)
    lattice = scan.random("fibres").standard_normal(64**3, dtype=np.float32)
    value = np.zeros(p.shape[1], dtype=np.float32)
    for corner in np.ndindex(2, 2, 2):
        i, j, k = ((c + s) & 63 for c, s in zip(cell, corner, strict=True))
        u, v, w = (q if s else 1 - q for q, s in zip(t, corner, strict=True))
        value += lattice[(i << 12) | (j << 6) | k] * (u * v * w)
    return value


def paint_muscles(image: np.ndarray, scan: Scan, depth: np.ndarray, fat: np.ndarray) -> None:
    """Dark muscles that swell until they meet, seams of fat between them, bright streaks between bundles."""
    distance, gap, which, axes = nearest_muscle(scan)
    amount = cover(distance + 1.2 * scan.rough - scan.muscle, 2.5)
    amount *= cover(1.2 + 0.9 * scan.rough - gap, 2.6) * cover(fat + 2 - depth, 3)
    where = amount > 0
    fibres = fibre_noise(scan, where, axes[which[where]].T)
    patches = np.clip(0.25 + 0.5 * scan.rough[where], 0, 1) ** 2
    signal = (
        0.085
        + 0.013 * scan.fine[where]
        + 0.02 * fibres
        + (0.02 + 0.2 * patches) * lines(fibres, 0.4)
    )
    image[where] += amount[where] * (signal - image[where])


def paint_tubes(image: np.ndarray, scan: Scan) -> None:
    """Large vessels, black with flow; the root of the penis, grey in dark sheaths; the urethra."""
    for side in (-1, 1):
        for points, radius in VESSELS:
            points = mirrored(points, side)
            for a, b in itertools.pairwise(points):
                box, d = scan.capsule(a, b, (radius, radius))
                paint(image, box, d - 1.2, 0.14)
                paint(image, box, d, 0.02)
        for a, b, radii in (
            ((0, 16, 46), (0, 50, 40), (8, 8)),  # bulb
            ((8, 46, 52), (40, 6, 38), (7, 4)),  # crus
            ((8, 46, 52), (9, 66, 40), (7, 8)),  # corpus cavernosum
        ):
            box, d = scan.capsule(*mirrored((a, b), side), radii)
            paint(image, box, d, 0.08)
            paint(image, box, d + 1.6, 0.27)
    paint(image, *scan.capsule((0, 8, 76), (0, 20, 50), (6, 5)), 0.13)  # urethra in its sphincter


def bone_distances(scan: Scan) -> list[np.ndarray]:
    """Signed distances in mm of the thigh bones, the hip bones and the sacrum; joints part the three."""
    femur, hip, sacrum = scan.blank(), scan.blank(), scan.blank()
    for side in (-1, 1):
        flip = np.array([side, 1, 1])
        merge(femur, scan.ellipsoid(HEAD * flip, (HEAD_RADIUS,) * 3))
        for points, radii in FEMUR:
            merge(femur, scan.capsule(*mirrored(points, side), radii), 9)
        merge(femur, scan.ellipsoid((146 * side, -11, 76), (13, 15, 20)), 9)  # greater trochanter

        for points, radii, stretch in HIP_BONE:
            merge(hip, scan.capsule(*mirrored(points, side), radii, stretch))
        merge(hip, scan.ellipsoid((97 * side, 2, 122), (15, 20, 13)))  # roof of the socket
        merge(hip, scan.ellipsoid((86 * side, -18, 97), (13, 15, 24)))  # its posterior wall
        box, shell = scan.ellipsoid(HEAD * flip, (HEAD_RADIUS + 7,) * 3)
        x, y, z = (
            c[box] - float(h) for c, h in zip((scan.x, scan.y, scan.z), HEAD * flip, strict=True)
        )
        out = 0.72 * side * x + 0.2 * y - 0.66 * z  # mm towards the socket's opening
        merge(hip, (box, np.maximum(np.abs(shell) - 4, out - 4)), 4)
        hip[box] = np.maximum(hip[box], -4.4 - shell)  # room for the head and the joint
    for points, radii, stretch in SACRUM:
        merge(sacrum, scan.capsule(*points, radii, stretch))
    return [femur, np.maximum(hip, 2.2 - np.abs(scan.x)), np.maximum(sacrum, 2.5 - hip)]


def paint_bones(image: np.ndarray, scan: Scan) -> np.ndarray:
    """Black cortex around light, mottled marrow; grey cartilage in the joints. Returns the mask."""
    mask = np.zeros(image.shape, dtype=bool)
    marrow = 0.32 * (1 + 0.08 * scan.coarse + 0.13 * scan.medium + 0.15 * scan.fine)
    uneven = 1 + 0.3 * scan.coarse
    shaft = np.clip((62 - scan.z) / 30, 0, 1)
    paint(image, *scan.ellipsoid((0, 42, 74), (7, 12, 20)), 0.1)  # disc of the symphysis
    for side in (-1, 1):
        paint(
            image, *scan.ellipsoid(HEAD * (side, 1, 1), (HEAD_RADIUS + 2.4,) * 3), 0.2
        )  # cartilage
    for distance, cortex in zip(bone_distances(scan), (1.4 + 3.5 * shaft, 1.7, 1.3), strict=True):
        mask |= distance < 0
        paint(image, ..., distance - 0.3, 0.02)
        paint(image, ..., distance + cortex * uneven, marrow, 2.4)
    return mask


def paint_rectum(image: np.ndarray, scan: Scan) -> np.ndarray:
    """Anal canal, rectum, start of the sigmoid: dark wall, grey stool, black gas. Returns the mask."""
    distance = scan.blank()
    course = [
        (0, -14, 44),
        (0, -20, 70),
        (0, -29, 92),
        (3, -38, 124),
        (10, -42, 148),
        (26, -26, 170),
    ]
    radii = np.array([8, 10, 15, 17, 15, 12]) * ([1, 1] + [scan.rectum] * 4)
    for i in range(len(course) - 1):
        merge(distance, scan.capsule(course[i], course[i + 1], radii[i : i + 2]), 5)
    distance += 0.9 * scan.rough
    stool = 0.25 + 0.05 * scan.medium + 0.03 * scan.fine
    height = scan.y + 34 + 6 * scan.coarse  # gas collects in front: the patient lies supine
    gas = np.clip((height - 12 + 24 * scan.gas) * 0.4, 0, 1)
    paint(image, ..., distance, 0.11)
    wall = 3.4 + np.clip(80 - scan.z, 0, 6)  # mm, with the sphincter below
    paint(image, ..., distance + wall, stool * (1 - gas) + 0.015 * gas)
    return distance < 0


def paint_prostate(image: np.ndarray, scan: Scan) -> np.ndarray:
    """A mottled central gland in a bright peripheral zone; seminal vesicles above. Returns the mask."""
    for side in (-1, 1):
        box, d = scan.capsule(*mirrored([(7, -12, 112), (34, -14, 122)], side), (5, 6))
        paint(image, box, d, 0.08)
        paint(image, box, d + 1.5, 0.5 - 0.32 * lines(scan.medium[box], 0.5))
    size = scan.prostate
    centre = np.array([0, 8, 111 - 19 * size])
    box, d = scan.ellipsoid(centre, np.array([26, 18, 20.5]) * size)
    d = d + 0.7 * scan.coarse[box]
    paint(image, box, d - 0.8, 0.06)
    paint(image, box, d + 1.2, 0.4 + 0.05 * scan.medium[box] + 0.04 * scan.fine[box])
    mask = np.zeros(image.shape, dtype=bool)
    mask[box] = d < 0
    box, d = scan.ellipsoid(centre + np.array([0, 4, 4.2]) * size, np.array([20, 14, 15.5]) * size)
    mottle = 0.2 + 0.05 * scan.medium + 0.03 * scan.fine - 0.07 * lines(scan.medium, 0.3)
    paint(image, box, d, 0.1)
    paint(image, box, d + 1.4, mottle[box])
    return mask


def paint_bladder(image: np.ndarray, scan: Scan) -> np.ndarray:
    """Bright urine in a thin dark wall. Returns the mask."""
    semi = np.array([39, 28, 27]) * scan.bladder
    box, d = scan.ellipsoid((0, 16, 108 + semi[2]), semi)
    d = d + 1.1 * scan.rough[box]
    paint(image, box, d, 0.07)
    paint(image, box, d + 3.2, 0.78 + 0.012 * scan.coarse[box])
    mask = np.zeros(image.shape, dtype=bool)
    mask[box] = d < 0
    return mask


def draw_tissues(scan: Scan):
    """(signal before shading, float32; labels, uint8), both of the scan's shape."""
    depth = body_depth(scan)
    fat = scan.fat * (0.9 + 0.1 * scan.rough)  # mm: how deep it reaches under the skin
    image = np.empty(scan.x.shape, dtype=np.float32)
    labels = np.full(image.shape, BODY, dtype=np.uint8)
    paint_fat(image, scan, depth, fat)
    paint_bowel(image, scan)
    paint_muscles(image, scan, depth, fat)
    paint_tubes(image, scan)
    for label, organ in (
        (BONE, paint_bones), (RECTUM, paint_rectum), (PROSTATE, paint_prostate), (BLADDER, paint_bladder)
    ):  # fmt: skip
        labels[organ(image, scan)] = label
    paint(image, ..., depth - 1.6, 0.2)  # skin
    image *= cover(-depth)
    labels[depth <= 0] = BACKGROUND
    return image, labels


def shade(image: np.ndarray, scan: Scan) -> np.ndarray:
    """The image as surface coils see it: brightest at one side's skin, fainter towards both ends."""
    gain = 1 + sum(
        scan.coils[i] / (1 + np.exp((150 - side * scan.x) / 12)) for i, side in enumerate((-1, 1))
    )
    ends = 1 - 0.35 * np.abs((scan.z - 100) / 115) ** 3
    image = image * (gain * ends * (1 + 0.08 * scan.noise(scan.random("shading"), 55)))
    return image / np.sqrt(
        np.sqrt(1 + image**4)
    )  # the scanner's own correction tames the brightest


def make_volume(
    case: int,
    week: int,
    slices: int = PLANES,
    columns: int = COLUMNS,
    seed: int = 0,
    noise: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """One scan: (image int16, labels uint8), both (256, columns, slices), the last axis from back to front.

    The slices are taken evenly from the volume's 60 planes. `noise=False` gives the same scan at the same
    intensity scale without its noise.
    """
    scan = Scan(seed, case, week, slices, columns)
    image, labels = draw_tissues(scan)
    image = shade(image, scan)
    for i, plane in enumerate(scan.planes if noise else ()):
        real, imaginary = scan.random("noise", int(plane)).normal(0, scan.sigma, (2, ROWS, columns))
        image[..., i] = np.hypot(image[..., i] + real, imaginary)  # Rician
    return np.rint(image * scan.scale).astype(np.int16), labels


# --- files --------------------------------------------------------------------------------------------------


def plan(volumes) -> list[tuple[str, int, int, int]]:
    """(split, case, week, columns) of every volume; the last training volume is wider, unless it is alone."""
    jobs = []
    for (split, cases), count in zip(CASES.items(), volumes, strict=True):
        patients = min(
            len(cases), -(-2 * count // 3)
        )  # few weeks of each while there are patients left
        jobs += sorted((split, cases[i % patients], i // patients, COLUMNS) for i in range(count))
    if volumes[0] > 1:
        jobs[volumes[0] - 1] = (*jobs[volumes[0] - 1][:3], WIDE_COLUMNS)
    return jobs


def write_volume(root: Path, slices: int, seed: int, job: tuple[str, int, int, int]) -> None:
    """Write one volume as 2D slices and masks. At module level, where spawned workers find it."""
    split, case, week, columns = job
    image, labels = make_volume(case, week, slices, columns, seed)
    affine = np.zeros((4, 4))
    affine[[0, 2, 1, 3], [0, 1, 2, 3]] = [*SPACING, 1]  # rows run right, columns up, planes forward
    affine[[0, 2], 3] = -(ROWS - 1) / 2 * SPACING[0], -(columns - 1) / 2 * SPACING[1]
    for i, plane in enumerate(plane_numbers(slices)):
        affine[1, 3] = (plane - (PLANES - 1) / 2) * SPACING[2]
        name = f"{case:03d}_week_{week}_slice_{i}.nii.gz"
        folders = root / f"keras_slices_{split}", root / f"keras_slices_seg_{split}"
        for path, data in (
            (folders[0] / f"case_{name}", image),
            (folders[1] / f"seg_{name}", labels),
        ):
            nifti = nib.Nifti1Image(np.ascontiguousarray(data[..., i]), affine)
            nifti.header.set_xyzt_units("mm")
            path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=4, mtime=0))  # dateless


def check_request(out: Path, volumes, slices: int, seed: int) -> None:
    if len(volumes) != 3 or min(volumes) < 1:
        raise ValueError(
            f"volumes must be three numbers from 1 up (train, val, test), not {list(volumes)}"
        )
    if not 1 <= slices <= PLANES:
        raise ValueError(
            f"slices must lie between 1 and {PLANES}, the planes of a volume, not {slices}"
        )
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(
            f"{out} exists and is not an empty folder: delete it, or name another one"
        )


def write_phantom(out, volumes=(12, 2, 2), slices=20, seed=0, workers=None, progress=True) -> Path:
    """Write a phantom data set and return its folder, which gets its name only once it is complete.

    volumes: how many to train, validate and test on; no patient is in two splits. slices: of each, 1 to 60.
    workers: processes, by default one for each core; their number changes no byte.
    Raises FileExistsError when `out` holds something, ValueError for impossible numbers.
    """
    out = Path(out)
    check_request(out, volumes, slices, seed)
    jobs = plan(volumes)
    workers = min(
        workers or os.cpu_count() or 1, len(jobs), 61
    )  # Windows waits for no more processes
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        root = Path(temporary) / "set"
        for split in CASES:
            (root / f"keras_slices_{split}").mkdir(parents=True)
            (root / f"keras_slices_seg_{split}").mkdir()
        write = partial(write_volume, root, slices, seed)
        bar = partial(
            tqdm, total=len(jobs), desc=f"phantom -> {out}", unit="volume", disable=not progress
        )
        if workers == 1:
            list(bar(map(write, jobs)))
        else:
            # Spawned, not forked: the caller may hold threads (torch) that do not survive a fork.
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                list(bar(pool.map(write, jobs)))
        check_request(out, volumes, slices, seed)  # another process may have written it meanwhile
        if out.exists():
            out.rmdir()
        os.rename(root, out)
    return out


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("sample_data"),
        help="folder to make (default: sample_data)",
    )
    add("--volumes", type=int, nargs=3, default=[12, 2, 2], metavar=("TRAIN", "VAL", "TEST"),
        help="volumes in each split (default: 12 2 2; HipMRI has 191 11 9)")  # fmt: skip
    add(
        "--slices",
        type=int,
        default=20,
        help="coronal slices of each volume, 1 to 60 (default: 20)",
    )
    add("--seed", type=int, default=0, help="another seed, other patients (default: 0)")
    args = parser.parse_args(arguments)
    try:
        out = write_phantom(args.out, args.volumes, args.slices, args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = sum(args.volumes)
    print(f"{out}: {count * args.slices} slices of {count} volumes, and as many masks")


if __name__ == "__main__":
    main()
