"""`within`: numbers of rows, each of which a table must have: the check of a lookup, where each rank has a part of the rows."""

from __future__ import annotations

from torch import Tensor


def within(index: Tensor, rows: int) -> Tensor:
    """`index` (of any shape, integers) as int64. Raises: IndexError where an element is not in [0, rows).

    The check is a lookup, which every backend checks as PyTorch does: on a GPU by an assertion of the kernel, in compiled
    programs (where an error on the CPU is a RuntimeError) inside of the kernel that uses the result. Its result depends on the
    check, so no compiler drops it. What is below 0 is looked up behind the last row: compiled lookups count it from the end.
    """
    index = index.long()
    zeros = index.new_zeros(()).expand(*index.shape, rows)
    looked_up = index.where(index >= 0, rows)
    try:
        return index + zeros.gather(-1, looked_up.unsqueeze(-1)).squeeze(-1)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise IndexError(f"a label or an index of a lookup is out of range: it must be at least 0 and less than {rows} ({error})"
                         ) from error
