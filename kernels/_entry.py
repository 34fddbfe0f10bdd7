"""Kernels that are launched with little Python in between: what Triton works out at every launch is kept from the first.

`triton.jit` binds a launch's arguments, describes each and looks the description up as a string: 10 to 30 us for kernels with
many arguments, more than a small kernel takes on the device. `entry` keeps the compiled kernel under what compilation depends
on: constants, dtypes, and whether addresses and numbers are multiples of 16. The first launch of a description is Triton's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon._runtime import jit as gluon_jit
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import _ahead, _launchers, _replay

_launchers.keep_apart()


class Entry(JITFunction):
    """A `triton.jit` function whose repeated launches skip Triton's binding.

    Run-time arguments are given by position and come first, constants by name.
    """

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(fn, **options)
        self.launched: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        # an annotated number that is not specialised has one type whatever its value
        self.fixed = [p.do_not_specialize and bool(p.annotation_type) for p in self.params]
        self.sized = [p.do_not_specialize for p in self.params]

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        """See `JITFunction.run`; called by `kernel[grid](...)`."""
        if warmup or self.pre_run_hooks or callable(grid):
            return super().run(*args, grid=grid, warmup=warmup, **constants)
        key = [driver.active.get_current_device(), *constants, *constants.values()]
        for fixed, sized, x in zip(self.fixed, self.sized, args, strict=False):
            if isinstance(x, Tensor):
                key.append(x.dtype)
                key.append(x.data_ptr() % 16 == 0)
            elif hasattr(x, "block_shape"):  # a descriptor of Gluon's
                key.append((x.base.dtype, tuple(x.block_shape), x.layout))
            elif not fixed and type(x) is not float:
                is_long = type(x) is int and x.bit_length() > 31
                key.append((type(x), x) if type(x) is not int else is_long if sized else (x == 1, x % 16 == 0, is_long))
        key, state = tuple(key), _ahead.state()
        found = self.launched.get(key)
        if isinstance(state, _ahead.Wanted):  # nothing is launched
            if found is None:
                compiling = partial(super().run, *args, grid=grid, warmup=True, **constants)
                state.add(self, key, compiling, self._constants(args, constants))
            return None
        if found is None:
            if state == "look":
                raise _ahead.Missing
            compiled = super().run(*args, grid=grid, warmup=False, **constants)
            if compiled is None:
                return None
            found = self.launched[key] = compiled, self._constants(args, constants)
        else:
            found[0][(*grid, 1, 1)[:3]](*args, *found[1])
        if (watch := _replay.watch()) is not None:
            watch.launch(found[0], grid, [*args, *found[1]])
        return found[0]

    def _constants(self, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
        """In the order of the signature."""
        return tuple(constants[name] for name in self.arg_names[len(args) :])


class GluonEntry(Entry, GluonJITFunction):
    """The same of a Gluon kernel."""


def entry(fn: Callable[..., Any] | None = None, *, do_not_specialize: Iterable[str] = (), gluon: bool = False) -> Any:
    """`triton.jit` for kernels that are launched from Python; numbers annotated with an integer type compile nothing new.

    Args:
        fn: the kernel; None in the form `@entry(do_not_specialize=...)`.
        do_not_specialize: further arguments whose values compile nothing new.
        gluon: whether the kernel is written in Gluon.
    """
    if fn is None:
        return lambda fn: entry(fn, do_not_specialize=do_not_specialize, gluon=gluon)
    numbers = [name for name, p in inspect.signature(fn).parameters.items() if "int" in str(p.annotation)]
    names = [*numbers, *(name for name in do_not_specialize if name not in numbers)]
    if triton.knobs.runtime.interpret:
        return (gluon_jit if gluon else triton.jit)(fn, do_not_specialize=names)
    return (GluonEntry if gluon else Entry)(fn, do_not_specialize=names)
