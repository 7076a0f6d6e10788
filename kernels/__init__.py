"""Fused, differentiable operators for volumetric images. Needs torch and nothing else.

Every operator stands in the file of its name, with its formula, its torch reference and its registration.
"""

from . import _native, stream_copy  # noqa: F401 (stream_copy registers its schema)
from .compose_displacement import compose_displacement, compose_displacement_reference
from .local_correlation import local_correlation, local_correlation_reference
from .vector_regression_loss import vector_regression_loss, vector_regression_loss_reference
from .warp import warp, warp_reference
from .warped_cosine_loss import warped_cosine_loss, warped_cosine_loss_reference

# Last: the compiled library implements operators whose schemas the imports above have registered.
_native.load_cpu()

__all__ = [
    "compose_displacement",
    "compose_displacement_reference",
    "local_correlation",
    "local_correlation_reference",
    "vector_regression_loss",
    "vector_regression_loss_reference",
    "warp",
    "warp_reference",
    "warped_cosine_loss",
    "warped_cosine_loss_reference",
]
