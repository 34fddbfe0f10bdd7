"""Calls that do again what an earlier call did: its allocations and launches, without the Python that chose them.

Which kernels run, with which grids, strides and constants, follows from how a call's tensors are described: shapes, strides,
dtypes, alignment. Working that out takes Python 20 to 80 us a call, more than small kernels take on the device. `Repeated`
watches the second call of a description and keeps what it did as a list of steps; later calls of that description run the
steps. The function must not look at values, or at anything else that may change between two calls of one description.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels._ahead import Later, together

FIRST_DEVICE = 0
"""Index of the first device on which calls are repeated; a CPU, where Triton's interpreter runs kernels, is -1."""
MOST = 256
"""Descriptions that one function remembers; then it forgets all of them, as lengths that never come back would pile up."""
FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""A fresh tensor once more, as `torch.empty_like` gives it to a mode."""
Step = Callable[[list[Any]], None]
_watching = threading.local()
_all: list[Repeated] = []


class Place(NamedTuple):
    """A tensor of a call: the arguments come first, then what the steps make. After all of them comes the stream of launches."""

    index: int


class Plan(NamedTuple):
    """What a call of one description does.

    Args:
        steps: each with the places that are not needed after it.
        room: places beside the arguments.
        results: that of the result, or those of a tuple of results.
    """

    steps: list[tuple[Step, tuple[int, ...]]]
    room: int
    results: int | tuple[int, ...]

    def run(self, args: Sequence[Any]) -> Any:
        """The results of the call with these arguments."""
        places = [*args, *[None] * self.room, current_stream(current_device())]
        for step, dead in self.steps:
            step(places)
            for index in dead:
                places[index] = None
        return places[self.results] if isinstance(self.results, int) else tuple([places[index] for index in self.results])


class Unseen(NamedTuple):
    """What is done for a description whose call could not be watched: the same as for one that nobody knows."""

    fn: Callable[..., Any]

    def run(self, args: Sequence[Any]) -> Any:
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
        if key is None:
            return self.fn(*args)
        plan = self.plans.get(key)
        if plan is not None and not _listeners():
            return plan.run(args)
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
        self.steps: list[tuple[Step, list[int]]] = []
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
        if func._schema.name.removeprefix("aten::") in FRESH:
            self.steps.append((_allocation(indices[0], new[0]), indices))
        else:
            self.clear &= len(new) in (0, len(made))
            self.steps.append((_operation(func, given, named, indices), [*_indices([given, *named.values()]), *indices]))
        return found

    def launch(self, compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        """Notes a launch that `kernels._entry` made."""
        self.launches -= 1
        tensors = {i: self._placed(x) for i, x in enumerate(args) if isinstance(x, Tensor)}
        bases = {i: self._placed(x.base) for i, x in enumerate(args) if hasattr(x, "block_shape")}
        if not self.clear:
            return
        step = _launch(compiled, (*grid, 1, 1)[:3], args, tensors, bases)
        self.steps.append((step, _indices([*tensors.values(), *bases.values()])))

    def plan(self, found: Any) -> Plan | None:
        """What was noted, or None if that is not all that was done."""
        flat = found if isinstance(found, tuple) else (found,)
        if not self.clear or self.launches or any(id(x) not in self.place for x in flat):
            return None
        results = tuple(self.place[id(x)] for x in flat)
        last = {index: number for number, (_, used) in enumerate(self.steps) for index in used}
        dead: list[list[int]] = [[] for _ in self.steps]
        for index, number in last.items():
            if index >= self.given and index not in results:
                dead[number].append(index)
        steps = [(step, tuple(gone)) for (step, _), gone in zip(self.steps, dead, strict=True)]
        return Plan(steps, len(self.held) - self.given, results if isinstance(found, tuple) else results[0])

    def _count(self, *_: Any) -> None:
        self.launches += watch() is self

    def _add(self, x: Tensor, index: int | None = None) -> int:
        self.held.append(x)  # held, so that no other tensor gets its identity
        self.place[id(x)] = len(self.held) - 1 if index is None else index
        return self.place[id(x)]

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


def _described(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a plan depends on; None where nothing is repeated."""
    key: list[Any] = []
    index = FIRST_DEVICE - 1
    for x in args:
        if isinstance(x, Tensor):
            index = x.get_device()
            if index < FIRST_DEVICE:
                return None
            key += (index, x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)
        else:
            key.append(tuple(x) if isinstance(x, list) else x)
    if index != current_device():  # Triton launches on the current device
        return None
    if torch.is_autocast_enabled("cuda"):
        key.append("autocast")
    return tuple(key)


def give_context(x: Tensor) -> None:
    """Gives the thread a CUDA context: a launch sees to it itself, but descriptors of tensors are made before.

    Autograd's thread has none where all kernels were loaded by other threads.
    """
    if getattr(_watching, "context", None) is None:
        with _disable_current_modes():
            _watching.context = torch.zeros(1, device=x.device)


def current_device() -> int:
    """Its index; `torch.cuda.current_device` first asks whether CUDA is there, and here a tensor lies on it."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """Of a device, as launches take it."""
    return torch._C._cuda_getCurrentRawStream(device)


def _allocation(index: int, like: Tensor) -> Step:
    size, stride, options = like.shape, like.stride(), {"dtype": like.dtype, "device": like.device}

    def step(places: list[Any]) -> None:
        places[index] = torch.empty_strided(size, stride, **options)

    return step


def _operation(func: Any, given: list[Any], named: dict[str, Any], indices: list[int]) -> Step:
    def step(places: list[Any]) -> None:
        found = func(*_filled(given, places), **{name: _filled(x, places) for name, x in named.items()})
        for index, x in zip(indices, (found,) if isinstance(found, Tensor) else found or (), strict=False):
            places[index] = x

    return step


def _filled(x: Any, places: list[Any]) -> Any:
    """The tensors in the place of their places."""
    if isinstance(x, Place):
        return places[x.index]
    return [_filled(one, places) for one in x] if isinstance(x, list) else x


def _indices(x: Any) -> list[int]:
    """Of all places in nested lists."""
    if isinstance(x, Place):
        return [x.index]
    return [index for one in x for index in _indices(one)] if isinstance(x, list) else []


def _with_base(descriptor: Any, base: Tensor | None) -> Any:
    """The descriptor of another tensor of the same kind; what its class checks was checked for the first."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__, base=base)
    return made


def _launch(compiled: Any, grid: tuple[int, ...], args: Sequence[Any], tensors: dict[int, Place], bases: dict[int, Place]) -> Step:
    """A launch without Triton's Python: nobody listens to launches, so there is nothing to tell."""
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    template = [None if i in tensors else _with_base(x, None) if i in bases else x for i, x in enumerate(args)]
    addressed, described = ([(i, place.index) for i, place in found.items()] for found in (tensors, bases))

    def step(places: list[Any]) -> None:
        own = template.copy()
        for i, index in addressed:
            own[i] = places[index].data_ptr()  # of a tensor Triton would ask the driver where it lies
        if described:
            give_context(places[described[0][1]])
        for i, index in described:
            own[i] = _with_base(own[i], places[index])
        run(*grid, places[-1], function, packed, None, None, None, *own)

    return step
