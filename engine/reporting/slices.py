"""Volumes to leaf through: every slice in a strip, of which a window shows one; without scripts the middle one."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy
from numpy.typing import NDArray

from . import page
from .planes import Frame, Plane, centre_of, planes_through, window_of

Volume = NDArray[Any]

MOST_SLICES = 24  # of one direction; of a larger volume every second or third is there, so that the page stays small
QUALITY = 80  # of JPEG
LONGEST_PX = 300  # of the volume's longest side where there is room; all planes are on one scale


@dataclass(frozen=True)
class Tile:
    title: str
    volume: Volume  # (*S) grey, or (*S, 3) colours from 0 to 1
    window: tuple[float, float] | None = None  # values shown as black and white; default from the volume


def leaf_through(name: str, frame: Frame, tiles: Sequence[Tile], centre: Sequence[int] | None = None) -> str:
    """Volumes of one grid side by side, a row a plane, with one slider for all of them.

    Args:
        name: of the case, for those who cannot see the pictures.
        tiles: volumes of equal (*S).
        centre: the voxel through which the first slices go; default the middle of what is bright in the first.
    """
    sides_mm = [size * spacing for size, spacing in zip(tiles[0].volume.shape, frame.spacing_mm, strict=False)]
    middle = list(centre) if centre is not None else centre_of(tiles[0].volume)
    pixels = [_pixels(tile, tile.volume.ndim > frame.dimensions) for tile in tiles]
    rows = []
    for plane in planes_through(middle, frame):
        places = [0]
        if plane.axis is not None:
            count = tiles[0].volume.shape[plane.axis]
            places = sorted(set(numpy.linspace(0, count - 1, min(count, MOST_SLICES)).round().astype(int).tolist()))
        shown = int(numpy.abs(numpy.array(places) - plane.index).argmin())
        drawn = [
            _tile(f"{name}, {tile.title}, {plane.name}", tile.title, each, plane, places, shown, frame)
            for tile, each in zip(tiles, pixels, strict=True)
        ]
        width = sides_mm[plane.horizontal] / max(sides_mm)
        rows.append(_row(name, plane, drawn, places, shown, tiles[0].volume.shape, width))
    return "".join(rows)


def _row(
    name: str, plane: Plane, drawn: list[str], places: list[int], shown: int, shape: tuple[int, ...], width: float
) -> str:
    """`width`: of the plane, a share of the volume's longest side."""
    slider = ""
    if plane.axis is not None and len(places) > 1:
        slider = (
            f'<label class="slider" hidden>slice <input type="range" min="0" max="{len(places) - 1}" value="{shown}" '
            f'data-places="{" ".join(str(place + 1) for place in places)}" data-size="{shape[plane.axis]}" '
            f'aria-label="{escape(f"{name}, {plane.name} slice")}"><output></output></label>'
        )
    columns = f"--tiles:{len(drawn)};--longest:{LONGEST_PX}px;--width:{width:.4g}"
    return (
        f'<div class="plane"><p>{escape(plane.name)}</p><div class="tiles" style="{columns}">{"".join(drawn)}</div>'
        f"{slider}</div>"
    )


def _tile(said: str, title: str, pixels: Volume, plane: Plane, places: list[int], shown: int, frame: Frame) -> str:
    cuts = [pixels] if plane.axis is None else [numpy.take(pixels, place, axis=plane.axis) for place in places]
    strip = numpy.concatenate([cut[::-1] for cut in cuts])  # upwards in the body is upwards in the picture
    height, width = cuts[0].shape[:2]
    proportions = f"{width * frame.spacing_mm[plane.horizontal]:g}/{height * frame.spacing_mm[plane.vertical]:g}"
    place = f", slice {places[shown] + 1}" if len(places) > 1 else ""
    image = page.image(_jpeg(strip), said + place, f"height:{100 * len(cuts)}%;top:{-100 * shown}%")
    marks = zip(
        ("left", "right", "low", "high"),
        (*frame.letters[plane.horizontal], *frame.letters[plane.vertical]),
        strict=True,
    )
    letters = "".join(f'<span class="letter {side}" aria-hidden="true">{letter}</span>' for side, letter in marks)
    return (
        f'<figure><div class="window" style="aspect-ratio:{proportions}">{image}{letters}</div>'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _pixels(tile: Tile, coloured: bool) -> Volume:
    """(*S) or (*S, 3) bytes."""
    low, high = tile.window or ((0.0, 1.0) if coloured else window_of(tile.volume))
    scaled = (numpy.nan_to_num(tile.volume.astype(numpy.float32)) - low) / max(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(numpy.uint8)


def _jpeg(pixels: Volume) -> page.Picture:
    from PIL import Image

    buffer = io.BytesIO()
    # Colours at full resolution: neighbouring voxels may be of different tissue.
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return page.Picture(buffer.getvalue(), "jpeg")
