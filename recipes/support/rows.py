"""
The rows of a batch.

A batch is a tensor, or a dictionary or tuple of tensors, with the rows along the first axis.
"""

from collections.abc import Iterator
from typing import Any

from accelerate.utils import recursively_apply
from torch import Tensor


def count_rows(batch: Any) -> int:
    """The length of the first axis of the first tensor in `batch`."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(len(tensor) if tensor.dim() else 1)
        return tensor

    recursively_apply(note, batch)
    return sizes[0]


def groups_of_rows(batch: Any, size: int) -> Iterator[Any]:
    """Split `batch` into groups of `size` rows. The last one may be smaller."""
    for start in range(0, count_rows(batch), size):
        yield recursively_apply(lambda tensor, start=start: tensor[start : start + size], batch)


def check_rows(rows: int) -> None:
    """Raise `ValueError` if `rows`, the number of rows in all batches, is 0."""
    if rows == 0:
        raise ValueError("batches is empty: there is no loss to measure. (A generator can be iterated only once.)")
