"""That a row makes views."""

from typing import Any

import torch

from .recipe import VIEWS


def check_views(batch: dict[str, Any], size: int, *, field: bool) -> int:
    """The number of views in a batch. Raises: ValueError saying what is not as it should be."""
    seen: list[torch.Tensor] = []
    for name in VIEWS:
        views = batch[name]
        if views.shape[1:] != (1, size, size, size) or views.dtype != torch.float32:
            raise ValueError(f"{name} is {views.dtype} {tuple(views.shape)}, expected float32 views of {size}^3")
        for view in views:
            low, high = (float(found) for found in view.aminmax())
            if not low < high:
                raise ValueError(f"a view of {name} is constant or not finite ({low} to {high})")
            if not bool(view.isfinite().all()):
                raise ValueError(f"a view of {name} is not finite")
            if any(torch.equal(view, other) for other in seen):
                raise ValueError(f"two views of {name} are one")
            seen.append(view)
    if field:
        _check_field(batch, size)
    return len(seen)


def _check_field(batch: dict[str, Any], size: int) -> None:
    displacement, mask = batch["displacement"], batch["mask"]
    if displacement.shape[1:] != (3, size, size, size) or mask.shape[1:] != (1, size, size, size):
        raise ValueError(f"field {tuple(displacement.shape)} and mask {tuple(mask.shape)} are not of the views' size")
    if not bool(displacement.isfinite().all()) or not 0 < float(mask.mean()) < 1:
        raise ValueError("the field is not finite, or the mask is of one value")
