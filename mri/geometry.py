"""Interpret the geometry of NIfTI files: affines, units, orientations and the planes of a volume.

    affine_of(header)                         # (4, 4), from voxel indices to mm
    planes_shape(header, axis="coronal")      # (N, rows, columns)
    geometry_header(header)                   # a new header with the geometry and nothing else

Units. Headers may be in metres, millimetres or micrometres. All affines and spacings that these
functions return are in mm; files without a unit are assumed to be in mm.

Orientation. A volume is cut into "sagittal", "coronal" or "axial" planes according to its affine.
Rows and columns then run towards the right, anterior or superior side. Alternatively, a volume is
cut along its stored axis 0, 1 or 2, and the affine is ignored. Only `Cut` deals with axes and
directions: it maps stored voxels to planes and back, with `nibabel.orientations`.

Errors. ValueError is raised for a header that cannot be used. Its message follows the rules in
mri/nifti_file.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # normals of the planes: right, anterior, superior
# Directions of the rows, columns and planes for each value of AXES, in nibabel's letters.
_PLANE_CODES = ("ASR", "RSA", "RAS")

# The fields of a header that describe its geometry, apart from the shape.
GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI codes: unknown, m, mm, micrometre


# ---------------------------------------------------------------- headers


def geometry_header(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """Return a new header that has only the NIfTI version, shape and geometry of another header.

    The sform, the qform, their codes, the voxel sizes and the units are copied as they are stored.
    Nothing else is copied, so the new header has no patient data.
    """
    new_header = type(header)()
    new_header.set_data_shape(header.get_data_shape())
    for field in GEOMETRY_FIELDS:
        new_header[field] = header[field]
    try:
        header.get_xyzt_units()
    except KeyError:  # invalid codes, which other programs may not be able to read
        new_header["xyzt_units"] = _unit_code(header)
    return new_header


def affine_header(affine: np.ndarray, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """Return a new header for an array of this shape, with an affine (4, 4) in mm as its sform.

    Raises:
        ValueError: if the shape is invalid.
    """
    is_large = max(shape, default=0) > 32767  # the limit of NIfTI-1
    header = nib.Nifti2Header() if is_large else nib.Nifti1Header()
    _set_shape(header, shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code="aligned")
    try:
        with np.errstate(all="ignore"):
            header.set_qform(affine, code="unknown")  # also sets the voxel sizes
    except (nib.spatialimages.HeaderDataError, np.linalg.LinAlgError):
        pass  # the affine is not a rotation with voxel sizes; only the sform can represent it
    return header


def geometry_record(header: nib.Nifti1Header) -> np.ndarray:
    """Return the GEOMETRY_FIELDS of a header as a structured scalar, to be saved as an array."""
    return header.structarr[list(GEOMETRY_FIELDS)].astype(_record_dtype(type(header)))


def header_from_record(record: np.ndarray, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """Return a header with the given shape and the fields of a `geometry_record`.

    Raises:
        ValueError: if the fields or the shape are invalid.
    """
    for header_class in (nib.Nifti1Header, nib.Nifti2Header):
        if record.shape == () and record.dtype == _record_dtype(header_class):
            header = header_class()
            try:
                _set_shape(header, shape)
                for field in GEOMETRY_FIELDS:
                    header[field] = record[field]
                header.check_fix()
            except nib.spatialimages.HeaderDataError as error:
                raise ValueError(f"its geometry is invalid: {error}") from error
            affine_of(header)  # raises ValueError if it is unusable
            return header
    raise ValueError("its geometry has unknown fields")


def _set_shape(header: nib.Nifti1Header, shape: tuple[int, ...]) -> None:
    """Set the shape of a header; raise ValueError if NIfTI does not allow it."""
    if not 1 <= len(shape) <= 7 or min(shape) < 1:
        raise ValueError(f"shape is {format_shape(shape)}, expected 1 to 7 positive numbers")
    header.set_data_shape(shape)


def _record_dtype(header_class: type) -> np.dtype:
    """Return the structured data type of a `geometry_record`, little-endian and packed."""
    fields = header_class.template_dtype.fields
    dtype = np.dtype([(name, fields[name][0]) for name in GEOMETRY_FIELDS])
    return dtype.newbyteorder("<")


# ---------------------------------------------------------------- affines


def affine_of(header: nib.Nifti1Header) -> np.ndarray:
    """Return the affine (4, 4), from voxel indices to mm; raise ValueError if it is unusable.

    The sform is used if its code is set, otherwise the qform. The qform also replaces an sform that
    is singular, if the qform is usable. If neither code is set, only the voxel sizes are known; as
    in nibabel, the first axis is then assumed to run to the left.
    """
    with np.errstate(all="ignore"):
        transforms = []
        if header["sform_code"] > 0:
            transforms.append(header.get_sform())
        if header["qform_code"] > 0:
            transforms.append(_qform(header))
        transforms = transforms or [header.get_base_affine()]
        to_mm = np.diag([_MM_PER_UNIT[_unit_code(header)]] * 3 + [1.0])
        affines = [to_mm @ transform for transform in transforms]
    for affine in affines:
        if _has_valid_numbers(affine) and _orientation_of(affine) is not None:
            return affine
    if not _has_valid_numbers(affines[0]):
        raise ValueError("has an affine with NaN, infinite or too large numbers")
    return affines[0]


def _has_valid_numbers(affine: np.ndarray) -> bool:
    """Return whether all elements of an affine are finite and below 1e9."""
    return bool(np.abs(affine).max() < 1e9)


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    """Return the affine (4, 4) of a qform, in the header's unit.

    Rounding may make the norm of the stored quaternion exceed 1, which nibabel refuses. As in
    NIfTI's reference implementation, such a quaternion is normalised.
    """
    try:
        return header.get_qform()
    except ValueError:
        names = ("quatern_b", "quatern_c", "quatern_d")
        quaternion = np.array([header[name] for name in names], np.float64)
        quaternion /= np.linalg.norm(quaternion)
        normalised = header.copy()
        for name, value in zip(names, quaternion, strict=True):
            normalised[name] = value
        return normalised.get_qform()


def _unit_code(header: nib.Nifti1Header) -> int:
    """Return the NIfTI code of the unit of length; 0 if it is unknown or invalid."""
    code = int(header["xyzt_units"]) % 8
    return code if code in _MM_PER_UNIT else 0


def _orientation_of(affine: np.ndarray) -> np.ndarray | None:
    """Return the orientation of an affine, (3, 2), or None if it does not determine one.

    `axis_orientation` describes the array.
    """
    try:
        with np.errstate(all="ignore"):
            orientation = nib.orientations.io_orientation(affine)
    except (ValueError, np.linalg.LinAlgError):
        return None
    return None if np.isnan(orientation).any() else orientation


def axis_orientation(header: nib.Nifti1Header) -> np.ndarray:
    """Return the orientation of the stored axes, (3, 2), in nibabel's notation.

    Row i describes stored axis i: first the index of the closest of (right, anterior, superior),
    then 1, or -1 if the axis runs the other way. Raises ValueError if the affine does not determine
    the directions.
    """
    orientation = _orientation_of(affine_of(header))
    if orientation is None:
        raise ValueError("has an affine that does not determine the directions of its axes")
    return orientation


# ---------------------------------------------------------------- planes


@dataclass(frozen=True)
class Cut:
    """The mapping between the stored axes of a volume and (row, column, plane)."""

    axis: int  # axis to cut along: a value of AXES, or a stored axis if orientation is None
    orientation: np.ndarray | None  # (3, 2), from `axis_orientation`; None: use the stored axes

    @property
    def _to_planes(self) -> np.ndarray:
        """Return the orientation (3, 2) from stored axes to (row, column, plane) for nibabel."""
        stored = axcodes2ornt("RAS") if self.orientation is None else self.orientation
        return ornt_transform(stored, axcodes2ornt(_PLANE_CODES[self.axis]))

    def planes(self, voxels: np.ndarray) -> np.ndarray:
        """Cut stored voxels (3 axes) into planes (N, rows, columns), and return a view of them."""
        return np.moveaxis(apply_orientation(voxels, self._to_planes), -1, 0)

    def voxels(self, planes: np.ndarray) -> np.ndarray:
        """Join planes (N, rows, columns) into stored voxels; this is the inverse of `planes`."""
        to_stored = ornt_transform(axcodes2ornt("RAS"), self._to_planes)
        return apply_orientation(np.moveaxis(planes, 0, -1), to_stored)

    def affine(self, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        """Return the affine (4, 4) from (row, column, plane) to mm.

        Args:
            affine: (4, 4), from stored voxel indices to mm.
            shape: shape of the stored voxels, with 3 axes.
        """
        return affine @ inv_ornt_aff(self._to_planes, shape)


def find_cut(header: nib.Nifti1Header, axis: str | int, dimensions: int | None) -> Cut:
    """Return how to cut a file; arguments and errors are those of `nifti.stored_planes`."""
    if (dimensions or dimensions_of(header.get_data_shape())) == 2:
        return Cut(2, None)
    if isinstance(axis, str):
        return Cut(AXES[axis], axis_orientation(header))
    return Cut(axis, None)


def dimensions_of(shape: tuple[int, ...]) -> int:
    """Return 2 if all dimensions after the second have size 1, otherwise 3."""
    return 2 if all(size == 1 for size in shape[2:]) else 3


def volume_shape(shape: tuple[int, ...], dimensions: int | None) -> tuple[int, ...]:
    """Return the first three dimensions of a file; a slice counts as a volume with one plane."""
    dimensions = dimensions or dimensions_of(shape)
    if len(shape) < dimensions:
        raise ValueError(f"has shape {format_shape(shape)}, expected {dimensions} dimensions")
    return (*shape[:2], 1) if dimensions == 2 else shape[:3]


def planes_shape(
    header: nib.Nifti1Header, axis: str | int, dimensions: int | None = None
) -> tuple[int, int, int]:
    """Return (N, rows, columns) of the planes of a file; arguments as in `nifti.stored_planes`."""
    shape = volume_shape(header.get_data_shape(), dimensions)
    return find_cut(header, axis, dimensions).planes(np.broadcast_to(0, shape)).shape


def planes_affine(
    header: nib.Nifti1Header, axis: str | int, dimensions: int | None = None
) -> np.ndarray:
    """Return the affine (4, 4) from (row, column, plane) to mm; arguments as in `planes_shape`."""
    shape = volume_shape(header.get_data_shape(), dimensions)
    return find_cut(header, axis, dimensions).affine(affine_of(header), shape)


def format_shape(shape: tuple[int, ...]) -> str:
    """Format a shape for messages: (64, 80) -> "64 x 80"."""
    return " x ".join(map(str, shape))


def describe_small_planes(axis: str | int | None, size: tuple[int, int], min_side: int) -> str:
    """Return a message that planes are too small, with advice on getting larger ones.

    Args:
        axis: axis along which the volume is cut; None for a 2D file.
        size: (rows, columns) of the planes, in pixels.
        min_side: minimum number of rows and of columns.
    """
    if axis is None:
        return f"it has {format_shape(size)} pixels, expected at least {min_side} x {min_side}"
    direction = axis if isinstance(axis, str) else f"axis {axis}"
    return (
        f"cut along {direction}, its planes have {format_shape(size)} pixels, expected at least "
        f"{min_side} x {min_side}; --axis chooses another direction"
    )
