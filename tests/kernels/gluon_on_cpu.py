"""Runs Gluon kernels for Hopper as Python on torch tensors, for Triton's interpreter knows no Gluon.

A partition of a program is followed by one thread, so barriers between its threads are beyond it. What it does follow is time:
a copy into shared memory arrives when its barrier is waited for, a copy out of it and a product read when they are waited for,
and what is written by threads is seen by neither before a fence. Shared memory starts as NaN, and so does a buffer that a copy
is on its way to: whoever reads too early or writes too early is found by a wrong result. Of the partitions one runs at a time,
until it waits for another or ends.
"""

from __future__ import annotations

import threading
import types
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from torch import Tensor

from tests.kernels.gluon_functions import functions
from tests.kernels.gluon_memory import Barrier, Descriptor, Pointer, Shared


class Program:
    """The built-in functions of one program, as modules `gl`, `tma`, `mbarrier` and the functions beside them."""

    def __init__(self, index: int, programs: int):
        self.unfenced: set[int] = set()
        self.own = threading.local()
        self.turn = threading.Condition()
        self.alive, self.failed = 1, []
        self.gl = types.SimpleNamespace(
            **functions(index, programs),
            load=self.load,
            store=self.store,
            inline_asm_elementwise=self.ask,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
        )
        self.async_copy = types.SimpleNamespace(
            async_copy_global_to_shared=self.ask_for, commit_group=self.commit, wait_group=self.wait_group
        )
        self.tma = types.SimpleNamespace(
            async_copy_global_to_shared=self.copy_in, async_copy_shared_to_global=self.copy_out, store_wait=self.store_wait
        )
        self.mbarrier = types.SimpleNamespace(
            init=lambda bar, count: setattr(bar, "count", count),
            expect=self.expect,
            wait=self.wait,
            arrive=self.arrive,
            MBarrierLayout=lambda: "barrier",
        )

    @property
    def products(self) -> list[dict[str, Any]]:
        """Products of this partition that run."""
        return self.own.__dict__.setdefault("products", [])

    @property
    def seen(self) -> dict[int, int]:
        """The parity for which this partition waited last, by barrier."""
        return self.own.__dict__.setdefault("seen", {})

    @property
    def groups(self) -> list[list[Any]]:
        """Copies of this partition's threads into shared memory that run, by group; the last one is open."""
        return self.own.__dict__.setdefault("groups", [[]])

    @property
    def stores(self) -> list[Any]:
        """Copies out of shared memory of this partition that run."""
        return self.own.__dict__.setdefault("stores", [])

    def specialize(self, partitions: list[tuple[Any, tuple[Any, ...]]], *_: Any) -> None:
        """Runs the partitions of a program, taking turns."""

        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            with self.turn, torch.no_grad():
                try:
                    function(*arguments)
                    self.check()
                except BaseException as error:
                    self.failed.append(error)
                self.alive -= 1
                self.turn.notify_all()

        self.alive = len(partitions)
        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.alive = 1
        if self.failed:
            raise self.failed[0]

    def check(self) -> None:
        """What has to be waited for before a partition ends."""
        assert not self.stores, "a copy that nobody waited for"
        assert not self.products, "a product that nobody waited for"
        assert not any(self.groups), "a copy into shared memory that nobody waited for"

    @staticmethod
    def load(where: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
        at = torch.as_tensor(where.at)
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
        if not where.flat.numel():
            assert not mask.any(), "reads what there is not"
            return torch.full(mask.shape, other, dtype=torch.float64)
        return torch.where(mask, where.flat[torch.where(mask, at, 0)].double(), other)

    @staticmethod
    def ask(code: str, _: str, where: list[Pointer], **__: Any) -> None:
        """Kernels run one after the other; lines that are asked for have no values, but addresses."""
        if code.startswith("griddepcontrol"):
            return
        assert code.startswith("prefetch.global")
        at = torch.as_tensor(where[0].at)
        assert ((at >= 0) & (at < where[0].flat.numel())).all(), "asks for what there is not"

    @staticmethod
    def store(where: Pointer, x: Any, mask: Any = True) -> None:
        at, mask, x = torch.broadcast_tensors(where.at, *(torch.as_tensor(y) for y in (mask, x)))
        where.flat[at[mask]] = x[mask].to(where.flat.dtype)

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if layout == "barrier":
            bars = [Barrier() for _ in range(shape[0])]
            return types.SimpleNamespace(index=bars.__getitem__)
        return Shared(torch.full(shape, float("nan"), dtype=torch.float64), self.unfenced, 4 if dtype == torch.float32 else 2)

    def fence(self) -> None:
        self.unfenced.clear()

    @staticmethod
    def expect(bar: Barrier, size: int) -> None:
        assert not bar.expected, "two phases at once"
        bar.expected, bar.filled = size, True

    def copy_in(self, source: Descriptor, at: list[Any], bar: Barrier, target: Shared) -> None:
        target.x.fill_(float("nan"))
        bar.copies.append((source, at, target))
        self.wake()

    def ask_for(self, target: Shared, where: Pointer, mask: Any = None) -> None:
        target.x.fill_(float("nan"))
        self.groups[-1].append((target, self.load(where, mask)))

    def commit(self) -> None:
        self.groups.append([])

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending + 1:
            for target, x in self.groups.pop(0):
                target.x.copy_(x)

    def wake(self) -> None:
        """Lets partitions that wait look again."""
        with self.turn:
            self.turn.notify_all()

    def arrive(self, bar: Barrier, *, count: int = 1, pred: Any = True) -> None:
        assert count == 1
        if not pred:
            return
        bar.arrived += 1
        if bar.arrived == bar.count:
            bar.arrived, bar.phase = 0, bar.phase + 1
            self.wake()

    def wait(self, bar: Barrier, phase: Any) -> None:
        parity, before = int(phase), self.seen.get(id(bar), 1 if bar.filled else None)
        assert before is None or parity != before, "a phase is waited for by who has not seen the one before"
        self.seen[id(bar)] = parity
        while not bar.copies and int(phase) == bar.phase % 2:
            assert self.alive > 1 and self.turn.wait(timeout=20), "waits for what nobody brings"
        if not bar.copies:
            return
        assert int(phase) == bar.phase % 2, "waits for another phase"
        assert bar.expected == sum(target.size * target.x.numel() for *_, target in bar.copies), "bytes"
        for source, at, target in bar.copies:
            target.x.zero_()
            part, block = source.inside(at, target.x)
            block.copy_(part)
        bar.copies, bar.expected, bar.phase = [], 0, bar.phase + 1
        self.wake()

    def copy_out(self, target: Descriptor, at: list[Any], source: Shared) -> None:
        self.stores.append((target, at, source.of_accelerators()))

    def store_wait(self, pending: int) -> None:
        while len(self.stores) > pending:
            target, at, source = self.stores.pop(0)
            part, block = target.inside(at, source)
            part.copy_(block)

    def product(self, a: Any, b: Shared, sums: Any, *, use_acc: bool = True, is_async: bool = False) -> dict[str, Any]:
        assert is_async
        operands = [x.of_accelerators() if isinstance(x, Shared) else x for x in (a, b)]
        self.products.append({"operands": operands, "sums": sums if use_acc else None, "done": None})
        return self.products[-1]

    @staticmethod
    def small_product(a: Tensor, b: Tensor, sums: Tensor, input_precision: str | None = None) -> Tensor:
        return a.double() @ b.double() + sums

    def products_wait(self, pending: int, results: list[Any]) -> Any:
        while len(self.products) > pending:
            one = self.products.pop(0)
            sums = one["sums"]
            sums = sums["done"] if isinstance(sums, dict) else sums
            made = one["operands"][0] @ one["operands"][1]
            one["done"] = made if sums is None else made + sums
        values = [x["done"] if isinstance(x, dict) and x["done"] is not None else x for x in results]
        return values[0] if len(values) == 1 else tuple(values)


class OnCpu:
    """A Gluon kernel that is launched like the real one; its functions are those of the modules."""

    def __init__(self, kernel: Any, modules: tuple[types.ModuleType, ...]):
        self.kernel, self.modules = kernel, modules

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **constants: Any) -> None:
            named = {name: _argument(x) for name, x in zip(self.kernel.arg_names, arguments, strict=False)}
            constants |= dict.fromkeys(("DOT", "MERGE"), torch.float64)
            named |= {name: x for name, x in constants.items() if name in self.kernel.arg_names}
            for index in range(grid[0]):
                self._run(Program(index, grid[0]), named)

        return run

    def _run(self, program: Program, arguments: dict[str, Any]) -> None:
        names = {
            "gl": program.gl, "tma": program.tma, "mbarrier": program.mbarrier, "fence_async_shared": program.fence,
            "warpgroup_mma": program.product, "warpgroup_mma_wait": program.products_wait, "mma_v2": program.small_product,
            "async_copy": program.async_copy, "thread_barrier": lambda: None,
            "gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None,
        }  # fmt: skip
        with ExitStack() as patches:
            for module in self.modules:
                for name, x in {**vars(module), **{name: x for name, x in names.items() if hasattr(module, name)}}.items():
                    if name in names or isinstance(x, tl.constexpr) or callable(getattr(x, "fn", None)):
                        patches.enter_context(patch.object(module, name, getattr(x, "value", getattr(x, "fn", x))))
            self.kernel.fn(**arguments)
        program.check()


def _argument(x: Any) -> Any:
    """What a kernel makes of an argument."""
    if isinstance(x, Tensor):
        size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return Pointer(x.detach().as_strided((size,), (1,)))
    return torch.tensor(x) if isinstance(x, int) else x
