"""The kernels of `bench throughput` by name, with the widths and modes that they are timed in; imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from bench.throughput.bounds import Shape

KernelName = Literal[
    "linear", "constant_decay", "scalar_decay", "ssd", "delta", "gated_delta", "gla", "gla_strong", "kda", "kda_strong", "taylor",
    "attention", "window", "chosen_blocks", "selective_scan", "scan", "short_conv",
]  # fmt: skip
Mode = Literal["forward", "train", "prefill", "decode"]
MODES: dict[str, tuple[Mode, ...]] = {"train": ("forward", "train"), "prefill": ("prefill",), "decode": ("decode",)}
"""What the values of --mode time."""

TAYLOR_KEY = 16
SCAN_STATES = 16


class Kernel(NamedTuple):
    """What can be said about a kernel without torch.

    Args:
        summary: what it computes.
        widths: default head widths.
        modes: those that it has.
        layout: how batch, length, heads and width become a shape.
    """

    summary: str
    widths: tuple[int, ...]
    modes: tuple[str, ...]
    layout: Literal["square", "shared", "ssd", "taylor", "channels", "states"] = "square"

    def shape(self, batch: int, length: int, heads: int, width: int) -> Shape:
        """Sizes of its tensors."""
        if self.layout == "ssd":
            return Shape(batch, length, heads, 1, 2 * width, width)
        if self.layout == "taylor":
            return Shape(batch, length, heads, heads, TAYLOR_KEY, width)
        if self.layout in ("square", "shared"):
            return Shape(batch, length, heads, heads if self.layout == "square" else 1, width, width)
        return Shape(batch, length, heads * width, key=SCAN_STATES if self.layout == "states" else 1)


ALL, NO_PROMPT, TRAIN = ("train", "prefill", "decode"), ("train", "decode"), ("train",)
KERNELS: dict[KernelName, Kernel] = {
    "linear": Kernel("linear attention: no decay", (64, 128), ALL),
    "constant_decay": Kernel("retention: one decay a head", (64, 128), ALL),
    "scalar_decay": Kernel("a decay for each token and head", (64, 128), ALL),
    "ssd": Kernel("Mamba-2: a scalar decay, keys of twice the width shared by all heads", (64,), ALL, "ssd"),
    "delta": Kernel("DeltaNet: the delta rule", (64, 128), ALL),
    "gated_delta": Kernel("Gated DeltaNet: the delta rule with a scalar decay", (64, 128), ALL),
    "gla": Kernel("gated linear attention: a decay for each key channel", (64, 128), ALL),
    "gla_strong": Kernel("gla with decays down to e^-5 a token", (128,), TRAIN),
    "kda": Kernel("Kimi Linear: the delta rule with a decay for each key channel", (64, 128), ALL),
    "kda_strong": Kernel("kda with decays down to e^-5 a token", (128,), TRAIN),
    "taylor": Kernel("BASED: second-order Taylor features of 16 channels", (64,), ALL, "taylor"),
    "attention": Kernel("causal softmax attention", (64, 128), NO_PROMPT),
    "window": Kernel("causal softmax attention over the last 128 keys", (64, 128), NO_PROMPT),
    "chosen_blocks": Kernel("softmax attention to 16 chosen blocks of 64 keys, which all heads share", (128,), TRAIN, "shared"),
    "selective_scan": Kernel("Mamba: a scan of 16 states a channel, heads x width channels", (256,), TRAIN, "states"),
    "scan": Kernel("HGRN, RG-LRU: an elementwise scan of heads x width channels", (128,), TRAIN, "channels"),
    "short_conv": Kernel("a depthwise causal convolution of 4 taps with SiLU", (128,), TRAIN, "channels"),
}
