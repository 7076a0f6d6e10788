"""Sums over all pairs, tile by tile: exponentials for rows and columns in one pass, softplus, and means over ranges.

A program keeps a block of fixed vectors and lets a range of the others pass by. The exponentials of the fixed side are
added up element by element and summed once at the end, those of the passing side are summed within a tile: in the
registers of a matrix product a row lies in four threads and a column in a whole block of them. Partial sums go to
memory, (groups, batch, padded), and `merge_kernel` adds them in one order: no atomics, the same result every time.
"""

import triton
import triton.language as tl

from .pairwise_vectors import SIZES

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# 2^-122 is a normal number of float32: a constant shift, in powers of two, may be half of that.
LARGEST_SHIFT: tl.constexpr = tl.constexpr(61.0)


@triton.jit
def products(first, second, first_ptr, second_ptr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Dot products of two blocks of vectors, the second transposed: wider ones chunk by chunk from memory."""
    if WIDTH == CHUNK:
        return tl.dot(first, second, input_precision=PRECISION)
    else:
        sums = tl.dot(first, second, input_precision=PRECISION)
        for start in range(CHUNK, WIDTH, CHUNK):
            sums = tl.dot(
                tl.load(first_ptr + start), tl.trans(tl.load(second_ptr + start)), sums, input_precision=PRECISION
            )
        return sums


@triton.jit
def crossing(begin, end, first, last, BLOCK: tl.constexpr):
    """The blocks of first .. last, which is whole blocks, that touch begin .. end."""
    cross_from = tl.minimum(tl.maximum(begin, first) // BLOCK * BLOCK, last)
    cross_to = tl.minimum(tl.cdiv(tl.maximum(end, 0), BLOCK) * BLOCK, last)
    return tl.maximum(cross_from, first), tl.maximum(cross_to, tl.maximum(cross_from, first))


@triton.jit
def softplus2(x):
    """log2(1 + 2^x)"""
    t = tl.exp2(-tl.abs(x))
    # Small ones by the series: 1 + t would round them away.
    series = t * (1.0 + t * (-0.5 + t * (0.33333334 + t * (-0.25 + t * (0.2 - t * 0.16666667)))))
    return tl.maximum(x, 0.0) + tl.where(t < 0.0625, series * LOG2E, tl.log2(1.0 + t))


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    fixed_ptr,  # (batch, fixed_padded, WIDTH)
    passing_ptr,  # (batch, passing_padded, WIDTH)
    fixed_remainder_ptr,  # (batch, fixed_padded) float32, where EXACT
    passing_remainder_ptr,  # (batch, passing_padded) float32, where EXACT
    scale_ptr,  # (1,) float32
    shift_ptr,  # (1,) float32, in powers of two: SHIFTED and ONLINE: the bound of all logits; SOFTPLUS: its shift
    fixed_sums_ptr,  # (passing_groups, batch, fixed_padded) float32
    fixed_maxima_ptr,  # the same, where ONLINE, not in powers of two: near their maximum those would round more
    passing_sums_ptr,  # (fixed_groups, batch, passing_padded) float32, where BOTH; zero before
    passing_maxima_ptr,  # the same, where ONLINE; -inf before
    batch,
    fixed_count,
    fixed_padded,
    passing_count,
    passing_padded,
    fixed_groups,
    passing_groups,
    diagonal,  # where EXCLUDE: vector n of the fixed does not see the passing n + diagonal
    FORM: tl.constexpr,  # "shifted", "online" or "softplus"
    EXCLUDE: tl.constexpr,
    BOTH: tl.constexpr,
    SAME: tl.constexpr,  # a set with itself: tiles above the diagonal stand for those below
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_FIXED: tl.constexpr,
    BLOCK_PASSING: tl.constexpr,
):
    shift = tl.load(shift_ptr)
    # Both forms of a log-sum-exp are launched, and one leaves: the host need not know the value.
    if FORM == "shifted" and not (shift <= LARGEST_SHIFT):
        return
    if FORM == "online" and shift <= LARGEST_SHIFT:
        return
    scale = tl.load(scale_ptr)
    if FORM != "online":
        scale *= LOG2E
    groups = fixed_groups * passing_groups
    problem = (tl.program_id(0) // groups).to(tl.int64)
    fixed_group = tl.program_id(0) % groups // passing_groups
    passing_group = tl.program_id(0) % passing_groups
    if SAME and passing_group < fixed_group:
        return
    fixed_blocks = tl.cdiv(fixed_count, BLOCK_FIXED)
    # Cut in whole fixed blocks on both sides where they must meet on the diagonal.
    UNIT: tl.constexpr = BLOCK_FIXED if SAME else BLOCK_PASSING
    passing_units = tl.cdiv(passing_count, UNIT)
    fixed_from = (fixed_blocks * fixed_group // fixed_groups) * BLOCK_FIXED
    fixed_to = (fixed_blocks * (fixed_group + 1) // fixed_groups) * BLOCK_FIXED
    passing_from = (passing_units * passing_group // passing_groups) * UNIT
    passing_to = tl.minimum((passing_units * (passing_group + 1) // passing_groups) * UNIT, passing_count)

    # Large numbers stay in scalars: a tile of 64-bit addresses would fill the registers.
    channel = tl.arange(0, CHUNK)[None, :]
    column = tl.arange(0, BLOCK_FIXED)
    row = tl.arange(0, BLOCK_PASSING)
    fixed_base = problem * fixed_padded
    passing_base = problem * passing_padded
    passing_partial = (fixed_group.to(tl.int64) * batch + problem) * passing_padded
    fixed_partial = (passing_group.to(tl.int64) * batch + problem) * fixed_padded
    for fixed_start in range(fixed_from, fixed_to, BLOCK_FIXED):
        own_ptr = fixed_ptr + (fixed_base + fixed_start) * WIDTH + (column[:, None] * WIDTH + channel)
        # Transposed here and not where it is used: so it stays in shared memory, not in registers.
        fixed = tl.trans(tl.load(own_ptr))
        factor = tl.full((BLOCK_FIXED,), 1.0, dtype=tl.float32) * scale
        if EXACT:
            factor *= tl.load(fixed_remainder_ptr + fixed_base + fixed_start + column)
        if FORM == "online":
            maxima = tl.full((BLOCK_FIXED,), float("-inf"), dtype=tl.float32)
            sums = tl.zeros((BLOCK_FIXED,), dtype=tl.float32)
        else:
            gathered = tl.zeros((BLOCK_PASSING, BLOCK_FIXED), dtype=tl.float32)
        first = tl.maximum(passing_from, fixed_start) if SAME else passing_from
        whole = tl.minimum(passing_count // BLOCK_PASSING * BLOCK_PASSING, passing_to)
        whole = first if fixed_start + BLOCK_FIXED > fixed_count else tl.maximum(whole, first)
        cross_from, cross_to = whole, whole
        if EXCLUDE:
            met = fixed_start + diagonal
            cross_from, cross_to = crossing(met, met + BLOCK_FIXED, first, whole, BLOCK_PASSING)
        for part in tl.static_range(4):
            # Whole tiles, those with excluded pairs, whole tiles, those at the ragged end: a loop for each, because
            # the masks of one loop for all would fill the registers.
            begin = first if part == 0 else cross_from if part == 1 else cross_to if part == 2 else whole
            end = cross_from if part == 0 else cross_to if part == 1 else whole if part == 2 else passing_to
            for start in range(begin, end, BLOCK_PASSING):
                other_ptr = passing_ptr + (passing_base + start) * WIDTH + (row[:, None] * WIDTH + channel)
                logits = products(tl.load(other_ptr), fixed, other_ptr, own_ptr, CHUNK, WIDTH, PRECISION)
                if EXACT:
                    logits *= tl.load(passing_remainder_ptr + passing_base + start + row)[:, None]
                logits *= factor[None, :]
                if FORM != "online":
                    logits -= shift
                if part % 2 == 1:
                    seen = (start + row < passing_count)[:, None] & (fixed_start + column < fixed_count)[None, :]
                    if EXCLUDE:
                        seen = seen & ((start + row)[:, None] != (fixed_start + column + diagonal)[None, :])
                    logits = tl.where(seen, logits, float("-inf"))
                if FORM == "online":
                    largest = tl.maximum(maxima, tl.max(logits, axis=0))
                    usable = tl.where(largest == float("-inf"), 0.0, largest)
                    found = tl.sum(tl.exp2((logits - usable[None, :]) * LOG2E), axis=0)
                    sums = sums * tl.exp2((maxima - usable) * LOG2E) + found
                    maxima = largest
                    if BOTH and (not SAME or start >= fixed_start + BLOCK_FIXED):
                        maxima_ptr = passing_maxima_ptr + passing_partial + start + row
                        target_ptr = passing_sums_ptr + passing_partial + start + row
                        before, sum_before = tl.load(maxima_ptr), tl.load(target_ptr)
                        highest = tl.maximum(before, tl.max(logits, axis=1))
                        usable_row = tl.where(highest == float("-inf"), 0.0, highest)
                        found_row = tl.sum(tl.exp2((logits - usable_row[:, None]) * LOG2E), axis=1)
                        tl.store(target_ptr, sum_before * tl.exp2((before - usable_row) * LOG2E) + found_row)
                        tl.store(maxima_ptr, highest)
                else:
                    values = softplus2(logits) if FORM == "softplus" else tl.exp2(logits)
                    gathered += values
                    if BOTH and (not SAME or start >= fixed_start + BLOCK_FIXED):
                        target_ptr = passing_sums_ptr + passing_partial + start + row
                        tl.store(target_ptr, tl.load(target_ptr) + tl.sum(values, axis=1))
        if FORM == "online":
            tl.store(fixed_sums_ptr + fixed_partial + fixed_start + column, sums)
            tl.store(fixed_maxima_ptr + fixed_partial + fixed_start + column, maxima)
        else:
            tl.store(fixed_sums_ptr + fixed_partial + fixed_start + column, tl.sum(gathered, axis=0))
        if BOTH:
            # What one thread has added to a row another may read in the next round.
            tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    sums_ptr,  # (groups, batch, padded) float32
    maxima_ptr,  # the same
    shift_ptr,  # (1,) float32, in powers of two
    lse_ptr,  # (batch, count) float64
    groups,
    batch,
    count,
    padded,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    shift = tl.load(shift_ptr)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    stride = tl.cast(batch, tl.int64) * padded
    place = problem * padded + row
    highest = tl.zeros((BLOCK,), dtype=tl.float64) + shift.to(tl.float64) / LOG2E
    if shift <= LARGEST_SHIFT:
        for group in range(groups):
            total += tl.load(sums_ptr + group * stride + place, mask=inside, other=1.0).to(tl.float64)
    else:
        highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float64)
        for group in range(groups):
            found = tl.load(maxima_ptr + group * stride + place, mask=inside, other=0.0).to(tl.float64)
            highest = tl.maximum(highest, found)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        for group in range(groups):
            found = tl.load(maxima_ptr + group * stride + place, mask=inside, other=0.0).to(tl.float64)
            part = tl.load(sums_ptr + group * stride + place, mask=inside, other=1.0).to(tl.float64)
            total += part * tl.exp(found - highest)
    tl.store(lse_ptr + problem * count + row, highest + tl.log(total), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def range_means_kernel(
    vectors_ptr,  # (batch, padded, WIDTH)
    remainder_ptr,  # (batch, padded) float32, where EXACT
    scale_ptr,  # (1,) float32
    first_ptr,  # (orders, count) int64, not falling
    last_ptr,  # (orders, count) int64, not falling
    mean_ptr,  # (batch, count) float64: of scale <x_i, x_j> over j = first[i] .. last[i] - 1 without i; 0 of none
    count,
    padded,
    orders,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK_OWN)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    own_start = tl.program_id(0) % blocks * BLOCK_OWN
    row = own_start + tl.arange(0, BLOCK_OWN)
    column = tl.arange(0, BLOCK_OTHER)
    channel = tl.arange(0, CHUNK)[None, :]
    ranges = problem % orders * count
    first = tl.load(first_ptr + ranges + row, mask=row < count, other=0)
    last = tl.load(last_ptr + ranges + row, mask=row < count, other=0)
    base = problem * padded
    own_ptr = vectors_ptr + (base + own_start) * WIDTH + (tl.arange(0, BLOCK_OWN)[:, None] * WIDTH + channel)
    own = tl.load(own_ptr)
    total = tl.zeros((BLOCK_OWN,), dtype=tl.float64)
    # Sorted positions: the ranges of a block span from the first of its first vector to the last of its last.
    begin = (tl.load(first_ptr + ranges + own_start) // BLOCK_OTHER * BLOCK_OTHER).to(tl.int32)
    end = tl.load(last_ptr + ranges + tl.minimum(own_start + BLOCK_OWN, count) - 1).to(tl.int32)
    for start in range(begin, end, BLOCK_OTHER):
        other = start + column
        other_ptr = vectors_ptr + (base + start) * WIDTH + (column[:, None] * WIDTH + channel)
        similarity = products(own, tl.trans(tl.load(other_ptr)), own_ptr, other_ptr, CHUNK, WIDTH, PRECISION)
        if EXACT:
            similarity *= tl.load(remainder_ptr + base + other)[None, :]
        near = (other[None, :] >= first[:, None]) & (other[None, :] < last[:, None]) & (other[None, :] != row[:, None])
        total += tl.sum(tl.where(near, similarity, 0.0), axis=1).to(tl.float64)
    if EXACT:
        total *= tl.load(remainder_ptr + base + row).to(tl.float64)
    total = total * tl.load(scale_ptr).to(tl.float64)
    number = tl.maximum(last - first - 1, 1)
    tl.store(mean_ptr + problem * count + row, total / number.to(tl.float64), mask=row < count)
