"""The random numbers of csrc/geometry/random.h and of csrc/view/view.h in plain numpy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def philox(count: int, stream: int, *, seed: int, slot: int, step: int) -> Array:
    """(count, 4) words of blocks 0 .. count - 1, as random.h has them."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    words = [np.arange(count, dtype=np.uint64)]
    words += [np.full(count, number, np.uint64) for number in (stream, slot, step)]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (second >> high) ^ words[1] ^ np.uint64(key[0]),
            second & low,
            (first >> high) ^ words[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(words, axis=1).astype(np.uint32)


def uniform_numbers(size: tuple[int, ...], stream: int, **key: int) -> Array:
    count = int(np.prod(size))
    words = philox((count + 3) // 4, stream, **key).reshape(-1)[:count]
    return ((words >> 8) / 2.0**24).reshape(size)


def normal_numbers(size: tuple[int, ...], stream: int, **key: int) -> Array:
    count = int(np.prod(size))
    words = philox((count + 3) // 4, stream, **key).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log((1 + (words[:, 0] >> 8)) / 2.0**24))
    angle = 2 * np.pi * words[:, 1].view(np.int32) / 2.0**32
    pairs = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].reshape(size)
