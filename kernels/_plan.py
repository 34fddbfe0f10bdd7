"""What a call did, written out as a Python function of its own: allocations, torch operators and launches, and nothing else.

A list of steps that is interpreted costs a call, a copy of arguments and look-ups for each of them; written out, a launch is
one call with addresses and constants in their places. What only launches see need not be a tensor: views are addresses with an
offset, and small temporaries share one allocation. Descriptors for the tensor memory accelerator are encoded once an address.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels._descriptors import Described, Encoder, Place

SMALL = 1 << 25
"""Bytes of temporaries up to which they share one allocation; more are given back one by one, as soon as nobody reads them."""
ALIGNED = 256
"""Bytes on which each of them starts."""
LITERALS = (int, bool, str, type(None))


class Allocation(NamedTuple):
    """An unwritten tensor like another one."""

    at: int
    like: Tensor


class Operation(NamedTuple):
    """A call of a torch operator, with places for tensors; what it returns goes to `indices`."""

    func: Any
    given: list[Any]
    named: dict[str, Any]
    indices: list[int]


class View(NamedTuple):
    """A tensor in the memory of another one, so many bytes behind its start, and the operator that made it."""

    at: int
    of: int
    offset: int
    made: Operation


class Launch(NamedTuple):
    """A launch of a compiled kernel, with places and descriptions for tensors."""

    compiled: Any
    grid: tuple[int, ...]
    args: list[Any]


Step = Allocation | Operation | View | Launch


class Plan(NamedTuple):
    """What a call of one description does.

    Args:
        run: gets a stream and the arguments, and returns what the call does.
        source: its text.
    """

    run: Callable[..., Any]
    source: str


def written(steps: Sequence[Step], n_args: int, results: int | tuple[int, ...]) -> Plan:
    """A function that does what the steps say.

    Args:
        steps: in order.
        n_args: how many places are arguments.
        results: the place of the result, or those of a tuple of results.
    """
    return _Writer(steps, n_args, (results,) if isinstance(results, int) else results).plan(single=isinstance(results, int))


class _Writer:
    """Makes the text of one function."""

    def __init__(self, steps: Sequence[Step], n_args: int, results: tuple[int, ...]) -> None:
        self.steps, self.n_args, self.results = steps, n_args, results
        self.known: dict[str, Any] = {"torch": torch}
        self.lines: list[str] = []
        self.roots = {step.at: (step.of, step.offset) for step in steps if isinstance(step, View)}
        self.tensors = self._tensors()
        self.shared = self._shared()
        self.addressed: set[int] = set()

    def plan(self, *, single: bool) -> Plan:
        """See `written`."""
        last = self._last_uses()
        sizes = {index: like.untyped_storage().nbytes() for index, like in self._allocated() if index in self.shared}
        if sum(sizes.values()):
            first = next(like for index, like in self._allocated() if index in sizes)
            total = max(self.shared[index] + size for index, size in sizes.items())
            self.lines.append(f"shared = {self._empty((total,), (1,), torch.uint8, first.device)}")
            self.lines.append("s = shared.data_ptr()")
        for number, step in enumerate(self.steps):
            self._write(step)
            self.lines += [f"del t{index}" for index, at in last.items() if at == number]
        found = ", ".join(f"t{index}" for index in self.results)
        self.lines.append(f"return {found}" if single else f"return ({found},)")
        head = ", ".join(["stream", *(f"t{index}" for index in range(self.n_args))])
        source = f"def run({head}):\n" + "".join(f"    {line}\n" for line in self.lines)
        exec(compile(source, "<plan>", "exec"), self.known)
        return Plan(self.known["run"], source)

    def _allocated(self) -> list[tuple[int, Tensor]]:
        return [(step.at, step.like) for step in self.steps if isinstance(step, Allocation)]

    def _tensors(self) -> set[int]:
        """What has to be a tensor: results, and what torch operators see."""
        found = set(self.results)
        for step in reversed(self.steps):
            operation = step.made if isinstance(step, View) and step.at in found else step
            if isinstance(operation, Operation):
                found |= set(_places([operation.given, *operation.named.values()]))
        return found

    def _shared(self) -> dict[int, int]:
        """Places of temporaries in their one allocation; too large ones have each their own."""
        sizes = {index: like.untyped_storage().nbytes() for index, like in self._allocated() if index not in self.tensors}
        if sum(sizes.values()) > SMALL:
            sizes = {index: 0 for index, size in sizes.items() if not size}
        starts, at = {}, 0
        for index, size in sizes.items():
            starts[index] = at
            at += -(-size // ALIGNED) * ALIGNED
        return starts

    def _last_uses(self) -> dict[int, int]:
        """By tensor that is not returned, the number of the last step that reads or makes it."""
        found: dict[int, int] = {}
        kept = {self._root(index)[0] for index in self.results} | set(self.results)
        for number, step in enumerate(self.steps):
            used = set(_places(list(step)))
            used |= {self._root(index)[0] for index in used}
            made = step.indices if isinstance(step, Operation) else [step.at] if isinstance(step, Allocation | View) else []
            found |= dict.fromkeys([*used, *made], number)
        is_tensor = {index for index, _ in self._allocated()} - set(self.shared) | self.tensors
        is_tensor |= {index for step in self.steps if isinstance(step, Operation) for index in step.indices}
        return {index: at for index, at in found.items() if index >= self.n_args and index in is_tensor and index not in kept}

    def _root(self, index: int) -> tuple[int, int]:
        """The tensor in whose memory one lies, and how many bytes behind its start."""
        offset = 0
        while index in self.roots:
            index, more = self.roots[index]
            offset += more
        return index, offset

    def _write(self, step: Step) -> None:
        if isinstance(step, Allocation):
            if step.at not in self.shared:
                like = step.like
                self.lines.append(f"t{step.at} = {self._empty(tuple(like.shape), like.stride(), like.dtype, like.device)}")
        elif isinstance(step, View):
            if step.at in self.tensors:
                self._write(step.made)
        elif isinstance(step, Operation):
            given = [self._text(x) for x in step.given] + [f"{name}={self._text(x)}" for name, x in step.named.items()]
            targets = "".join(f"t{index}, " for index in step.indices)
            single = len(step.func._schema.returns) == 1 and str(step.func._schema.returns[0].type) == "Tensor"
            made = f"{targets.rstrip(', ') if single else targets.rstrip(' ')} = " if targets else ""
            self.lines.append(f"{made}{self._name(step.func)}({', '.join(given)})")
        else:
            self._launch(step)

    def _launch(self, step: Launch) -> None:
        """A launch without Triton's Python where its C function is known: nobody listens, so there is nothing to tell."""
        launcher, compiled = step.compiled.run, step.compiled
        metas = list(getattr(getattr(compiled, "metadata", None), "tensordesc_meta", None) or ())
        is_encoded = len(metas) == sum(isinstance(x, Described) for x in step.args)
        direct = _c_function(launcher) if is_encoded else None
        args = []
        for x in step.args:
            if isinstance(x, Place):
                args.append(self._address(x.at))
            elif isinstance(x, Described):
                encoder, address = Encoder(x, metas.pop(0) if direct else None), self._address(x.base.at)
                args.append(f"*({self._name(encoder.known)}.get({address}) or {self._name(encoder.encode)}({address}))")
            else:
                args.append(self._text(x))
        head = [str(size) for size in step.grid]
        head += ["stream", self._name(compiled.function)]
        packed = self._name(compiled.packed_metadata)
        if direct is not None:
            head += [self._text(launcher.launch_cooperative_grid), self._text(launcher.launch_pdl), "None", "None"]
        head += [packed, "None", "None", "None"]
        self.lines.append(f"{self._name(launcher if direct is None else direct)}({', '.join([*head, *args])})")

    def _address(self, index: int) -> str:
        root, offset = self._root(index)
        if root in self.shared:
            size = next(like.untyped_storage().nbytes() for at, like in self._allocated() if at == root)
            return f"s + {self.shared[root] + offset}" if size else "0"
        if root not in self.addressed:
            self.addressed.add(root)
            self.lines.append(f"p{root} = t{root}.data_ptr()")
        return f"p{root} + {offset}" if offset else f"p{root}"

    def _empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
        return f"torch.empty_strided({size}, {stride}, dtype={dtype}, device={self._name(device)})"

    def _text(self, x: Any) -> str:
        """An argument of a torch operator, or a number of a launch."""
        if isinstance(x, Place):
            return f"t{x.at}"
        if isinstance(x, list):
            return f"[{', '.join(self._text(one) for one in x)}]"
        return repr(x) if type(x) in LITERALS else self._name(x)

    def _name(self, x: Any) -> str:
        """A name that the function knows it by."""
        found = next((name for name, known in self.known.items() if known is x), f"k{len(self.known)}")
        self.known[found] = x
        return found


def _places(x: Any) -> list[int]:
    """Of all tensors in nested lists and steps."""
    if isinstance(x, Place):
        return [x.at]
    if isinstance(x, dict):
        return _places(list(x.values()))
    return [index for one in x for index in _places(one)] if isinstance(x, (list, Described, Operation)) else []


def _c_function(launcher: Any) -> Any:
    """What Triton 3.6 built in C for a launch; None where more belongs to it: room that Triton allocates, another version."""
    launch = getattr(launcher, "launch", None)
    if launch is None or hasattr(launcher, "arg_annotations") or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    return inspect.getclosurevars(launch).nonlocals.get("launcher") if inspect.isfunction(launch) else launch
