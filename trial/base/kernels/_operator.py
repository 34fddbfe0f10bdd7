"""Torch operators with little Python around them.

`torch.library.custom_op` looks for aliases among results, fills in defaults and steps through several wrappers at every call,
and the function that it makes for autograd refuses `torch.func.grad`. `operator` registers the same pieces directly. A call on
plain tensors, with nothing in between that wants to see it, does not pass torch's dispatcher at all; a repeated one does not
run the function either, but what `kernels._replay` noted of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from kernels._replay import Repeated

PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function of tensors that torch knows by a name; results must not share memory with arguments.

    Args:
        name: with its namespace.
        fn: the function on plain tensors, annotated as `torch.library.infer_schema` reads it; runs with the current device
            set to that of its tensors, and must look at no values.
    """

    def __init__(self, name: str, fn: Callable[..., Any]) -> None:
        self.name, self.__doc__ = name, fn.__doc__
        self.repeated = Repeated(fn)
        torch.library.define(name, torch.library.infer_schema(fn, mutates_args=()))
        torch.library.impl(name, ("cpu", "cuda"), self.repeated)
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        self.gradient: Any = None

    def __call__(self, *args: Any) -> Any:
        """Calls the operator: directly where nothing but autograd can be interested, else through torch's dispatcher."""
        if torch.compiler.is_compiling() or not _is_plain(args):
            return self.overload(*args)
        if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)):
            return self.repeated(*args)
        return self.overload(*args) if self.gradient is None else self.gradient.apply(*args)

    def register_fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results."""
        return torch.library.register_fake(self.name, fn)

    def register_vmap(self, fn: Callable[..., Any]) -> None:
        """See `torch.library.register_vmap`."""
        torch.library.register_vmap(self.name, fn)

    def register_sizes(self, others: Callable[..., Iterable[tuple[Any, ...]]]) -> Callable[..., Iterable[tuple[Any, ...]]]:
        """Arguments of other sizes that need other kernels, which a first call compiles too; see `kernels._ahead`."""
        self.repeated.others = others
        return others

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None], keep: bool = False) -> None:
        """See `torch.library.register_autograd`.

        Args:
            backward: from the context and the gradients of results to those of arguments.
            setup_context: keeps in the context what `backward` needs of arguments and results.
            keep: whether the last argument says that more is kept for a backward pass; it is set where there will be one.
        """

        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*args)

        at_key = _gradient(lambda args, _: below(*args), backward, setup_context, keep=keep)
        self.gradient = _gradient(self.repeated.call, backward, setup_context, keep=keep)

        def differentiable(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
                with enable_single_level_autograd_function():
                    return at_key.apply(*args)
            return below(*args)

        torch.library.impl(self.name, "Autograd", differentiable)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of a function."""
    return lambda fn: Operator(name, fn)


def _gradient(call: Callable[..., Any], backward: Callable[..., Any], setup: Callable[..., None], *, keep: bool) -> Any:
    """A call with its gradient at one level of `torch.func`, which is what a kernel at the Autograd key sees.

    `call` gets the arguments, and what a first call is to try out for the sake of the kernels of the backward pass.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        def later(args: tuple[Any, ...], found: Any) -> None:
            saved = Saved(args)
            setup(saved, args, found)
            first, *rest = found if isinstance(found, tuple) else (found,)
            backward(saved, torch.empty_like(first), *(None for _ in rest))

        found = call((*args[:-1], True) if keep else args, later)
        setup(ctx, args, found)
        return found

    return type("Gradient", (_SingleLevelFunction,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


class Saved:
    """Stands for autograd's context where a backward pass is tried out; keeps what is saved.

    Args:
        args: of the forward pass.
    """

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in args)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """See autograd's."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        """Nothing is differentiated."""

    def set_materialize_grads(self, _: bool) -> None:
        """Gradients that there are not are None."""


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether arguments are ordinary tensors, and no mode, trace or transform of torch is to see what happens to them."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(x) in PLAIN for x in args if isinstance(x, Tensor))
