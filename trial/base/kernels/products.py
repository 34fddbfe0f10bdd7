"""Products over the tokens of a member, which are long sums with small results.

Shape legend: M members, N rows of a member, D and E columns, S shares of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_PARTS = 64
"""Shares of all members together: with more, adding them up costs more than is gained."""
LEAST_ROWS = 512
"""Rows of a share."""


def product_over_rows(a_MND: Tensor, b_MNE: Tensor) -> Tensor:
    """a^T b of each member, in fp32 or better, as a sum over shares of the rows: [M, D, E].

    The batched product of torch cuts no sum: it gives each tile of a result to one processor, and the gradient of a member's
    weights is few tiles.
    """
    members, rows, _ = a_MND.shape
    most = max(1, min(MOST_PARTS // members, rows // LEAST_ROWS))
    shares = next(count for count in range(most, 0, -1) if rows % count == 0)
    a, b = (t.reshape(members * shares, rows // shares, -1) for t in (a_MND, b_MNE))
    wide = torch.promote_types(a.dtype, torch.float32)
    # only CUDA adds up in fp32 and keeps it
    found = torch.bmm(a.mT, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else (a.mT @ b).to(wide)
    return found.view(members, shares, *found.shape[1:]).sum(1)
