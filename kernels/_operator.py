"""Torch operators with little Python around them.

`torch.library.custom_op` looks for aliases among results, fills in defaults and steps through several wrappers at every call,
and the function that it makes for autograd refuses `torch.func.grad`. `operator` registers the same pieces directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction


class Operator:
    """A function of tensors that torch knows by a name; results must not share memory with arguments.

    Args:
        name: with its namespace.
        fn: the function on plain tensors, annotated as `torch.library.infer_schema` reads it.
    """

    def __init__(self, name: str, fn: Callable[..., Any]) -> None:
        self.name, self.__doc__ = name, fn.__doc__
        torch.library.define(name, torch.library.infer_schema(fn, mutates_args=()))
        torch.library.impl(name, ("cpu", "cuda"), fn)
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *args: Any) -> Any:
        """Calls the operator through torch's dispatcher."""
        return self.overload(*args)

    def register_fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results."""
        return torch.library.register_fake(self.name, fn)

    def register_vmap(self, fn: Callable[..., Any]) -> None:
        """See `torch.library.register_vmap`."""
        torch.library.register_vmap(self.name, fn)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None], told: bool = False) -> None:
        """See `torch.library.register_autograd`.

        Args:
            backward: gradients of the arguments.
            setup_context: what it needs of a call.
            told: whether the last argument says that gradients may come; callers give False, and here it becomes True.
        """
        call = self.overload

        class Gradient(_SingleLevelFunction):
            """The gradient at one level of `torch.func`, which is what a kernel at the Autograd key sees."""

            @staticmethod
            def forward(*args: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    return call(*args)

        Gradient.setup_context, Gradient.backward = staticmethod(setup_context), staticmethod(backward)

        def differentiable(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
                with enable_single_level_autograd_function():
                    return Gradient.apply(*args[:-1], True) if told else Gradient.apply(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return call(*args)

        torch.library.impl(self.name, "Autograd", differentiable)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of a function."""
    return lambda fn: Operator(name, fn)
