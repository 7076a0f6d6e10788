"""Fused, differentiable operators for volumetric images. Needs torch and nothing else.

Every operator stands in the file of its name, with its formula, its torch reference and its registration.
"""

from . import _native, stream_copy, triton  # noqa: F401 (stream_copy registers its schema)
from .bank_info_nce import bank_info_nce, bank_info_nce_reference
from .bank_nce import bank_nce, bank_nce_reference
from .compose_displacement import compose_displacement, compose_displacement_reference
from .info_nce import info_nce, info_nce_reference
from .local_correlation import local_correlation, local_correlation_reference
from .pairwise_logsumexp import pairwise_logsumexp, pairwise_logsumexp_reference
from .positional_info_nce import positional_info_nce, positional_info_nce_reference
from .vector_pyramid import pyramid_reach, vector_pyramid, vector_pyramid_reference
from .vector_regression_loss import vector_regression_loss, vector_regression_loss_reference
from .warp import warp, warp_reference
from .warped_cosine_loss import warped_cosine_loss, warped_cosine_loss_reference

# Last: these implement operators whose schemas the imports above have registered.
_native.load_cpu()
triton.register()

__all__ = [
    "bank_info_nce",
    "bank_info_nce_reference",
    "bank_nce",
    "bank_nce_reference",
    "compose_displacement",
    "compose_displacement_reference",
    "info_nce",
    "info_nce_reference",
    "local_correlation",
    "local_correlation_reference",
    "pairwise_logsumexp",
    "pairwise_logsumexp_reference",
    "positional_info_nce",
    "positional_info_nce_reference",
    "pyramid_reach",
    "vector_pyramid",
    "vector_pyramid_reference",
    "vector_regression_loss",
    "vector_regression_loss_reference",
    "warp",
    "warp_reference",
    "warped_cosine_loss",
    "warped_cosine_loss_reference",
]
