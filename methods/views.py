"""What a method asks of the data plane: views, their geometry and their appearance, declared and not hidden.

A view is one image of the region that a slot of the batch was dealt. All ranges are uniform unless stated, drawn
anew for each view. Lengths are in voxels of the crop, amplitudes are fractions of the volume's own intensity range
(0.5 to 99.5 percentile), so that one recipe serves CT and MR.
"""

from dataclasses import dataclass, field


@dataclass
class AffineRanges:
    """A random affine field about the crop's centre: rotate, then scale, then shear, then translate (COVER's order)."""

    rotation_degrees: float = 20.0  # each rotation axis: U(-r, r)
    # each axis, log-uniform between the two; above 1 the view shows more of the volume, smaller
    scale: list[float] = field(default_factory=lambda: [0.8, 1.25])
    shear_degrees: float = 0.0  # each pair of axes: U(-s, s)
    translation_voxels: float = 4.0  # each axis: U(-t, t)


@dataclass
class AppearanceRanges:
    """Changes of intensity that leave the geometry alone, made in the order in which they stand here (COVER's).

    A range of nothing (noise 0 to 0, contrast 1 to 1, no boxes) costs nothing.
    """

    noise_std: list[float] = field(default_factory=lambda: [0.0, 0.02])  # Gaussian, fraction of the intensity range
    blur_sigma_voxels: list[float] = field(default_factory=lambda: [0.0, 0.5])
    contrast: list[float] = field(default_factory=lambda: [0.5, 1.5])  # factor about the mean of the crop
    brightness_std: float = 0.1  # additive, N(0, s), fraction of the intensity range
    boxes: int = 10  # most boxes filled with uniform noise over the intensity range; they may overlap
    box_continue: float = 0.95  # probability of drawing one box more
    box_side: list[float] = field(default_factory=lambda: [0.1, 0.13])  # fraction of the crop's side, each axis


@dataclass
class View:
    """One view of a slot's region. Without `affine` the geometry is the crop's, without `appearance` the intensity is.

    `displacement` also asks for the field psi in voxels, with view(p) = crop(p + psi(p)), and for the mask of the p
    whose p + psi(p) lies inside the crop and inside the volume.
    """

    affine: AffineRanges | None = None
    appearance: AppearanceRanges | None = None
    displacement: bool = False


@dataclass
class ViewSpec:
    """All views of a slot; the batch holds one tensor (B, 1, *crop) under each view's name."""

    crop: tuple[int, ...]  # (D, H, W); (H, W) takes slices across the first axis of the volume
    views: dict[str, View]
