"""Raw cases for the demo, made from one average brain.

nilearn's wheel holds the MNI152 T1 average with its grey and white matter maps, so a fresh machine needs no download.
A "subject" is that brain under a random affine, a smooth random deformation, a change of contrast, a bias field and
Rician noise. Subjects of one brain differ far less than people do: they show that the software runs, nothing more.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import UserError

Array = NDArray[numpy.float32]

GREY_MATTER, WHITE_MATTER = 1, 2
CLASS_NAMES = {GREY_MATTER: "grey matter", WHITE_MATTER: "white matter"}
FORMAT = 1

_TEMPLATE_SPACING_MM = 2.0
_MARGIN_MM = 16.0
# Most files are plain; some come as other scanners and converters write them, so that prepare has work to do.
_ORIENTATIONS = ("RAS", "LPS", "RAS", "LAS", "RAS", "PIR", "RAS", "ASL")
_SPACINGS_MM = ((2.0, 2.0, 2.0), (2.0, 2.0, 2.0), (2.0, 2.0, 3.0), (2.0, 2.0, 2.0), (2.5, 2.0, 2.0))


@dataclass(frozen=True)
class Template:
    """The average brain on a 2 mm grid. Arrays are (X, Y, Z), indices growing to the right, front and top."""

    t1: Array
    grey: Array
    white: Array
    origin_mm: tuple[float, float, float]


def make_cases(
    raw: Path,
    *,
    cases: int = 14,
    seed: int = 0,
    workers: int | None = None,
) -> bool:
    """Write `cases` volumes as RAW/images/*.nii.gz with RAW/labels/*.nii.gz (1 grey matter, 2 white matter).

    The files depend on `seed` and `cases` alone, byte for byte. They appear all at once: a call that is killed leaves
    nothing under `raw`.

    Args:
        raw: folder to create.
        cases: how many.
        seed: the same seed gives the same first cases, whatever their number.
        workers: threads; by default one a core.

    Returns: False where `raw` holds these very cases already.
    Raises: UserError where `raw` exists and holds something else.
    """
    if cases < 1:
        raise UserError(f"cases: expected at least 1, got {cases}")
    settings = {"format": FORMAT, "cases": cases, "seed": seed}
    description = raw / "cases.json"
    if description.is_file() and json.loads(description.read_text(encoding="utf-8"))["settings"] == settings:
        return False
    if raw.exists():
        raise UserError(
            f"{raw}: exists and does not hold {cases} demo cases of seed {seed}; name another folder or "
            "start anew with --fresh"
        )

    partial = raw.with_name(raw.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("images", "labels"):
        (partial / folder).mkdir(parents=True)
    template = load_template()

    # Threads: scipy's interpolation and zlib release the lock, and nothing has to be pickled.
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        lines = list(pool.map(lambda index: _write_case(template, partial, index, seed), range(cases)))
    (partial / "cases.json").write_text(json.dumps({"settings": settings, "cases": lines}, indent=1) + "\n")
    partial.rename(raw)
    return True


def load_template() -> Template:
    """The MNI152 average from nilearn's wheel, averaged to 2 mm and cut to the brain with a margin of 16 mm."""
    try:
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    except ImportError as error:
        raise UserError(
            "nilearn: not installed, and the demo makes its cases from it; pip install 'voxtrast[demo]'"
        ) from error
    image = load_mni152_template(resolution=1)
    t1, grey, white = (
        _halve(numpy.asarray(map_.dataobj, dtype=numpy.float32))
        for map_ in (image, load_mni152_gm_template(resolution=1), load_mni152_wm_template(resolution=1))
    )
    margin = round(_MARGIN_MM / _TEMPLATE_SPACING_MM)
    lower, upper = [], []
    for axis in range(3):
        occupied = numpy.flatnonzero((t1 > 0.05).any(axis=tuple({0, 1, 2} - {axis})))
        lower.append(max(0, int(occupied[0]) - margin))
        upper.append(min(t1.shape[axis], int(occupied[-1]) + 1 + margin))
    box = tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))
    # Averaging pairs of voxels moves the first centre by half a millimetre.
    origin = image.affine @ numpy.array([*(2.0 * numpy.array(lower) + 0.5), 1.0])
    return Template(t1[box], grey[box], white[box], (float(origin[0]), float(origin[1]), float(origin[2])))


def _halve(volume: Array) -> Array:
    """Mean over blocks of 2 x 2 x 2; an odd last slice is dropped."""
    x, y, z = (size // 2 for size in volume.shape)
    blocks = volume[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2)
    return blocks.mean(axis=(1, 3, 5), dtype=numpy.float32)


def _write_case(template: Template, folder: Path, index: int, seed: int) -> dict[str, Any]:
    random = numpy.random.default_rng([seed, index])
    spacing_mm = _SPACINGS_MM[index % len(_SPACINGS_MM)]
    orientation = _ORIENTATIONS[index % len(_ORIENTATIONS)]
    image, label, affine, deformation_mm = make_subject(template, random, spacing_mm)
    wanted = nibabel.orientations.axcodes2ornt(orientation)
    change = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(affine), wanted)
    name = f"brain_{index:02d}.nii.gz"
    for kind, array in (("images", image), ("labels", label)):
        nifti = nibabel.Nifti1Image(array, affine)
        nifti.header.set_xyzt_units("mm")
        nibabel.save(nifti.as_reoriented(change), folder / kind / name)
    return {
        "file": name,
        "orientation": orientation,
        "spacing_mm": list(spacing_mm),
        "deformation_mm": round(deformation_mm, 2),
    }


def make_subject(
    template: Template, random: numpy.random.Generator, spacing_mm: tuple[float, float, float]
) -> tuple[NDArray[numpy.int16], NDArray[numpy.uint8], NDArray[numpy.float64], float]:
    """One deformed brain.

    Returns: image (X, Y, Z) int16 with a scale of its own; label (X, Y, Z) uint8; affine from index to RAS mm; root
        mean square of the smooth deformation in mm.
    """
    extent_mm = [(size - 1) * _TEMPLATE_SPACING_MM for size in template.t1.shape]
    shape = tuple(int(extent / spacing) + 1 for extent, spacing in zip(extent_mm, spacing_mm, strict=True))
    deformation = numpy.stack(
        [
            # 20 mm carries the shape of the head and the lobes, 8 mm that of the gyri.
            3.5 * _smooth_field(random, shape, spacing_mm, 20.0) + 1.2 * _smooth_field(random, shape, spacing_mm, 8.0)
            for _ in range(3)
        ]
    )
    centre_mm = numpy.array(extent_mm) / 2
    linear = _rotation(random.uniform(-8.0, 8.0, 3)) @ numpy.diag(numpy.exp(random.uniform(-0.06, 0.06, 3)))
    grid = numpy.stack(
        numpy.meshgrid(
            *(numpy.arange(n) * step - c for n, step, c in zip(shape, spacing_mm, centre_mm, strict=True)),
            indexing="ij",
        )
    ).astype(numpy.float32)
    source_mm = numpy.tensordot(linear, grid, axes=1) + centre_mm[:, None, None, None] + deformation
    points = (source_mm / _TEMPLATE_SPACING_MM).astype(numpy.float32)
    t1, grey, white = (
        ndimage.map_coordinates(volume, points, order=1, mode="constant")
        for volume in (template.t1, template.grey, template.white)
    )

    rest = 1.0 - grey - white
    label = numpy.where(white > numpy.maximum(grey, rest), WHITE_MATTER, numpy.where(grey > rest, GREY_MATTER, 0))
    # Order of the tissues is that of any T1 image; how far they lie apart is the subject's own.
    signal = numpy.maximum(t1, 0.0) ** random.uniform(0.75, 1.35)
    signal *= 1.0 + random.uniform(-0.06, 0.06) * grey
    signal *= numpy.exp(random.uniform(0.05, 0.15) * _smooth_field(random, shape, spacing_mm, 45.0))
    noise = random.uniform(0.01, 0.03) * random.standard_normal((2, *shape), dtype=numpy.float32)
    magnitude = numpy.hypot(signal + noise[0], noise[1])
    image = numpy.round(random.uniform(400.0, 4000.0) * magnitude).clip(0, 32767)

    affine = numpy.diag([*spacing_mm, 1.0])
    affine[:3, 3] = template.origin_mm
    deformation_mm = float(numpy.sqrt((deformation**2).sum(axis=0).mean()))
    return image.astype(numpy.int16), label.astype(numpy.uint8), affine, deformation_mm


def _smooth_field(
    random: numpy.random.Generator, shape: tuple[int, ...], spacing_mm: tuple[float, ...], sigma_mm: float
) -> Array:
    """Smooth random field (X, Y, Z), mean 0 and standard deviation 1 over the volume.

    White noise on knots that lie half a sigma apart, spread by a Gaussian of `sigma_mm` (three products with small
    matrices: exact at every voxel, and a fraction of the cost of filtering and resampling).
    """
    kernels = []
    for size, step in zip(shape, spacing_mm, strict=True):
        position_mm = numpy.arange(size) * step
        knots_mm = numpy.arange(-3 * sigma_mm, position_mm[-1] + 3 * sigma_mm, sigma_mm / 2)
        kernels.append(numpy.exp(-0.5 * ((position_mm[:, None] - knots_mm) / sigma_mm) ** 2))
    noise = random.standard_normal([kernel.shape[1] for kernel in kernels])
    field = numpy.einsum("xi,yj,zk,ijk->xyz", *kernels, noise, optimize=True)
    return ((field - field.mean()) / field.std()).astype(numpy.float32)


def _rotation(angles_degrees: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Rotations about X, then Y, then Z."""
    result = numpy.eye(3)
    for axis, angle in enumerate(numpy.deg2rad(angles_degrees)):
        turn = numpy.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = numpy.cos(angle)
        turn[second, first] = numpy.sin(angle)
        turn[first, second] = -numpy.sin(angle)
        result = turn @ result
    return result
