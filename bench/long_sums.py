"""A pass over compiled graphs: gradients of members' weights become sums over shares of their tokens (`kernels.products`).

Mixers write `nn.Linear`, and a fleet makes one batched product of all members' linear maps. Forward and towards the input these
have as many rows as there are tokens, but the gradient of a weight has as many as the weight, and sums over the tokens.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from kernels import products

LONG = 8192
"""Tokens of a member from which on a sum is cut."""
MOST_RESULTS = 1 << 20
"""Elements of all members' results up to which they keep few processors busy."""


class CutLongSums(CustomGraphPass):
    """Replaces batched products with a long sum and small results."""

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
            left, right = node.args
            if not _is_long(left.meta["val"], right.meta["val"]):
                continue
            with graph.inserting_before(node):
                rows = graph.call_function(torch.ops.aten.permute.default, (left, [0, 2, 1]))
                rows.meta["val"] = left.meta["val"].permute(0, 2, 1)
                product = graph.call_function(torch.ops.mixer_bench.product_over_rows.default, (rows, right))
            product.meta.update(node.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """What tells compiled graphs of other versions of this pass apart."""
        return get_hash_for_files((__file__, products.__file__))


def _is_long(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether this is [M, D, N] from rows, times [M, N, E], with rows in one piece each."""
    members, width, length = left.shape
    regular = left.stride(1) == 1 and left.stride(0) == length * left.stride(2)
    regular = regular and right.stride(2) == 1 and right.stride(0) == length * right.stride(1)
    return regular and left.is_cuda and members > 1 and length >= LONG and members * width * right.shape[2] <= MOST_RESULTS
