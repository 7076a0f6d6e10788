"""A batch of pairwise problems on a GPU: which kernels run, on what, in which grid.

Nothing here looks at a value on the device: all launches can be captured in a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from .configurations import Configuration, choose, multiprocessors
from .grids import MOST, MOST_GRADIENTS, MOST_PARTIAL, even_splits, groups, triangle_groups
from .pairwise_gradients import gradient_kernel
from .pairwise_sums import LARGEST_SHIFT, LOG2E, merge_kernel, range_means_kernel, sums_kernel
from .pairwise_vectors import pack_kernel, paired_kernel, unpack_kernel

T = TypeVar("T")
LOG_SUM_EXPONENTIALS = ("shifted", "online")  # both are launched; the kernels see which of them is meant
# float16 gradients are multiplied by 2^12: a sum of four probabilities of one, times a remainder of 2, stays in range.
LIFT = 12


@dataclass
class Vectors:
    """One of the two sets."""

    given: Tensor  # (B, N, C)
    packed: Tensor  # (B, padded, width)
    remainder: Tensor  # (B, padded), or anything where it is not used
    longest: Tensor | None  # (1,) float32; None: all have length one

    @property
    def count(self) -> int:
        return self.given.shape[1]

    @property
    def padded(self) -> int:
        return self.packed.shape[1]


@dataclass
class SideGradient:
    """What backward needs of the sums of one side."""

    gradient: Tensor | None  # (B, N) float32, with respect to the sums; None: zero
    lse: Tensor | None = None  # (B, N) float64; None: sums of softplus


@dataclass
class Weights:
    """The same as gradient_kernel takes it."""

    level: Tensor  # (B, N) float32
    weight: Tensor  # (B, N) float32


@dataclass
class Positives:
    """What the similarities of positives are to lose."""

    of_query: Tensor  # (B, N): each to its own key
    of_key: Tensor  # (B, M): the same numbers at the places of the keys; zero elsewhere
    first: Tensor | None = None  # (P, N): each vector to all of its range instead
    last: Tensor | None = None


class Pairs:
    """query (B, N, C) and key (B, M, C), float32, bfloat16 or float16; the vectors in `order` (P, N) where given."""

    def __init__(
        self, query: Tensor, key: Tensor, scale: Tensor, *, same: bool, normalize: bool, order: Tensor | None = None
    ) -> None:
        self.scale, self.same, self.normalize, self.order = scale, same, normalize, order
        self.dtype, self.batch, self.channels = query.dtype, query.shape[0], query.shape[2]
        # Exact powers of two leave no other vector than the given one; float32 is rounded by 6e-8 instead.
        self.exact = normalize and query.dtype != torch.float32
        self.lift = LIFT if query.dtype == torch.float16 else 0
        self.precision = "tf32x3" if query.dtype == torch.float32 else "ieee"
        largest_chunk = 128 if query.dtype == torch.float32 else 256
        self.width = max(16, triton.next_power_of_2(self.channels))
        if self.width > largest_chunk:
            self.width = triton.cdiv(self.channels, 128) * 128
        self.chunk = self.width if self.width <= largest_chunk else 128
        self.span = triton.next_power_of_2(self.width)
        self.rows_at_once = max(1, min(16, 4096 // self.span))
        self.query = self._pack(query)
        self.key = self.query if same else self._pack(key)
        bound = scale.abs() * LOG2E.value
        if self.query.longest is not None and self.key.longest is not None:
            bound = bound * self.query.longest * self.key.longest
        self.shift = bound

    def log_sum_exponentials(self, *, excluded: int | None, both: bool) -> tuple[Tensor, Tensor | None]:
        """Rows (B, N) and, for `both`, columns (B, M), float64, without the pairs (i, i + excluded)."""
        rows, columns = self._sums(LOG_SUM_EXPONENTIALS, self.shift, excluded=excluded, both=both and not self.same)
        row = self._merge(*rows, self.query)
        if not both:
            return row, None
        return row, row.clone() if columns is None else self._merge(*columns, self.key)

    def softplus_sums(self, shift: Tensor) -> Tensor:
        """sum_j log(1 + exp(s_ij - shift)), (B, N) float64"""
        (sums, _), _ = self._sums(("softplus",), self._powers_of_two(shift), excluded=None, both=False)
        return sums[..., : self.query.count].sum(0, dtype=torch.float64) / LOG2E.value

    def range_means(self, first: Tensor, last: Tensor) -> Tensor:
        """Means of the similarities over ranges, (B, N) float64, of a set with itself."""
        own = self.query
        mean = self.scale.new_empty((self.batch, own.count), dtype=torch.float64)

        def launch(chosen: Configuration) -> Tensor:
            range_means_kernel[(self.batch * triton.cdiv(own.count, chosen.own),)](
                own.packed, own.remainder, self.scale, first, last, mean,
                own.count, own.padded, first.shape[0],
                EXACT=self.exact, PRECISION=self.precision, WIDTH=self.width, CHUNK=self.chunk,
                BLOCK_OWN=chosen.own, BLOCK_OTHER=chosen.other, **chosen.launch,
            )  # fmt: skip
            return mean

        return self._tuned("sums", launch)

    def paired(self, offset: int) -> Tensor:
        """scale <q_i, k_(i + offset)>, (B, N) float64"""
        query, key = self.query.given, self.key.given
        similarity = self.scale.new_empty(query.shape[:2], dtype=torch.float64)
        paired_kernel[(self.batch * triton.cdiv(query.shape[1], self.rows_at_once),)](
            query, key, self.scale, similarity, query.shape[1], key.shape[1], offset, self.channels,
            NORMALIZE=self.normalize, SPAN=self.span, ROWS=self.rows_at_once,
        )  # fmt: skip
        return similarity

    def differentiate(
        self,
        row: SideGradient,
        column: SideGradient,
        positives: Positives | None,
        *,
        excluded: int | None,
        offset: int = 0,
        softplus: Tensor | None = None,
        need_key: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and scale. Those of the query hold both where the set is the same."""
        forms: tuple[str, ...] = LOG_SUM_EXPONENTIALS
        shift = self.shift
        if softplus is not None:
            forms, shift = ("softplus",), self._powers_of_two(softplus)
        # Upstream gradients stay outside the products, as one number: a weight of 1/N would be nothing in float16.
        sizes = [side.gradient for side in (row, column)] + ([] if positives is None else [positives.of_query])
        unit = torch.stack([size.abs().amax() for size in sizes if size is not None]).amax().reshape(1)
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0) / 2**self.lift
        of_rows, of_columns = self._weights(row, self.query, unit), self._weights(column, self.key, unit)
        if positives is not None:
            scaled = (positives.of_query / unit, positives.of_key / unit)
            positives = Positives(*scaled, positives.first, positives.last)
        diagonal = offset if excluded is None else excluded
        options = {"forms": forms, "shift": shift, "exclude": excluded is not None}
        grad_query, along = self._gradient(
            self.query, self.key, unit,
            own_side=of_rows, other_side=of_columns, positives=positives, diagonal=diagonal, **options,
        )  # fmt: skip
        grad_scale = along.sum(dtype=torch.float64) * unit / (2 if self.same else 1)
        grad_key = grad_query.new_empty((0,))
        if need_key and not self.same:
            if positives is not None:
                positives = Positives(positives.of_key, positives.of_query, positives.first, positives.last)
            grad_key, _ = self._gradient(
                self.key, self.query, unit,
                own_side=of_columns, other_side=of_rows, positives=positives, diagonal=-diagonal, **options,
            )  # fmt: skip
        return grad_query, grad_key, grad_scale.float()

    def _weights(self, side: SideGradient, vectors: Vectors, unit: Tensor) -> Weights:
        if side.gradient is None:
            nothing = self.scale.new_zeros((self.batch, vectors.count))
            return Weights(torch.full_like(nothing, torch.inf), nothing)
        weight = side.gradient.contiguous() / unit
        if side.lse is None:
            return Weights(weight, weight)
        # The log-sum-exp of no pair at all counts as +inf, which makes probabilities zero.
        lse = side.lse.contiguous()
        level = torch.where(lse == -torch.inf, torch.inf, lse)
        shifted = weight * torch.exp2(self.shift - self.lift - level * LOG2E.value)
        weight = torch.where(self.shift <= LARGEST_SHIFT.value, shifted, weight)
        return Weights(level.float(), weight.float())

    def _pack(self, given: Tensor) -> Vectors:
        given = given.contiguous()
        count = given.shape[1]
        granule = min(256, max(16, triton.next_power_of_2(count)))
        padded = triton.cdiv(count, granule) * granule
        packed = given.new_empty((self.batch, padded, self.width))
        numbers = self.scale.new_empty((self.batch, padded))  # lengths, or remainders: never both
        ordered = self.order is not None
        order = self.order if self.order is not None else self.scale
        pack_kernel[(self.batch * padded // self.rows_at_once,)](
            given, order, packed, numbers, numbers, count, padded, self.channels, order.shape[0],
            ORDERED=ordered, NORMALIZE=self.normalize, EXACT=self.exact,
            WIDTH=self.width, SPAN=self.span, ROWS=self.rows_at_once,
        )  # fmt: skip
        return Vectors(given, packed, numbers, None if self.normalize else numbers.amax().reshape(1))

    def _tuned(self, kernel: str, launch: Callable[[Configuration], T]) -> T:
        shortest = min(self.query.count, self.key.count)
        return launch(choose(kernel, self.dtype, self.chunk, shortest, self.scale.device, launch))

    def _places(self, chosen: Configuration) -> int:
        """How many programs the device holds at once."""
        return chosen.resident * multiprocessors(self.scale.device)

    def _powers_of_two(self, shift: Tensor) -> Tensor:
        return (shift * LOG2E.value).float()

    def _sums(
        self, forms: tuple[str, ...], shift: Tensor, *, excluded: int | None, both: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """Partial sums and maxima of the rows and, for `both`, of the columns: (groups, B, padded)."""
        return self._tuned("sums", lambda chosen: self._sums_by(chosen, forms, shift, excluded, both))

    def _sums_by(
        self, chosen: Configuration, forms: tuple[str, ...], shift: Tensor, excluded: int | None, both: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        fixed, passing = self.query, self.key
        blocks = triton.cdiv(fixed.count, chosen.own), triton.cdiv(passing.count, chosen.other)
        places = self._places(chosen)
        if self.same:
            fixed_groups = passing_groups = triangle_groups(blocks[0], self.batch, places)
        else:
            # Every group of the one side has partial sums of all vectors of the other.
            most = max(8, min(MOST, MOST_PARTIAL // (self.batch * max(fixed.padded, passing.padded))))
            fixed_groups, passing_groups = groups(*blocks, self.batch, places, most, both)
        # A set with itself: sums of columns are further sums of its rows, in the same place.
        of_fixed = passing_groups + (fixed_groups if self.same else 0)
        online = "online" in forms
        rows = self._partial(of_fixed, fixed.padded, cleared=self.same, maxima=online)
        columns = self._partial(fixed_groups, passing.padded, cleared=True, maxima=online) if both else None
        sums, maxima = rows
        extra = (sums[passing_groups:], maxima[passing_groups:]) if self.same else columns or rows
        for form in forms:
            sums_kernel[(self.batch * fixed_groups * passing_groups,)](
                fixed.packed, passing.packed, fixed.remainder, passing.remainder, self.scale, shift,
                sums, maxima, *extra,
                self.batch, fixed.count, fixed.padded, passing.count, passing.padded,
                fixed_groups, passing_groups, 0 if excluded is None else excluded,
                FORM=form, EXCLUDE=excluded is not None, BOTH=both or self.same, SAME=self.same,
                EXACT=self.exact, PRECISION=self.precision, WIDTH=self.width, CHUNK=self.chunk,
                BLOCK_FIXED=chosen.own, BLOCK_PASSING=chosen.other, **chosen.launch,
            )  # fmt: skip
        return rows, columns

    def _partial(self, groups: int, padded: int, *, cleared: bool, maxima: bool) -> tuple[Tensor, Tensor]:
        """Sums and maxima; cleared where programs add to them, or leave parts to others."""
        shape = (groups, self.batch, padded)
        sums = self.scale.new_zeros(shape) if cleared else self.scale.new_empty(shape)
        if not maxima:
            return sums, sums
        return sums, self.scale.new_full(shape, -torch.inf) if cleared else self.scale.new_empty(shape)

    def _merge(self, sums: Tensor, maxima: Tensor, vectors: Vectors) -> Tensor:
        lse = sums.new_empty((self.batch, vectors.count), dtype=torch.float64)
        block = min(256, triton.next_power_of_2(vectors.count))
        merge_kernel[(self.batch * triton.cdiv(vectors.count, block),)](
            sums, maxima, self.shift, lse, sums.shape[0], self.batch, vectors.count, vectors.padded, BLOCK=block
        )
        return lse

    def _gradient(self, own: Vectors, other: Vectors, unit: Tensor, **sides: Any) -> tuple[Tensor, Tensor]:
        """The gradient of `own`, and its part along each vector, (B, N)."""
        partial = self._tuned("gradients", lambda chosen: self._gradient_by(chosen, own, other, **sides))
        gradient, along = torch.empty_like(own.given), self.scale.new_empty(own.given.shape[:2])
        order = self.scale if self.order is None else self.order
        unpack_kernel[(self.batch * triton.cdiv(own.count, self.rows_at_once),)](
            partial, own.given, order, self.scale * unit, gradient, along,
            partial.shape[0], self.batch, own.count, own.padded, self.channels, order.shape[0],
            ORDERED=self.order is not None, NORMALIZE=self.normalize,
            WIDTH=self.width, SPAN=self.span, ROWS=self.rows_at_once,
        )  # fmt: skip
        return gradient, along

    def _gradient_by(
        self,
        chosen: Configuration,
        own: Vectors,
        other: Vectors,
        *,
        own_side: Weights,
        other_side: Weights,
        positives: Positives | None,
        forms: tuple[str, ...],
        shift: Tensor,
        exclude: bool,
        diagonal: int,
    ) -> Tensor:
        """sum_j G_ij y_j, in parts: (splits, B, padded, width)."""
        programs = self.batch * triton.cdiv(own.count, chosen.own) * (self.width // self.chunk)
        most = max(1, min(MOST, MOST_GRADIENTS // (self.batch * own.padded * self.width)))
        splits = even_splits(programs, triton.cdiv(other.count, chosen.other), self._places(chosen), most)
        partial = self.scale.new_empty((splits, self.batch, own.padded, self.width))
        kind, taken, ranges = "none", (self.scale, self.scale), (self.scale, self.scale)
        if positives is not None:
            kind, taken = "diagonal", (positives.of_query, positives.of_key)
            if positives.first is not None and positives.last is not None:
                kind, ranges = "ranges", (positives.first, positives.last)
        other_weight = other_side.weight
        if self.exact:
            other_weight = other_weight * other.remainder[:, : other.count]
        for form in forms:
            gradient_kernel[(programs * splits,)](
                own.packed, other.packed, own.remainder, other.remainder, self.scale, shift,
                own_side.level, own_side.weight, other_side.level, other_weight, *taken, *ranges, partial,
                self.batch, own.count, own.padded, other.count, other.padded, splits, ranges[0].shape[0], diagonal,
                LIFT=self.lift, FORM=form, EXCLUDE=exclude, POSITIVES=kind, EXACT=self.exact, PRECISION=self.precision,
                WIDTH=self.width, CHUNK=self.chunk,
                BLOCK_OWN=chosen.own, BLOCK_OTHER=chosen.other, **chosen.launch,
            )  # fmt: skip
        return partial
