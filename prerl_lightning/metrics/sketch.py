"""Random projections of vectors as large as a model: inner products and norms from a few numbers.

A sketch has one sum a bucket, of coordinates with random signs (a count sketch); coordinate i is in bucket i modulo the
size, a prime. Of two vectors a and b the inner product of their sketches is right on average, with a standard deviation
of at most sqrt(2 / size) |a| |b|, 0.55 % at the default size; a norm's is sqrt(1 / 2 size), 0.28 %. Sketches add up, so
that each rank may sketch its shard.
"""

from functools import lru_cache

import torch
from torch import Tensor

from prerl_lightning import ranks

SIZE = 65_537  # primes, so that neither buckets nor signs keep step with the rows of a matrix
SIGNS = 1_048_573


class Sketch:
    """A running sketch of one vector that comes in pieces.

    Args:
        size: buckets; see `usable_size`.
        device: of the pieces.
    """

    def __init__(self, size: int = SIZE, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self._step = SIGNS // 2 // size * size  # coordinates at a time
        self._signs = _signs(str(device))

    def add(self, piece: Tensor, start: int) -> None:
        """``piece`` (any shape) are the coordinates from ``start`` on."""
        flat, size = piece.detach().flatten(), len(self.sums)
        for first in range(0, len(flat), self._step):
            part = flat[first : first + self._step].double()
            position = start + first
            part = part * self._signs[position % SIGNS :][: len(part)]
            bucket, end = position % size, position % size + len(part)
            if end <= size:
                self.sums[bucket:end] += part
            else:
                padded = torch.nn.functional.pad(part, (bucket, -end % size))
                self.sums += padded.view(-1, size).sum(0)


@lru_cache
def _signs(device: str) -> Tensor:
    """(2 * SIGNS,) of +1 and -1, its second half like the first."""
    signs = torch.randint(0, 2, (SIGNS,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.repeat(2).to(device, torch.float64)


def usable_size(size: int) -> int:
    """``size`` if it is a prime up to 500,000, else one near it: positions modulo a composite size pile up columns."""
    size = max(2, min(size, 499_979))
    while any(size % factor == 0 for factor in range(2, int(size**0.5) + 1)):
        size += 1
    return size


def local_piece(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter or gradient, and where in the flattened whole it starts."""
    local, row = ranks.own_rows(tensor)
    return local, row * (tensor.numel() // tensor.shape[0]) if row else 0
