"""Public implementations of the timed kernels: flash-linear-attention and others where they are installed, and torch's attention.

Each is called as its documentation says, with the scale that makes it the same function as ours, and is autotuned at the
shape that is timed: the check of its results comes after its timing, because the first shape seen decides.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from bench.throughput.names import KernelName
from bench.throughput.problem import Function, Tensors


class PublicPeer(NamedTuple):
    """A peer of one kernel.

    Args:
        name: as its users know it.
        package: the distribution that brings it.
        function: from our inputs to our outputs.
        modes: what it can do.
        equals: what the function is by our definition and inputs; None if it is our definition itself.
    """

    name: str
    package: str
    function: Function
    modes: tuple[str, ...]
    equals: Callable[[Function, Tensors], Tensors] | None = None


TRAIN = ("forward", "train")
FLA = "fla-core"
FLASH_QLA = "FLA_FLASH_QLA"
"""fla's switch for handing gated delta rules to FlashQLA, where that is installed; here both are timed, under their own names."""


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peers_of(kernel: KernelName, mode: str) -> list[PublicPeer]:
    """The installed peers of a kernel in a mode."""
    return [peer for peer in PEERS.get(kernel, ()) if mode in peer.modes and installed(peer.package) is not None]


def _fla(module: str, name: str, *gates: str, **options: Any) -> PublicPeer:
    """A function of fla on [B, T, H, D] with its own names for the gates, as "g=log_decay"."""
    is_step = name.startswith("fused_recurrent")
    pairs = [gate.split("=") for gate in gates]

    def function(own: Tensors) -> Tensors:
        os.environ.setdefault(FLASH_QLA, "0")
        operation: Callable[..., Any] = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        named = {theirs: own[ours] for theirs, ours in pairs}
        if "state" in own:
            named["initial_state"] = own["state"]
        kept = {"output_final_state": True} if is_step else {}
        found = operation(own["q"], own["k"], own["v"], **{"scale": 1.0, **named, **kept, **options})
        o, state = found if isinstance(found, tuple) else (found, None)
        return {"o": o} if state is None or "state" not in own else {"o": o, "state": state}

    told = "".join(f" {option}" for option, value in options.items() if value is True)
    return PublicPeer(name + told, FLA, function, ("decode",) if is_step else TRAIN)


def _flash_qla(own: Tensors) -> Tensors:
    """For keys and values of 128; it refuses others."""
    operation: Callable[..., Any] = importlib.import_module("flash_qla").chunk_gated_delta_rule
    return {"o": operation(own["q"], own["k"], own["v"], own["log_decay"], own["beta"], scale=1.0)[0]}


def _blocks(own: Tensors) -> Tensors:
    operation: Callable[..., Any] = importlib.import_module("fla.ops.nsa").parallel_nsa
    q, k, v = (own[name].transpose(1, 2) for name in ("q", "k", "v"))
    return {"o": operation(q, k, v, block_indices=own["blocks"], block_size=64).transpose(1, 2)}


def _ssd(own: Tensors) -> Tensors:
    """Mamba-2's scan with a rate of -1, so that its time steps are our log decays."""
    operation: Callable[..., Any] = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    rate = own["log_decay"].new_full(own["log_decay"].shape[-1:], -1.0)
    return {"o": operation(own["v"], -own["log_decay"], rate, own["k"], own["q"], chunk_size=256)}


def _with_time_steps(definition: Function, own: Tensors) -> Tensors:
    """Mamba-2 multiplies its values by the time steps."""
    return definition(own | {"v": own["v"] * -own["log_decay"][..., None]})


def _sdpa(own: Tensors) -> Tensors:
    q, k, v = own["q"], own["k"], own["v"]
    return {"o": F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)}


@lru_cache(maxsize=1)
def _compiled_flex(shape: torch.Size, gradients: bool) -> Any:
    """Compiled anew for each shape: after eight of them torch.compile would go on without compiling, and not say so."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(length: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < window)

    return create_block_mask(visible, None, None, length, length, device=device)


def _flex_window(own: Tensors) -> Tensors:
    q, k, v = own["q"], own["k"], own["v"]
    compiled = _compiled_flex(q.shape, torch.is_grad_enabled())
    return {"o": compiled(q, k, v, block_mask=_block_mask(q.shape[2], 128, q.device))}


PEERS: dict[KernelName, tuple[PublicPeer, ...]] = {
    "linear": (
        _fla("linear_attn", "chunk_linear_attn", normalize=False),
        _fla("linear_attn", "fused_chunk_linear_attn", normalize=False),
        _fla("linear_attn", "fused_recurrent_linear_attn"),
    ),
    "constant_decay": (
        _fla("retention", "chunk_retention"),
        _fla("simple_gla", "fused_chunk_simple_gla", "g_gamma=log_decay"),
        _fla("retention", "fused_recurrent_retention"),
    ),
    "scalar_decay": (
        _fla("simple_gla", "chunk_simple_gla", "g=log_decay"),
        _fla("simple_gla", "fused_chunk_simple_gla", "g=log_decay"),
        _fla("simple_gla", "fused_recurrent_simple_gla", "g=log_decay"),
    ),
    "ssd": (PublicPeer("mamba_chunk_scan_combined", "mamba-ssm", _ssd, TRAIN, _with_time_steps),),
    "delta": (
        _fla("delta_rule", "chunk_delta_rule", "beta=beta"),
        _fla("delta_rule", "fused_recurrent_delta_rule", "beta=beta"),
    ),
    "gated_delta": (
        _fla("gated_delta_rule", "chunk_gated_delta_rule", "g=log_decay", "beta=beta"),
        _fla("gated_delta_rule", "fused_recurrent_gated_delta_rule", "g=log_decay", "beta=beta"),
        PublicPeer("FlashQLA chunk_gated_delta_rule", "flash-qla", _flash_qla, TRAIN),
    ),
    "gla": (_fla("gla", "chunk_gla", "g=log_decay"), _fla("gla", "fused_recurrent_gla", "gk=log_decay")),
    "kda": (
        _fla("kda", "chunk_kda", "g=log_decay", "beta=beta", safe_gate=True),
        _fla("kda", "fused_recurrent_kda", "g=log_decay", "beta=beta"),
    ),
    "taylor": (
        _fla("based", "parallel_based", scale=0.25, use_norm=False),
        _fla("based", "fused_chunk_based", scale=0.25, use_norm=False),
    ),
    "attention": (PublicPeer("scaled_dot_product_attention", "torch", _sdpa, (*TRAIN, "decode")),),
    "window": (PublicPeer("flex_attention", "torch", _flex_window, TRAIN),),
    "chosen_blocks": (PublicPeer("parallel_nsa", FLA, _blocks, TRAIN),),
}
"""A selective scan has a public kernel too, but none that installs without a CUDA compiler."""
PEERS |= {"gla_strong": PEERS["gla"], "kda_strong": PEERS["kda"]}
