"""Cases of the Triton decoding step, for the interpreter and for a GPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kernels.dispatch import use_backend
from kernels.reference import dplr_reference, linear_recurrence_reference
from kernels.step import recurrent_step, states_in_place
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = ((1, 1, 1, 1, 1), (2, 2, 4, 20, 33), (1, 3, 3, 16, 40), (3, 1, 2, 72, 5))
"""Batch, groups, heads, key width and value width: whole and broken tiles, shared keys."""

GATES = ("none", "constant", "scalar", "vector", "strong", "zero")
OPTIONS = tuple(itertools.product(GATES, (False, True)))
"""Kind of decay, and whether there is a delta rule."""


def draw(
    shape: tuple[int, ...], gate: str, *, delta: bool, device: str, dtype: torch.dtype, state: torch.dtype
) -> dict[str, Tensor]:
    """Inputs as mixers have them: q, k and v slices of one projection, gates in fp32."""
    batch, groups, heads, k_dim, v_dim = shape
    qkv = torch.randn(batch, 2 * groups * k_dim + heads * v_dim).to(device, dtype)
    q, k, v = qkv.split((groups * k_dim, groups * k_dim, heads * v_dim), -1)
    tensors = {"q": q.unflatten(-1, (groups, -1)), "k": k.unflatten(-1, (groups, -1)) * k_dim**-0.5}
    tensors |= {"v": v.unflatten(-1, (heads, -1)), "state": torch.randn(batch, heads, k_dim, v_dim).to(device, state)}
    rates = torch.randn(batch, heads, k_dim).abs()
    decays = {"constant": -rates[0, :, 0], "scalar": -rates[..., 0], "vector": -rates, "strong": -10 * torch.rand_like(rates)}
    decays["zero"] = 0 * rates
    if gate != "none":
        tensors["log_decay"] = decays[gate].to(device)
    if delta:
        tensors["beta"] = torch.rand(batch, heads).to(device)
    return tensors


def with_rank_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with vectors of a rank-one transition, as RWKV-7 makes them."""
    like = tensors["state"][..., 0].float()
    b = torch.nn.functional.normalize(torch.randn_like(like), dim=-1)
    return tensors | {"a": -torch.rand_like(like) * b, "b": b}


def step(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The operation on named tensors."""
    q, k, v, state = (tensors[name] for name in ("q", "k", "v", "state"))
    rank_one = (tensors["a"], tensors["b"]) if "a" in tensors else None
    o, new = recurrent_step(q, k, v, state, log_decay=tensors.get("log_decay"), beta_BH=tensors.get("beta"), rank_one=rank_one)
    return {"o": o, "state": new}


def definition(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The token loop over one token, in fp64."""
    exact = {name: x.double().cpu() for name, x in tensors.items()}
    decay, beta = exact.get("log_decay"), exact.get("beta")
    decay = decay if decay is None or decay.ndim == 1 else decay[:, None]
    q, k, v = (exact[name][:, None] for name in ("q", "k", "v"))
    if "a" in exact:
        a, b = exact["a"][:, None], exact["b"][:, None]
        o, new = dplr_reference(q, k, v, a, b, log_decay_BTHK=decay, state_BHKV=exact["state"])
        return {"o": o[:, 0], "state": new}
    o, new = linear_recurrence_reference(
        q, k, v, log_decay=decay, beta_BTH=None if beta is None else beta[:, None], state_BHKV=exact["state"]
    )
    return {"o": o[:, 0], "state": new}


def check(
    shape: tuple[int, ...], option: tuple[str, bool], device: str, dtype: torch.dtype, state: torch.dtype = torch.float32
) -> None:
    """One option; see `check_tensors`."""
    check_tensors(draw(shape, option[0], delta=option[1], device=device, dtype=dtype, state=state))


def check_rank_one(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    """RWKV-7's transition, which has a vector decay and a head of q and k for each of v."""
    own = (shape[0], shape[2], *shape[2:])
    check_tensors(with_rank_one(draw(own, "vector", delta=False, device=device, dtype=dtype, state=torch.float32)))


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """Output and state against fp64, as a new tensor and in place; only the latter changes the given state."""
    dtype, state = tensors["v"].dtype, tensors["state"].dtype
    want, before = definition(tensors), tensors["state"].clone()
    tolerance = SINGLE if dtype == state == torch.float32 else SIXTEEN_BIT
    with use_backend("triton"), poisoned():
        got = step(tensors)
        assert (got["o"].dtype, got["state"].dtype) == (dtype, state)
        assert torch.equal(tensors["state"], before)
        require_close(got, want, tolerance)
        with torch.no_grad(), states_in_place():
            again = step(tensors)
    assert again["state"] is tensors["state"]
    for name, tensor in got.items():
        assert torch.equal(tensor, again[name]), name
