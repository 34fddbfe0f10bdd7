"""Cases of the recurrences with a decay per key channel, for the interpreter and for a GPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.dispatch import use_backend
from kernels.dplr import dplr_recurrence
from kernels.recurrence import linear_recurrence
from kernels.reference import dplr_reference, linear_recurrence_reference
from tests.kernels.oracle import poisoned, require_close, rms_error

NARROW = ("q", "k", "v", "a", "b")
GATES = {"zero": 0.0, "weak": 0.1, "middle": 3.0, "strong": 10.0, "abrupt": 1e5}
"""Log decays are drawn between 0 and the negative of these."""
GATES_OF_PAIRS = [gate for gate in GATES if gate != "abrupt"]
"""Those of diagonal plus rank one, see docs/log.md on decays that are stronger."""
SINGLE = {"log_decay": 5e-5, "log_decay_BTHK": 5e-5, "beta_BTH": 2e-5, "other": 1e-5}
SIXTEEN_BIT = {"o": 5e-3, "final": 5e-3, "log_decay": 2e-2, "log_decay_BTHK": 2e-2, "beta_BTH": 2e-2, "other": 5e-3}
SIXTEEN_BIT_DELTA = SIXTEEN_BIT | {"other": 8e-3}


def draw(
    shape: tuple[int, int, int, int, int], gate: str, *, delta: bool, state: bool, leading: tuple[int, ...] = (), seed: int = 0
) -> dict[str, Tensor]:
    """Inputs in fp32, by name; keys have unit length, and beta is 0, 1 or between."""
    batch, length, heads, k_dim, v_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*leading, batch, *size, generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*leading, batch, *size, generator=generator)

    tensors = {
        "q": normal(length, heads, k_dim) * k_dim**-0.5,
        "k": normalize(normal(length, heads, k_dim), dim=-1),
        "v": normal(length, heads, v_dim),
        "log_decay": -GATES[gate] * uniform(length, heads, k_dim),
    }
    if gate == "strong":
        tensors["log_decay"][..., ::7, :, ::3] = 0  # strong and absent decays beside each other
        tensors["log_decay"][..., 1] = -GATES[gate]
    if delta:
        tensors["beta_BTH"] = (1.5 * uniform(length, heads) - 0.25).clamp(0, 1)
    if state:
        tensors["state_BHKV"] = normal(heads, k_dim, v_dim)
    return tensors


def draw_dplr(shape: tuple[int, int, int, int, int], gate: str, *, state: bool) -> dict[str, Tensor]:
    """Inputs of RWKV-7's transition: b of unit length, a = -b times rates between 0 and 1."""
    tensors = draw(shape, gate, delta=False, state=state)
    b = tensors["k"].roll(1, dims=1)
    first, last = ({name: tensors[name] for name in names if name in tensors} for names in (("q", "k", "v"), ("state_BHKV",)))
    rates = torch.rand(b.shape, generator=torch.Generator().manual_seed(2))
    return first | {"a": -b * rates, "b": b, "log_decay_BTHK": tensors["log_decay"]} | last


def call(function, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Outputs, and the final state if there is a first one."""
    narrow = [tensors[name] for name in NARROW if name in tensors]
    o, final = function(*narrow, **{name: x for name, x in tensors.items() if name not in NARROW})
    return (o, final) if "state_BHKV" in tensors else (o,)


def with_gradients(function, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of a random functional of them, by name of the input."""
    outputs = call(function, tensors)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.device) for x in outputs]
    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    total = sum((x.to(wide) * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, list(tensors.values()))
    return dict(zip(("o", "final"), outputs, strict=False)) | dict(zip(tensors, grads, strict=True))


def check_dplr(shape: tuple[int, int, int, int, int], gate: str, device: str, dtype: torch.dtype, *, state: bool) -> None:
    """As `check`, for diagonal plus rank one."""
    _compare(dplr_recurrence, dplr_reference, draw_dplr(shape, gate, state=state), device, dtype, SIXTEEN_BIT_DELTA)


def check(shape: tuple[int, int, int, int, int], gate: str, device: str, dtype: torch.dtype, *, delta: bool, state: bool) -> None:
    """Outputs, states and all gradients against the token loop in fp64, and on a GPU a second run equal to the bit."""
    drawn, tolerance = draw(shape, gate, delta=delta, state=state), SIXTEEN_BIT_DELTA if delta else SIXTEEN_BIT
    _compare(linear_recurrence, linear_recurrence_reference, drawn, device, dtype, tolerance)


def _compare(function, definition, drawn: dict[str, Tensor], device: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    rounded = {name: x.to(dtype if name in NARROW else torch.float32) for name, x in drawn.items()}
    leaves = {name: x.to(device).requires_grad_() for name, x in rounded.items()}
    with use_backend("triton"), poisoned():
        got = with_gradients(function, leaves)
        again = with_gradients(function, leaves) if device == "cuda" else got
    true = with_gradients(definition, {name: x.double().requires_grad_() for name, x in rounded.items()})
    for name, x in again.items():
        assert torch.equal(x, got[name]), f"{name} differs from run to run"
    assert got["o"].dtype == got["q"].dtype == dtype
    require_close(got, true, SINGLE if dtype == torch.float32 else tolerance)


def check_split(cuts: tuple[int, ...], device: str, dtype: torch.dtype, *, delta: bool) -> None:
    """A sequence in pieces, each continuing from the state of the one before, equals the whole."""
    drawn = draw((1, cuts[-1], 2, 16, 24), "weak", delta=delta, state=True)
    tensors = {name: x.to(device, dtype if name in NARROW else torch.float32) for name, x in drawn.items()}
    state, pieces = tensors.pop("state_BHKV"), []
    with use_backend("triton"), poisoned():
        whole, final = call(linear_recurrence, tensors | {"state_BHKV": state})
        for start, stop in itertools.pairwise(cuts):
            part = {name: x[:, start:stop] for name, x in tensors.items()}
            piece, state = call(linear_recurrence, part | {"state_BHKV": state})
            pieces.append(piece)
    # both are rounded: neither is the truth, from which each may be SIXTEEN_BIT["o"] away
    tolerance = 1e-5 if dtype == torch.float32 else 2**0.5 * SIXTEEN_BIT["o"]
    assert rms_error(torch.cat(pieces, 1), whole) <= tolerance
    assert rms_error(state, final) <= tolerance


def check_members(device: str, *, delta: bool) -> None:
    """Members with inputs of their own are one call and equal the loop, forward and backward."""
    drawn = draw((2, 18, 1, 16, 16), "weak", delta=delta, state=True, leading=(2,))
    leaves = {name: x.to(device).requires_grad_() for name, x in drawn.items()}
    names = list(leaves)

    def member(*values: Tensor) -> tuple[Tensor, ...]:
        return call(linear_recurrence, dict(zip(names, values, strict=True)))

    with use_backend("triton"), poisoned():
        together = torch.vmap(member)(*leaves.values())
        alone = [torch.stack(parts) for parts in zip(*(member(*own) for own in zip(*leaves.values(), strict=True)), strict=True)]
        found = [torch.autograd.grad(sum(x.square().sum() for x in o), list(leaves.values())) for o in (together, alone)]
    torch.testing.assert_close(list(together), alone)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def check_nested_gradients(device: str) -> None:
    """`torch.func.grad` below vmap, with keys that the members share."""
    tensors = {name: x.to(device) for name, x in draw((1, 18, 1, 16, 16), "weak", delta=True, state=False).items()}
    queries = torch.randn(2, *tensors["q"].shape, device=device)

    def loss(q: Tensor) -> Tensor:
        return call(linear_recurrence, tensors | {"q": q})[0].square().sum()

    with use_backend("triton"):
        for member, q in zip(torch.vmap(torch.func.grad(loss))(queries), queries, strict=True):
            torch.testing.assert_close(member, torch.func.grad(loss)(q), rtol=1e-4, atol=1e-5)
