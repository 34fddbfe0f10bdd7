"""Cases of a layer's fused decoding step, for the interpreter and for a GPU: the forms that mixers use."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import use_backend
from kernels.layer_step import Apart, Conv, Packed, Stepped, layer_step
from kernels.step import states_in_place
from kernels.step_form import StepForm
from kernels.steps.layer_step_reference import layer_step_reference
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

FORMS = {
    "bare": StepForm(),
    "delta_net": StepForm(silu=True, unit=True, scale=0.25, open_beta=True, max_beta=2.0, norm="rms"),
    "gated_delta_net": StepForm(silu=True, unit=True, scale=0.25, decay="rate", open_beta=True, norm="rms", gate="silu"),
    "gla": StepForm(scale=0.25, decay="sigmoid", temperature=16.0, norm="rms", gate="silu"),
    "kda": StepForm(silu=True, unit=True, scale=0.25, decay="rate", open_beta=True, norm="rms", gate="sigmoid"),
    "mamba2": StepForm(silu=True, decay="rate", stepped=True, norm="row", gate="silu"),
    "retention": StepForm(key_scale=0.25, norm="layer", gate="silu"),
    "normalized": StepForm(decay="sigmoid", norm="sums", eps=1e-6),
    "supra": StepForm(norm="layer"),
}
DECAYS = {"gated_delta_net": 2, "gla": 3, "kda": 3, "mamba2": 2, "retention": 1, "normalized": 2, "supra": 1}
CONVOLVED = ("bare", "delta_net", "gated_delta_net", "kda", "mamba2")
SHAPES = ((1, 1, 1, 1), (2, 3, 20, 33), (3, 2, 16, 40), (1, 2, 72, 5))
"""Batch, heads, key width and value width: whole and broken tiles."""


def draw(name: str, shape: tuple[int, ...], *, device: str, dtype: torch.dtype, groups: int | None = None, taps: int = 4) -> dict:
    """Inputs as mixers have them: q, k and v slices of one projection, weights and states in fp32."""
    batch, heads, k_dim, v_dim = shape
    groups = (1 if name == "mamba2" else heads) if groups is None else groups
    form = FORMS[name]
    widths = (groups * k_dim, groups * k_dim, heads * v_dim)
    packed = torch.randn(batch, sum(widths) + 3, device=device).to(dtype)[:, 3:]

    def weights(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    tensors: dict = {"x": packed, "places": (0, widths[0], 2 * widths[0]), "state": weights(batch, heads, k_dim, v_dim)}
    if name == "mamba2":
        tensors["places"] = (widths[2] + widths[0], widths[2], 0)
    if name in CONVOLVED and taps:
        tensors["taps"], tensors["tail"] = weights(sum(widths), taps), weights(batch, taps - 1, sum(widths))
        tensors["bias"] = weights(sum(widths)) if name == "mamba2" else None
    if name in DECAYS:
        drawn = {1: (heads,), 2: (batch, heads), 3: (batch, heads, k_dim)}[DECAYS[name]]
        tensors["decay"] = weights(*drawn).abs().neg() if form.decay == "log" else weights(*drawn).to(dtype)
        if form.decay == "rate":
            tensors["decay_bias"], tensors["log_rate_H"] = weights(*drawn[1:]), weights(heads)
    if form.open_beta:
        tensors["beta_BH"] = weights(batch, heads).to(dtype)
    if form.norm == "sums":
        q, k, v = packed.split(widths, -1)
        tensors["q"], tensors["k"] = q.abs().unflatten(-1, (groups, -1)), k.abs().unflatten(-1, (groups, -1))
        tensors["v"], tensors["sums_BHK"] = v.unflatten(-1, (heads, -1)), weights(batch, heads, k_dim).abs()
    if name == "mamba2":
        tensors["skip_H"] = weights(heads)
    if form.norm in ("rms", "layer", "row") and name != "supra":
        tensors["norm_weight"] = weights(v_dim) if form.norm == "rms" else weights(heads, v_dim)
    if name == "retention":
        tensors["norm_bias_HV"] = weights(heads, v_dim)
    if form.gate != "none":
        tensors["gate_BE"] = weights(batch, heads * v_dim).to(dtype)
    return tensors


def step(form: StepForm, tensors: dict) -> dict[str, Tensor]:
    """The operation on named tensors."""
    own = dict(tensors)
    x, places, q, k, v = (own.pop(name, None) for name in ("x", "places", "q", "k", "v"))
    qkv = Packed(x, places) if q is None else Apart(q, k, v)
    taps, bias, tail = (own.pop(name, None) for name in ("taps", "bias", "tail"))
    conv = None if taps is None else Conv(taps, bias, tail)
    return named(layer_step(qkv, own.pop("state"), form, conv=conv, **own))


def named(stepped: Stepped) -> dict[str, Tensor]:
    """Results by name, without those that the layer lacks."""
    return {name: x for name, x in stepped._asdict().items() if x is not None}


def definition(form: StepForm, tensors: dict) -> dict[str, Tensor]:
    """The torch form in fp64."""
    names = ("decay", "beta_BH", "state", "tail", "sums_BHK", "taps", "bias", "decay_bias", "log_rate_H", "skip_H")
    exact = {name: x.double().cpu() if isinstance(x, Tensor) else x for name, x in tensors.items()}
    if exact.get("decay") is not None and exact["decay"].ndim == 1:
        exact["decay"] = exact["decay"].expand(exact["state"].shape[:2])
    qkv = Apart(exact["q"], exact["k"], exact["v"]) if "q" in exact else Packed(exact["x"], exact["places"])
    more = [exact.get(name) for name in (*names, "norm_weight", "norm_bias_HV", "gate_BE")]
    return named(Stepped(*layer_step_reference(qkv, *more, form)))


def check(name: str, shape: tuple[int, ...], device: str, dtype: torch.dtype, *, groups: int | None = None, taps: int = 4) -> None:
    """Output and states against fp64, as new tensors and in place; only the latter changes the given ones."""
    form, tensors = FORMS[name], draw(name, shape, device=device, dtype=dtype, groups=groups, taps=taps)
    states = ("state", "tail", "sums_BHK")
    want = definition(form, tensors)
    before = {key: tensors[key].clone() for key in states if key in tensors}
    with use_backend("triton"), poisoned():
        got = step(form, tensors)
        assert all(torch.equal(tensors[key], x) for key, x in before.items())
        require_close(got, want, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)
        with torch.no_grad(), states_in_place():
            again = step(form, tensors)
    for key, tensor in got.items():
        assert torch.equal(tensor, again[key]), key
    for key in before:
        assert any(x is tensors[key] for x in again.values()), key
