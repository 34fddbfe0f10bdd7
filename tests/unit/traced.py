"""Graphs written by hand, for tests of passes over compiled graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx


class Traced(fx.Graph):
    """A graph whose nodes hold what fake tensors say of them."""

    def add(self, target: Callable[..., object], *args: object) -> fx.Node:
        node = self.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda one: one.meta["val"]))
        return node

    def given(self, name: str, *shape: int) -> fx.Node:
        node = self.placeholder(name)
        node.meta["val"] = torch.empty(shape)
        return node
