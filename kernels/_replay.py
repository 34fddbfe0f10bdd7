"""Calls that do again what an earlier call did: its allocations and launches, without the Python that chose them.

Which kernels run, with which grids, strides and constants, follows from how a call's tensors are described: shapes, strides,
dtypes, alignment. Working that out takes Python 20 to 80 us a call, more than small kernels take on the device. `Repeated`
watches the second call of a description and writes down what it did (`kernels._plan`); later calls of that description run
that. The function must not look at values, or at anything else that may change between two calls of one description.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels._ahead import Later, state, together
from kernels._descriptors import Described, Place, with_base
from kernels._plan import Allocation, Launch, Operation, Plan, Step, View, written

FIRST_DEVICE = 0
"""Index of the first device on which calls are repeated; a CPU, where Triton's interpreter runs kernels, is -1."""
MOST = 256
"""Descriptions that one function remembers; then it forgets all of them, as lengths that never come back would pile up."""
FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""A fresh tensor once more, as `torch.empty_like` gives it to a mode."""
_watching = threading.local()
_all: list[Repeated] = []


class Unseen(NamedTuple):
    """What is done for a description whose call could not be watched: the same as for one that nobody knows."""

    fn: Callable[..., Any]

    def run(self, _stream: int, *args: Any) -> Any:
        """The results of the call with these arguments."""
        return self.fn(*args)


class Repeated:
    """A function of tensors, numbers and None whose repeated calls skip their Python.

    Args:
        fn: launches kernels of `kernels._entry` and calls torch operators; returns fresh tensors, or a tuple of them.

    `others` may be set to what `kernels._ahead.Later` says.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.others: Callable[..., Iterable[tuple[Any, ...]]] = lambda *_: ()
        self.plans: dict[tuple[Any, ...], Plan | Unseen | None] = {}
        _all.append(self)

    def __call__(self, *args: Any) -> Any:
        """What `fn` returns."""
        return self.call(args)

    def call(self, args: tuple[Any, ...], then: Callable[[tuple[Any, ...], Any], None] | None = None) -> Any:
        """What `fn` returns; see `kernels._ahead.Later` for `then`."""
        key = _described(args)
        if key is None or state() is not None:  # calls that are tried out have no values, and are no example of what is done
            return self.fn(*args)
        plan = self.plans.get(key)
        if plan is not None and not _listeners():
            return plan.run(current_stream(current_device()), *args)
        return self._called(key, args, then)

    def _called(self, key: tuple[Any, ...], args: tuple[Any, ...], then: Callable[[tuple[Any, ...], Any], None] | None) -> Any:
        """The first call of a description runs as it is, the second is watched; one that cannot be watched never is again."""
        if key not in self.plans:
            if len(self.plans) >= MOST:
                self.plans.clear()
            self.plans[key] = None
            return together(self.fn, args, Later(self.others, then))
        if watch() is not None or _listeners():
            return self.fn(*args)
        with Watch(args) as watched:
            found = self.fn(*args)
        self.plans[key] = watched.plan(found) or Unseen(self.fn)
        return found


class Watch(TorchDispatchMode):
    """Writes down what is done inside of its block.

    Args:
        args: of the watched call.
    """

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.given = len(args)
        self.held = list(args)
        self.place = {id(x): index for index, x in enumerate(args) if isinstance(x, Tensor)}
        # A tensor that is given twice has two places, and which of them is meant cannot be seen.
        self.clear = len(self.place) == sum(isinstance(x, Tensor) for x in args)
        self.steps: list[Step] = []
        self.launches = 0

    def __enter__(self) -> Watch:
        """Starts."""
        _watching.by = self
        _runtime().launch_enter_hook.add(self._count)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stops."""
        super().__exit__(*error)
        _runtime().launch_enter_hook.remove(self._count)
        _watching.by = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and notes it."""
        found = func(*args, **(kwargs or {}))
        if func in SAME and self.place.get(id(args[0]), 0) >= self.given:
            self._add(found, self.place[id(args[0])])
            return found
        given, named = [self._placed(x) for x in args], {name: self._placed(x) for name, x in (kwargs or {}).items()}
        made = [found] if isinstance(found, Tensor) else [x for x in found or () if isinstance(x, Tensor)]
        new = [x for x in made if id(x) not in self.place]
        indices = [self._add(x) for x in new]
        self.clear &= len(new) in (0, len(made))
        operation = Operation(func, given, named, indices)
        if func._schema.name.removeprefix("aten::") in FRESH:
            self.steps.append(Allocation(indices[0], new[0]))
        elif isinstance(found, Tensor) and new and given and isinstance(given[0], Place) and _shares_memory(found, args[0]):
            self.steps.append(View(indices[0], given[0].at, _start(found) - _start(args[0]), operation))
        else:
            self.steps.append(operation)
        return found

    def launch(self, compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        """Notes a launch that `kernels._entry` made."""
        self.launches -= 1
        placed = [self._described(x) if hasattr(x, "block_shape") else self._placed(x) for x in args]
        self.steps.append(Launch(compiled, (*grid, 1, 1)[:3], placed))

    def plan(self, found: Any) -> Plan | None:
        """What was noted, or None if that is not all that was done."""
        flat = found if isinstance(found, tuple) else (found,)
        if not self.clear or self.launches or any(id(x) not in self.place for x in flat):
            return None
        results = tuple(self.place[id(x)] for x in flat)
        return written(self.steps, self.given, results if isinstance(found, tuple) else results[0])

    def _count(self, *_: Any) -> None:
        self.launches += watch() is self

    def _add(self, x: Tensor, index: int | None = None) -> int:
        self.held.append(x)  # held, so that no other tensor gets its identity
        self.place[id(x)] = len(self.held) - 1 if index is None else index
        return self.place[id(x)]

    def _described(self, x: Any) -> Described | None:
        """A descriptor of a tensor at a place."""
        base = self._placed(x.base)
        return None if base is None else Described(with_base(x, None), base, x.base.device)

    def _placed(self, x: Any) -> Any:
        """A tensor's place; everything else is the same in all calls of a description."""
        if isinstance(x, (list, tuple)):
            return [self._placed(one) for one in x]
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self.place and x.ndim == 0 and x.device.type == "cpu":
            return x  # a number of Python's, as in `x[0] = 1.0`
        if id(x) not in self.place:
            self.clear = False
            return None
        return Place(self.place[id(x)])


def watch() -> Watch | None:
    """Who watches this thread."""
    return getattr(_watching, "by", None)


def functions() -> list[Repeated]:
    """Every function whose calls are repeated."""
    return _all


@contextmanager
def forgetful() -> Iterator[None]:
    """Inside the block nothing is known of calls outside, and the reverse: for who changes what a plan takes for constant."""
    forget()
    try:
        yield
    finally:
        forget()


def forget() -> None:
    """Forgets every plan."""
    for repeated in _all:
        repeated.plans.clear()


@cache
def _runtime() -> Any:
    """Triton's settings, imported late because torch forms need no Triton."""
    from triton import knobs

    return knobs.runtime


def _listeners() -> Any:
    """Who wants to be told of launches, as profilers do."""
    return _runtime().launch_enter_hook.calls


def _shares_memory(x: Tensor, of: Tensor) -> bool:
    return x.untyped_storage()._cdata == of.untyped_storage()._cdata


def _start(x: Tensor) -> int:
    """Bytes before it in its memory; of a tensor without elements the address would not tell."""
    return x.storage_offset() * x.element_size()


def _described(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a plan depends on; None where nothing is repeated. Strides of dense tensors follow from their shapes."""
    key: list[Any] = []
    index = FIRST_DEVICE - 1
    for x in args:
        if isinstance(x, Tensor):
            index = x.get_device()
            if index < FIRST_DEVICE:
                return None
            key += index, x.shape, x.is_contiguous() or x.stride(), x.dtype, x.data_ptr() % 16 == 0
        else:
            key.append(tuple(x) if isinstance(x, list) else x)
    if index != current_device():  # Triton launches on the current device
        return None
    if torch.is_autocast_enabled("cuda"):
        key.append("autocast")
    return tuple(key)


def current_device() -> int:
    """Its index; `torch.cuda.current_device` first asks whether CUDA is there, and here a tensor lies on it."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """Of a device, as launches take it."""
    return torch._C._cuda_getCurrentRawStream(device)
