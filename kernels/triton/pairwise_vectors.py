"""The vectors of a batch of problems on their way in and out of the tiles.

On their way in they are ordered, padded with zeros to whole blocks and made unit length. In bfloat16 and float16 that
would round them once more; there each is multiplied by a power of two, which is exact and leaves a length between 1/2
and 1, and the rest of the factor (`remainder`) is applied to the similarities in float32.
"""

import triton
import triton.language as tl

# Another number of vectors must not mean another compilation of seconds.
SIZES = [
    *("batch", "count", "padded", "channels", "orders", "splits", "groups", "rows", "columns", "offset", "diagonal"),
    *(f"{side}_{size}" for side in ("fixed", "passing", "own", "other") for size in ("count", "padded", "groups")),
]
MINIMUM_SQUARE: tl.constexpr = tl.constexpr(1e-12)  # of MINIMUM_NORM in kernels/pairwise_logsumexp.py


@triton.jit
def inverse_length(values):
    """1 / length of the rows (ROWS, SPAN): 0 for vectors too short to have a direction, NaN for infinite ones."""
    square = tl.sum(values * values, axis=1)
    short = square < MINIMUM_SQUARE
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.where(short, 1.0, square)))
    inverse = tl.where(square == float("inf"), float("nan"), inverse)
    return tl.where(short, 0.0, inverse)


@triton.jit(do_not_specialize=SIZES)
def pack_kernel(
    given_ptr,  # (batch, count, channels)
    order_ptr,  # (orders, count) int64, where ORDERED: row n is the vector order[n]
    packed_ptr,  # (batch, padded, WIDTH)
    length_ptr,  # (batch, padded) float32, unless NORMALIZE
    remainder_ptr,  # (batch, padded) float32, where EXACT
    count,
    padded,
    channels,
    orders,
    ORDERED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # the next power of two
    ROWS: tl.constexpr,
):
    blocks = padded // ROWS
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, SPAN)
    inside = row < count
    source = row.to(tl.int64)
    if ORDERED:
        source = tl.load(order_ptr + problem % orders * count + row, mask=inside, other=0)
    given = given_ptr + ((problem * count + source) * channels)[:, None] + channel[None, :]
    values = tl.load(given, mask=inside[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
    target = problem * padded + row
    if NORMALIZE:
        inverse = inverse_length(values)
        if EXACT:
            # The exponent bits of 1 / length are a power of two between half of it and itself.
            power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            power = tl.where(inverse == inverse, power, inverse)
            tl.store(remainder_ptr + target, tl.where(inverse == 0.0, 0.0, tl.div_rn(inverse, power)))
            values = values * power[:, None]
        else:
            values = values * inverse[:, None]
    else:
        tl.store(length_ptr + target, tl.sqrt_rn(tl.sum(values * values, axis=1)))
    packed = packed_ptr + (target * WIDTH)[:, None] + channel[None, :]
    tl.store(packed, values.to(packed_ptr.dtype.element_ty), mask=(channel < WIDTH)[None, :])


@triton.jit(do_not_specialize=SIZES)
def unpack_kernel(
    partial_ptr,  # (splits, batch, padded, WIDTH) float32: sum_j G_ij y_j
    given_ptr,  # (batch, count, channels): the vectors x_i
    order_ptr,  # (orders, count) int64, where ORDERED
    factor_ptr,  # (1,) float32: of the gradient
    gradient_ptr,  # (batch, count, channels)
    along_ptr,  # (batch, count) float32: <x_i, sum_j G_ij y_j>, of which the gradient of the scale is made
    splits,
    batch,
    count,
    padded,
    channels,
    orders,
    ORDERED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(count, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, SPAN)
    inside = row < count
    target = row.to(tl.int64)
    if ORDERED:
        target = tl.load(order_ptr + problem % orders * count + row, mask=inside, other=0)
    place = ((problem * count + target) * channels)[:, None] + channel[None, :]
    used = inside[:, None] & (channel < channels)[None, :]
    values = tl.load(given_ptr + place, mask=used, other=0.0).to(tl.float32)
    source = ((problem * padded + row) * WIDTH)[:, None] + channel[None, :]
    summed = tl.zeros((ROWS, SPAN), dtype=tl.float32)
    for split in range(splits):
        summed += tl.load(
            partial_ptr + tl.cast(split, tl.int64) * batch * padded * WIDTH + source, mask=used, other=0.0
        )
    inverse = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if NORMALIZE:
        inverse = inverse_length(values)
        values = values * inverse[:, None]
    along = tl.sum(values * summed, axis=1)
    tl.store(along_ptr + problem * count + row, along, mask=inside)
    if NORMALIZE:
        # Along its own direction a vector of unit length cannot move.
        summed = (summed - along[:, None] * values) * inverse[:, None]
    gradient = summed * tl.load(factor_ptr)
    tl.store(gradient_ptr + place, gradient.to(gradient_ptr.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=SIZES)
def paired_kernel(
    query_ptr,  # (batch, rows, channels)
    key_ptr,  # (batch, columns, channels)
    scale_ptr,  # (1,) float32
    similarity_ptr,  # (batch, rows) float64: scale <q_i, k_(i + offset)>
    rows,
    columns,
    offset,
    channels,
    NORMALIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, SPAN)
    inside = row < rows
    used = inside[:, None] & (channel < channels)[None, :]
    own = ((problem * rows + row) * channels)[:, None] + channel[None, :]
    other = ((problem * columns + offset + row) * channels)[:, None] + channel[None, :]
    query = tl.load(query_ptr + own, mask=used, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + other, mask=used, other=0.0).to(tl.float32)
    similarity = tl.sum(query.to(tl.float64) * key.to(tl.float64), axis=1) * tl.load(scale_ptr).to(tl.float64)
    if NORMALIZE:
        similarity = similarity * inverse_length(query).to(tl.float64) * inverse_length(key).to(tl.float64)
    tl.store(similarity_ptr + problem * rows + row, similarity, mask=inside)
