"""Gradients of sums over all pairs: for each vector of one set, sum_j G_ij y_j over the vectors of the other.

    G_ij = p_ij (a_i + b_j) - (what the positives are to lose)

p_ij comes anew from the vectors and the saved log-sum-exps. The positives are subtracted before G is rounded for the
matrix product: near the minimum G is a small difference of large numbers. Run once for each of the two sets, nothing is
written twice: no atomics, the same result every time.
"""

import triton
import triton.language as tl

from .pairwise_sums import LARGEST_SHIFT, LOG2E, crossing, products
from .pairwise_vectors import SIZES


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    own_ptr,  # (batch, own_padded, WIDTH)
    other_ptr,  # (batch, other_padded, WIDTH)
    own_remainder_ptr,  # (batch, own_padded) float32, where EXACT
    other_remainder_ptr,  # (batch, other_padded) float32, where EXACT
    scale_ptr,  # (1,) float32
    shift_ptr,  # (1,) float32, in powers of two, as in sums_kernel
    own_level_ptr,  # (batch, own_count) float32, where ONLINE: the log-sum-exps
    own_weight_ptr,  # (batch, own_count) float32: a 2^LIFT, but a / exp(log-sum-exp - shift) where SHIFTED
    other_level_ptr,  # (batch, other_count) float32, the same of the others
    other_weight_ptr,  # (batch, other_count) float32: b, likewise, and times the remainder where EXACT
    own_positive_ptr,  # (batch, own_count) float32, unless POSITIVES is "none"
    other_positive_ptr,  # (batch, other_count) float32, where POSITIVES is "ranges"
    first_ptr,  # (orders, own_count) int64, where POSITIVES is "ranges"
    last_ptr,  # (orders, own_count) int64, where POSITIVES is "ranges"
    partial_ptr,  # (splits, batch, own_padded, WIDTH) float32
    batch,
    own_count,
    own_padded,
    other_count,
    other_padded,
    splits,
    orders,
    diagonal,  # own vector n pairs with the other n + diagonal
    LIFT: tl.constexpr,  # gradients are multiplied by 2^LIFT
    FORM: tl.constexpr,  # "shifted", "online" or "softplus", as in sums_kernel
    EXCLUDE: tl.constexpr,  # the pairs on the diagonal are in no sum
    POSITIVES: tl.constexpr,  # "none", "diagonal" or "ranges"
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    shift = tl.load(shift_ptr)
    if FORM == "shifted" and not (shift <= LARGEST_SHIFT):
        return
    if FORM == "online" and shift <= LARGEST_SHIFT:
        return
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    program = tl.program_id(0)
    chunk = program % CHUNKS
    split = program // CHUNKS % splits
    blocks = tl.cdiv(own_count, BLOCK_OWN)
    own_start = program // CHUNKS // splits % blocks * BLOCK_OWN
    problem = (program // CHUNKS // splits // blocks).to(tl.int64)

    # Large numbers stay in scalars: a tile of 64-bit addresses would fill the registers.
    channel = tl.arange(0, CHUNK)[None, :]
    row = own_start + tl.arange(0, BLOCK_OWN)
    column = tl.arange(0, BLOCK_OTHER)
    inside = row < own_count
    own_base = problem * own_padded + own_start
    own_tile = tl.arange(0, BLOCK_OWN)[:, None] * WIDTH + channel
    own_chunk_ptr = own_ptr + own_base * WIDTH + own_tile
    own = tl.load(own_chunk_ptr)
    factor = tl.full((BLOCK_OWN,), 1.0, dtype=tl.float32) * tl.load(scale_ptr)
    if FORM != "online":
        factor *= LOG2E
    if EXACT:
        factor *= tl.load(own_remainder_ptr + own_base + tl.arange(0, BLOCK_OWN))
    own_place = problem * own_count + row
    weight = tl.load(own_weight_ptr + own_place, mask=inside, other=0.0)
    if FORM == "online":
        level = tl.load(own_level_ptr + own_place, mask=inside, other=0.0)
    if POSITIVES != "none":
        own_positive = tl.load(own_positive_ptr + own_place, mask=inside, other=0.0)
    if POSITIVES == "ranges":
        ranges = problem % orders * own_count
        first = tl.load(first_ptr + ranges + row, mask=inside, other=0)
        last = tl.load(last_ptr + ranges + row, mask=inside, other=0)
        # Sorted positions: the ranges of a block span from the first of its first vector to the last of its last.
        nearest = tl.load(first_ptr + ranges + own_start).to(tl.int32)
        farthest = tl.load(last_ptr + ranges + tl.minimum(own_start + BLOCK_OWN, own_count) - 1).to(tl.int32)
    summed = tl.zeros((BLOCK_OWN, CHUNK), dtype=tl.float32)
    other_blocks = tl.cdiv(other_count, BLOCK_OTHER)
    begin = (other_blocks * split // splits) * BLOCK_OTHER
    end = tl.minimum((other_blocks * (split + 1) // splits) * BLOCK_OTHER, other_count)
    whole = tl.maximum(tl.minimum(other_count // BLOCK_OTHER * BLOCK_OTHER, end), begin)
    cross_from, cross_to = whole, whole
    if POSITIVES == "ranges":
        cross_from, cross_to = crossing(nearest, farthest, begin, whole, BLOCK_OTHER)
    elif EXCLUDE or POSITIVES == "diagonal":
        met = own_start + diagonal
        cross_from, cross_to = crossing(met, met + BLOCK_OWN, begin, whole, BLOCK_OTHER)
    for part in tl.static_range(4):
        # As in sums_kernel: positives and excluded pairs are looked for where they can be.
        part_from = begin if part == 0 else cross_from if part == 1 else cross_to if part == 2 else whole
        part_to = cross_from if part == 0 else cross_to if part == 1 else whole if part == 2 else end
        for start in range(part_from, part_to, BLOCK_OTHER):
            other_base = problem * other_padded + start
            other_chunk_ptr = other_ptr + other_base * WIDTH + (column[:, None] * WIDTH + channel)
            other = tl.load(other_chunk_ptr)
            logits = products(own, tl.trans(other), own_chunk_ptr, other_chunk_ptr, CHUNK, WIDTH, PRECISION)
            if EXACT:
                other_remainder = tl.load(other_remainder_ptr + other_base + column)
                logits *= other_remainder[None, :]
            logits *= factor[:, None]
            if FORM == "shifted":
                logits -= shift - LIFT
            if part % 2 == 1:
                seen = (start + column < other_count)[None, :]
                if EXCLUDE:
                    seen = seen & ((start + column)[None, :] != (row + diagonal)[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            other_place = problem * other_count + start
            real = start + column < other_count
            other_weight = tl.load(other_weight_ptr + other_place + column, mask=real, other=0.0)
            own_weight = weight[:, None]
            if EXACT:
                own_weight = own_weight * other_remainder[None, :]
            if FORM == "online":
                other_level = tl.load(other_level_ptr + other_place + column, mask=real, other=0.0)
                gradient = tl.exp2((logits - level[:, None]) * LOG2E) * own_weight
                gradient += tl.exp2((logits - other_level[None, :]) * LOG2E) * other_weight[None, :]
            else:
                gradient = own_weight + other_weight[None, :]
                gradient *= tl.exp2(logits) if FORM == "shifted" else 1.0 / (1.0 + tl.exp2(shift - logits))
            if part % 2 == 1 and POSITIVES == "diagonal":
                taken = tl.where((start + column)[None, :] == (row + diagonal)[:, None], own_positive[:, None], 0.0)
                gradient -= taken * other_remainder[None, :] if EXACT else taken
            if part % 2 == 1 and POSITIVES == "ranges":
                at = (start + column)[None, :]
                near = (at >= first[:, None]) & (at < last[:, None]) & (at != row[:, None])
                of_others = tl.load(other_positive_ptr + other_place + column, mask=real, other=0.0)
                taken = tl.where(near, own_positive[:, None] + of_others[None, :], 0.0)
                gradient -= taken * other_remainder[None, :] if EXACT else taken
            summand = other if CHUNKS == 1 else tl.load(other_chunk_ptr + chunk * CHUNK)
            summed = tl.dot(gradient.to(summand.dtype), summand, summed, input_precision=PRECISION)
    target = (tl.cast(split, tl.int64) * batch + problem) * own_padded + own_start
    tl.store(partial_ptr + target * WIDTH + chunk * CHUNK + own_tile, summed)
