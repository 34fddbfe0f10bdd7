"""Kernels that are launched with little Python in between: what Triton works out at every launch is kept from the first.

`triton.jit` binds a launch's arguments, describes each and looks the description up as a string: 10 to 30 us for kernels with
many arguments, more than a small kernel takes on the device. `entry` keeps the compiled kernel under what compilation depends
on: constants, dtypes, and whether addresses and numbers are multiples of 16. The first launch of a description is Triton's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Entry(JITFunction):
    """A `triton.jit` function whose repeated launches skip Triton's binding.

    Run-time arguments are given by position and come first, constants by name.
    """

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(fn, **options)
        self.launched: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        # an annotated number that is not specialised has one type whatever its value
        self.fixed = [p.do_not_specialize and bool(p.annotation_type) for p in self.params]

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        """See `JITFunction.run`; called by `kernel[grid](...)`."""
        if warmup or self.pre_run_hooks or callable(grid):
            return super().run(*args, grid=grid, warmup=warmup, **constants)
        key = [driver.active.get_current_device(), *constants, *constants.values()]
        for fixed, x in zip(self.fixed, args, strict=False):
            if isinstance(x, Tensor):
                key.append(x.dtype)
                key.append(x.data_ptr() % 16 == 0)
            elif not fixed and type(x) is not float:
                key.append((type(x), x) if type(x) is not int else (x == 1, x % 16 == 0, x.bit_length() > 31))
        found = self.launched.get(tuple(key))
        if found is None:
            compiled = super().run(*args, grid=grid, warmup=False, **constants)
            if compiled is not None:
                self.launched[tuple(key)] = compiled, tuple(constants[name] for name in self.arg_names[len(args) :])
            return compiled
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
        return compiled


def entry(fn: Callable[..., Any] | None = None, *, do_not_specialize: Iterable[str] = ()) -> Any:
    """`triton.jit` for kernels that are launched from Python; numbers annotated with an integer type compile nothing new.

    Args:
        fn: the kernel; None in the form `@entry(do_not_specialize=...)`.
        do_not_specialize: further arguments whose values compile nothing new.
    """
    if fn is None:
        return lambda fn: entry(fn, do_not_specialize=do_not_specialize)
    numbers = [name for name, p in inspect.signature(fn).parameters.items() if "int" in str(p.annotation)]
    names = [*numbers, *(name for name in do_not_specialize if name not in numbers)]
    return triton.jit(fn, do_not_specialize=names) if triton.knobs.runtime.interpret else Entry(fn, do_not_specialize=names)
