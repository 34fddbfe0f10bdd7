"""Several passes over compiled graphs where torch takes one."""

from __future__ import annotations

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass


class Passes(CustomGraphPass):
    """Passes one after the other.

    Args:
        passes: in their order.
    """

    def __init__(self, *passes: CustomGraphPass) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place."""
        for one in self.passes:
            one(graph)

    def uuid(self) -> tuple[object, ...]:
        """What tells compiled graphs of other versions of the passes apart."""
        return tuple(one.uuid() for one in self.passes)
