"""A plain copy on the device, as the measure of its memory bandwidth.

A kernel that is bound by memory cannot be faster than this for the bytes that it moves; benchmarks give that share.
"""

import torch
from torch import Tensor

from . import _native
from ._registration import LIBRARY


def stream_copy(source: Tensor) -> Tensor:
    """A contiguous copy of `source`, of any type and shape, by our own kernel on CUDA and by torch elsewhere.

    It reads and writes every byte once. The copy has no gradient.
    """
    if source.is_cuda:
        _native.load_cuda()
    return torch.ops.voxtrast.stream_copy(source.detach())


def stream_copy_reference(source: Tensor) -> Tensor:
    """The same in plain torch."""
    return source.detach().clone(memory_format=torch.contiguous_format)


LIBRARY.define("stream_copy(Tensor source) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("stream_copy", stream_copy_reference, "CompositeExplicitAutograd")
torch.library.register_fake("voxtrast::stream_copy", lambda source: source.new_empty(source.shape), lib=LIBRARY)
