"""What a method asks of the data plane: views, their geometry and their appearance, declared and not hidden.

A view is one image of the region that a slot of the batch was dealt. All ranges are uniform unless stated, drawn
anew for each view. Lengths are in voxels of the view or fractions of its side, amplitudes are fractions of the
volume's own intensity range (0.5 to 99.5 percentile), so that one recipe serves CT and MR. Axes are (D, H, W); a 2-D
crop (H, W) takes a slice across the first axis, and its views have those two axes alone.

An index p of a view leads to the volume in this order: quarter turns, flips, affine (about the centre of the view),
box (voxel cells aligned: p -> lower + (p + 0.5) * side / size - 0.5), deformation.
"""

from dataclasses import dataclass, field


@dataclass
class BoxRanges:
    """A box of voxels of the volume, by itself or in relation to the box of another view.

    Its sides are one of `sides`, all equally probable, or take up a share `scale` of the volume (of the slice; of
    the box that it lies `inside`): with `aspect`, in 2-D, H / W is log-uniform as far as the sides fit, as in a random
    resized crop; without, the sides are in proportion to those of the whole. Its place is uniform over the whole volume
    or, with one of the relations, over all places that fulfil it.
    """

    sides: list[list[int]] = field(default_factory=list)  # voxels; one of them is taken
    scale: list[float] | None = None  # share of the whole
    aspect: list[float] | None = None  # H / W, in 2-D
    iou_with: str | None = None  # intersection over union with the box of that view, within `iou`
    iou: list[float] = field(default_factory=lambda: [0.0, 1.0])  # the range of `iou_with`
    near: list[str] = field(
        default_factory=list
    )  # its first voxel lies at most margin_voxels outside the bounding box of those
    margin_voxels: int = 0  # of `near`
    inside: str | None = None  # wholly inside the box of that view


@dataclass
class AffineRanges:
    """A random affine field about the view's centre: rotate, then scale, then shear, then translate (COVER's order)."""

    rotation_degrees: float = 20.0  # each rotation axis: U(-r, r)
    # each axis, log-uniform between the two; above 1 the view shows more of the volume, smaller
    scale: list[float] = field(default_factory=lambda: [0.8, 1.25])
    shear_degrees: float = 0.0  # each pair of axes: U(-s, s)
    translation_voxels: float = 4.0  # each axis: U(-t, t)
    probability: float = 1.0


@dataclass
class ElasticRanges:
    """A smooth deformation: a uniform cubic B-spline whose control points move by U(-m, m) along each axis.

    No voxel moves further than m; the root mean square is 0.29 m in 2-D and 0.20 m in 3-D. Up to m = spacing / 2.48
    (2.05 in 2-D) the field cannot fold (Choi and Lee, 2000); more is refused.
    """

    spacing_voxels: float = 16.0  # between control points
    magnitude_voxels: list[float] = field(default_factory=lambda: [0.0, 4.0])  # m
    probability: float = 1.0


@dataclass
class Noise:
    std: list[float] = field(default_factory=lambda: [0.0, 0.02])  # Gaussian
    probability: float = 1.0


@dataclass
class Blur:
    sigma_voxels: list[float] = field(default_factory=lambda: [0.0, 0.5])  # Gaussian
    probability: float = 1.0


@dataclass
class Contrast:
    factor: list[float] = field(default_factory=lambda: [0.5, 1.5])  # about the mean of the view
    probability: float = 1.0


@dataclass
class Brightness:
    """Adds N(0, std) + U(shift)."""

    std: float = 0.1  # of what is added to the whole view
    shift: list[float] = field(default_factory=lambda: [0.0, 0.0])  # added besides
    probability: float = 1.0


@dataclass
class Gamma:
    """Between the least and the greatest value of the view; inverted: on the values counted from the greatest down."""

    exponent: list[float] = field(default_factory=lambda: [0.7, 1.5])  # log-uniform
    invert: float = 0.0  # probability
    probability: float = 1.0


@dataclass
class BiasField:
    """Multiplies with the exponential of a polynomial of degree 3 whose coefficients are U(-c, c)."""

    coefficient: float = 0.3  # c
    probability: float = 1.0


@dataclass
class LowResolution:
    factor: list[float] = field(
        default_factory=lambda: [1.0, 2.0]
    )  # of a coarser grid that the view is taken to and back from
    probability: float = 1.0


@dataclass
class Bezier:
    """A monotone map of the view's values: a cubic Bezier curve from (0, 0) to (1, 1) with two uniform points between.

    Inverted, the least value becomes the greatest and the other way round (Models Genesis).
    """

    invert: float = 0.5  # probability
    probability: float = 1.0


@dataclass
class Boxes:
    """Boxes in a view; they may overlap. Each side is uniform, each place equally probable."""

    count: int = 10  # at most
    least: int = 0  # that are always drawn
    go_on: float = 0.95  # probability of drawing one more
    side: list[float] = field(default_factory=lambda: [0.1, 0.13])  # fraction of the view's side, each axis
    side_voxels: list[list[int]] = field(default_factory=list)  # or: [least, most] of each axis
    probability: float = 1.0


@dataclass
class PixelShuffle(Boxes):
    """The voxels of each box change places."""

    count: int = 10000
    go_on: float = 1.0
    side: list[float] = field(default_factory=lambda: [0.0, 0.1])


@dataclass
class PatchSwap(Boxes):
    """Pairs of boxes of equal size that do not overlap change places. A pair without room (eight tries) is left out."""

    go_on: float = 1.0


@dataclass
class InPaint(Boxes):
    """Boxes filled with uniform noise over the intensity range."""


@dataclass
class OutPaint(Boxes):
    """Everything but the boxes filled with uniform noise over the intensity range."""

    count: int = 5
    side: list[float] = field(default_factory=lambda: [3 / 7, 4 / 7])


@dataclass
class CutOut(Boxes):
    """Boxes filled with one value."""

    value: float = 0.0  # 0 for the low end of the intensity range, 1 for its high end


@dataclass
class CutOutOutside(Boxes):
    """Everything but the boxes filled with one value."""

    side: list[float] = field(default_factory=lambda: [0.69, 0.78])
    value: float = 0.0  # likewise


@dataclass
class AppearanceRanges:
    """Changes of intensity that leave the geometry alone: the steps that `order` names, in that order.

    An entry "a|b|c" makes one of them at most: a with its probability, b with its own, none with what is left.
    With `same_choice` the views of a slot share what was chosen for the entries that they have in common; each view's
    amplitudes and boxes are its own. A step whose range is nothing (noise 0 to 0, factor 1 to 1) costs nothing.
    """

    order: list[str] = field(default_factory=list)  # names of the steps; those that are not named are not made
    # MODULE:NAME of functions of the user's own, after all steps; see engine/data/user_functions.py
    functions: list[str] = field(default_factory=list)
    same_choice: bool = False  # of an entry a|b|c, in all views of a slot
    noise: Noise = field(default_factory=Noise)
    blur: Blur = field(default_factory=Blur)
    contrast: Contrast = field(default_factory=Contrast)
    brightness: Brightness = field(default_factory=Brightness)
    gamma: Gamma = field(default_factory=Gamma)
    bias_field: BiasField = field(default_factory=BiasField)
    low_resolution: LowResolution = field(default_factory=LowResolution)
    bezier: Bezier = field(default_factory=Bezier)
    pixel_shuffle: PixelShuffle = field(default_factory=PixelShuffle)
    patch_swap: PatchSwap = field(default_factory=PatchSwap)
    in_paint: InPaint = field(default_factory=InPaint)
    out_paint: OutPaint = field(default_factory=OutPaint)
    cut_out: CutOut = field(default_factory=CutOut)
    cut_out_outside: CutOutOutside = field(default_factory=CutOutOutside)


@dataclass
class View:
    """One view of a slot. By default the slot's crop as it is.

    `displacement` also asks for the field psi in voxels, with view(p) = other(p + psi(p)), and for the mask of the p
    whose p + psi(p) lies inside that other view and inside the volume. The other view is `displacement_to`, or the
    slot's crop as it is.
    """

    size: list[int] | None = None  # voxels; the crop's by default
    box: BoxRanges | None = None  # what is resized to `size`; the crop by default
    affine: AffineRanges | None = None  # none by default
    elastic: ElasticRanges | None = None  # none by default
    flips: list[float] = field(default_factory=list)  # probability for each axis
    quarter_turns: bool = False  # 0 to 3 of them in the plane of the last two axes, equally probable
    appearance: AppearanceRanges | None = None  # none by default
    clean: bool = False  # also the same geometry without appearance, as NAME_clean
    displacement: bool = False  # also the field and its mask, as "displacement" and "mask"
    displacement_to: str | None = None  # name of the other view


@dataclass
class ViewSpec:
    """All views of a slot; the batch holds one tensor (B, 1, *size) under each view's name.

    The slot's crop is placed uniformly in the volume, or centred where the volume is the smaller one. Views without a
    box show it. Every view of a slot has the same slice if the crop is 2-D.
    """

    crop: tuple[int, ...]  # (D, H, W); (H, W) takes slices across the first axis of the volume
    views: dict[str, View]
