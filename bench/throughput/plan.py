"""Which rows a request of `bench throughput` means; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from bench import catalog
from bench.errors import UserError, unknown
from bench.grammar import STEM, named_layers
from bench.spec import LayerSpec
from bench.throughput.names import KERNELS, MODES, KernelName, Mode

DTYPES = ("fp32", "bf16", "fp16")
PRESETS = ("kernels",)
Layers: TypeAlias = tuple[LayerSpec, ...]


@dataclass(frozen=True)
class Defaults:
    """Sizes where none are given."""

    tokens: int
    length: int
    heads: int
    width: int | None
    """Head width of a kernel; None takes the kernel's own list."""
    d_model: int
    dtype: str


DEFAULTS = {
    "cuda": Defaults(tokens=16_384, length=2048, heads=16, width=None, d_model=256, dtype="bf16"),
    "cpu": Defaults(tokens=512, length=256, heads=2, width=32, d_model=64, dtype="fp32"),
}
"""By device: what a GPU's figures are usually quoted at, and what a CPU does in a fraction of a second."""


@dataclass(frozen=True)
class Row:
    """One thing to time.

    Args:
        kind: mixer or kernel.
        name: as written on the command line.
        mode: what is timed.
        batch: sequences.
        length: tokens of each; for decode those already seen.
        heads: of a kernel; 0 for a mixer, whose options say.
        width: head width of a kernel, model width of a mixer.
        dtype: fp32, bf16 or fp16.
        layers: of a mixer.
    """

    kind: Literal["mixer", "kernel"]
    name: str
    mode: Mode
    batch: int
    length: int
    heads: int
    width: int
    dtype: str
    layers: Layers = ()

    def sizes(self) -> dict[str, int]:
        """The shape as a record holds it."""
        if self.kind == "mixer":
            return {"batch": self.batch, "length": self.length, "d_model": self.width}
        return KERNELS[cast(KernelName, self.name)].shape(self.batch, self.length, self.heads, self.width).sizes()

    def text(self) -> str:
        """Name and shape in a few words."""
        width = f"d_model={self.width}" if self.kind == "mixer" else f"H={self.heads} D={self.width}"
        return f"{self.name} {self.mode} B={self.batch} T={self.length} {width} {self.dtype}"


@dataclass(frozen=True)
class SpeedRequest:
    """The options of `bench throughput` that decide what is timed; empty means the default."""

    mixers: Sequence[str] = ()
    kernels: Sequence[str] = ()
    preset: str | None = None
    modes: Sequence[str] = ()
    lengths: Sequence[int] = ()
    batch: int | None = None
    heads: int | None = None
    widths: Sequence[int] = ()
    dtype: str | None = None


def plan(request: SpeedRequest, device: str) -> list[Row]:
    """The rows of a request on a device ("cpu", "cuda", "cuda:0").

    Raises:
        UserError: unknown names or values, or nothing left to time.
    """
    defaults = DEFAULTS[device.partition(":")[0]]
    for mode in request.modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
    dtype = request.dtype or defaults.dtype
    if dtype not in DTYPES:
        raise unknown("value of --dtype", dtype, DTYPES)
    kernels, mixers = _kernels(request), _mixers(request)
    if request.preset is not None:
        rows = _preset(request, kernels, dtype)
    else:
        rows = [*_kernel_rows(request, defaults, kernels, dtype), *_mixer_rows(request, defaults, mixers, dtype)]
    if not rows:
        raise UserError(f"Nothing to time: none of {', '.join(kernels)} has the mode {', '.join(request.modes)}.")
    return list(dict.fromkeys(rows))  # a name or a length that was given twice is timed once


def _kernels(request: SpeedRequest) -> list[KernelName]:
    """The kernels asked for; all of them if neither kernels nor mixers are named."""
    names = [name for text in request.kernels for name in text.split(",")]
    for name in names:
        if name not in (*KERNELS, "all"):
            raise unknown("kernel", name, KERNELS, fix="`bench list kernels` says what each computes.")
    if "all" in names or not (names or request.mixers):
        return list(KERNELS)
    return cast(list[KernelName], list(dict.fromkeys(names)))


def _mixers(request: SpeedRequest) -> dict[str, Layers]:
    """Layers of the mixers asked for, by name; all of them if neither kernels nor mixers are named."""
    names = [name.strip() for text in request.mixers for name in text.split(",")]
    if names and request.preset is not None:
        raise UserError(f"The preset {request.preset!r} times kernels only; leave out --mixer, or --preset.")
    if "all" in names or not (names or request.kernels):
        names = [] if request.preset is not None else list(catalog.names("mixer"))
    return {name: _with_heads(_layers(name), request.heads) for name in names}


def _layers(expression: str) -> Layers:
    """The layers of an expression, without the short convolution that a lone mixer follows in a model."""
    layers = cast(Layers, named_layers(expression)["layers"])
    is_lone = len(layers) == 2 and not set("+*") & set(expression)
    return tuple(layer for layer in layers if layer != STEM) if is_lone else layers


def _with_heads(layers: Layers, heads: int | None) -> Layers:
    """The same layers with `n_heads` set where a mixer has such an option that is not given."""

    def changed(layer: LayerSpec) -> LayerSpec:
        if heads is None or "n_heads" in layer.options or "n_heads" not in catalog.options_of(catalog.load("mixer", layer.mixer)):
            return layer
        return LayerSpec(mixer=layer.mixer, options=layer.options | {"n_heads": heads})

    return tuple(changed(layer) for layer in layers)


def _shapes(request: SpeedRequest, defaults: Defaults) -> Iterator[tuple[int, int]]:
    """Batch and length; without --batch every length has about the same number of tokens."""
    for length in request.lengths or (defaults.length,):
        yield request.batch or max(1, defaults.tokens // length), length


def _modes(request: SpeedRequest, allowed: Iterable[str] = tuple(MODES)) -> Iterator[Mode]:
    for mode in request.modes or tuple(MODES):
        if mode in allowed:
            yield from MODES[mode]


def _kernel_rows(request: SpeedRequest, defaults: Defaults, kernels: list[KernelName], dtype: str) -> Iterator[Row]:
    heads = request.heads or defaults.heads
    for name in kernels:
        own = KERNELS[name].widths if defaults.width is None else (defaults.width,)
        for width in request.widths or own:
            for batch, length in _shapes(request, defaults):
                for mode in _modes(request, KERNELS[name].modes):
                    yield Row("kernel", name, mode, batch, length, heads, width, dtype)


def _mixer_rows(request: SpeedRequest, defaults: Defaults, mixers: dict[str, Layers], dtype: str) -> Iterator[Row]:
    for name, layers in mixers.items():
        label = layers[0].label() if request.heads is not None and len(layers) == 1 else name
        for width in request.widths or (defaults.d_model,):
            for batch, length in _shapes(request, defaults):
                for mode in _modes(request):
                    yield Row("mixer", label, mode, batch, length, 0, width, dtype, layers)


def _preset(request: SpeedRequest, kernels: list[KernelName], dtype: str) -> list[Row]:
    """The shapes that kernels are compared at: the main one, other lengths, small models, and decoding."""
    given: dict[str, Any] = {"lengths": request.lengths, "batch": request.batch, "heads": request.heads, "widths": request.widths}
    named = [f"--{'length' if key == 'lengths' else key.removesuffix('s')}" for key, value in given.items() if value]
    if request.preset not in PRESETS:
        raise unknown("value of --preset", request.preset or "", PRESETS)
    if named:
        raise UserError(f"The preset {request.preset!r} has shapes of its own; leave out {', '.join(named)}, or --preset.")
    modes = request.modes or ("train", "decode")
    rows: list[Row] = []
    for name in kernels:
        widths = KERNELS[name].widths
        if "train" in modes:
            for batch, length in ((8, 2048), (32, 512), (2, 8192), (1, 32_768)):
                rows += [Row("kernel", name, m, batch, length, 16, w, dtype) for w in widths for m in MODES["train"]]
            if 64 in widths:
                rows += [Row("kernel", name, m, 64, 256, 2, 64, dtype) for m in MODES["train"]]
        if "prefill" in modes and "prefill" in KERNELS[name].modes:
            rows += [Row("kernel", name, "prefill", 8, 2048, 16, w, dtype) for w in widths]
        if "decode" in modes and "decode" in KERNELS[name].modes:
            rows += [Row("kernel", name, "decode", batch, 2048, 16, w, dtype) for w in widths for batch in (1, 64, 256)]
    return rows
