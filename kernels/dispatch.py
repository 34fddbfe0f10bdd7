"""Which form of an operation runs: its definition, its chunked torch form, or its Triton kernels.

Every operation of this package has up to three forms. `reference` is the token loop that defines it, `chunked` is plain
torch, `triton` are kernels for a CUDA device. Where the plain torch form is the definition itself there are two (`TWO`), and
who forces `reference` gets, and is told, `chunked`. `pick` chooses for each call and says in the log, once, what it took and
why; `use_backend` or the variable MIXER_BENCH_BACKEND forces a form.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.assembler import tensor_core_obstacle
from kernels.backends import BACKENDS, TWO, VARIABLE

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)
_said: set[tuple[str, str, str]] = set()
# Looked up once, without importing Triton: both may be asked for while torch.compile traces.
_has_triton = find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_forced: str | None = None
_seen: dict[str, str] | None = None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one form of every operation inside the block.

    Args:
        name: reference, chunked or triton; None leaves the choice to each call again.

    Raises:
        ValueError: no such form.
    """
    global _forced  # noqa: PLW0603 - one switch for the process, like torch's own backend switches
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


@contextmanager
def watched() -> Iterator[dict[str, str]]:
    """Collects, by operation, the form that the calls inside the block took last."""
    global _seen  # noqa: PLW0603 - one switch for the process
    before, _seen = _seen, {}
    try:
        yield _seen
    finally:
        _seen = before


def pick(
    operation: str,
    sample: Tensor,
    *,
    obstacle: str | None = None,
    backends: tuple[str, ...] = BACKENDS,
    tensor_cores: bool = False,
) -> str:
    """The form that runs a call.

    Args:
        operation: name of the operation, for messages.
        sample: one of its tensors; tells device and dtype.
        obstacle: what keeps this call from the Triton kernels, as "head dim 300 is above 256", or None.
        backends: forms that the operation has.
        tensor_cores: whether its Triton kernels multiply matrices, which not every assembler can be trusted with.

    Returns:
        A member of `backends`.

    Raises:
        ValueError: a form is forced that the operation lacks or that cannot run this call.
    """
    obstacle = _obstacle(sample) or obstacle
    if obstacle is None and tensor_cores and sample.is_cuda and "triton" in backends:
        obstacle = tensor_core_obstacle()
    name = _forced
    if name == "reference" and backends == TWO:
        name, why = "chunked", "plain torch is its definition"
    elif name is not None:
        _refuse_unfit(operation, name, obstacle, backends)
        why = "forced"
    elif "triton" not in backends:
        name, why = "chunked", "the only fast form"
    elif sample.is_cuda and obstacle is None:
        name, why = "triton", f"{sample.dtype} on a CUDA device"
    else:
        name, why = "chunked", obstacle or "not on a CUDA device"
    # A log call would break the graph of torch.compile, which traces this function.
    if not torch.compiler.is_compiling():
        if _seen is not None:
            _seen[operation] = name
        _say_once(operation, name, why, slow=sample.is_cuda and name != "triton" and "triton" in backends)
    return name


def _obstacle(sample: Tensor) -> str | None:
    """What keeps any call with such a tensor from Triton kernels."""
    if not _has_triton:
        return "the package triton is not installed"
    if not sample.is_cuda and not _interpreted:
        return f"tensors are on {sample.device.type}, not on a CUDA device"
    if sample.dtype not in TRITON_DTYPES:
        return f"dtype {sample.dtype} is not float32, bfloat16 or float16"
    return None


def _refuse_unfit(operation: str, name: str, obstacle: str | None, backends: tuple[str, ...]) -> None:
    if name not in backends:
        raise ValueError(f"{operation} has no form {name!r}; it has {', '.join(backends)}")
    if name == "triton" and obstacle is not None:
        raise ValueError(f"{operation}: the backend 'triton' is forced, but {obstacle}; use 'chunked' or leave the choice open")


def _say_once(operation: str, name: str, why: str, *, slow: bool) -> None:
    if (operation, name, why) not in _said:
        _said.add((operation, name, why))
        _log.log(logging.WARNING if slow else logging.INFO, "%s runs its %s form: %s", operation, name, why)


def _checked(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{where}: there is no backend {name!r}; there are {', '.join(BACKENDS)}")
    return name


_forced = _checked(os.environ.get(VARIABLE) or None, VARIABLE)
