"""The one language model: embedding, layers of mixers in one of two frames, final norm, tied head.

Frames:
    zoology   The block of Zoology's MQAR experiments (Arora et al. 2023), quirks included, so that its figures can be
              reproduced. With the residual r, a block adds mixer(LN1(r)), and the next one starts by adding LN2(r):
              the "state mixer" is the identity, there is no MLP. Mamba and Mamba-2 sit in the plain block of their own
              repository instead: add, RMSNorm, mixer. Linear layers start from N(0, 0.02) with zero bias, which
              overrides a mixer's own initialisation, and `out_proj` from N(0, 0.02 / sqrt(2 L)).
    prenorm   r += mixer(RMSNorm(r)); r += SwiGLU(RMSNorm(r)). Mixers keep their own initialisation.

Shape legend: B batch, T time, D width, V vocabulary, R labelled rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import catalog
from bench.errors import UserError
from bench.spec import LayerSpec, ModelSpec
from mixers import Mixer

MAMBA_BLOCK = frozenset({"mamba", "mamba2"})
"""Mixers that Zoology trains in the block and with the initialisation of the Mamba repository."""

States = list[dict[str, Tensor]]


def build_mixer(spec: LayerSpec, d_model: int, layer: int, max_len: int) -> Mixer:
    """A mixer from its spec; an option `max_len` that is not set becomes the longest sequence of the task.

    Raises:
        UserError: unknown mixer or option, or options that the mixer refuses.
    """
    cls = catalog.load("mixer", spec.mixer)
    if not (inspect.isclass(cls) and issubclass(cls, Mixer)):
        raise UserError(f"{spec.mixer!r} is {cls!r}, which is not a Mixer subclass; derive it from mixers.Mixer.")
    options = catalog.check_options("mixer", spec.mixer, cls, spec.options)
    if "max_len" in catalog.options_of(cls):
        options.setdefault("max_len", max_len)
    try:
        return cls(d_model, layer=layer, **options)
    except ValueError as error:
        raise UserError(f"Mixer {spec.label()} at d_model={d_model}: {error}") from error


class LanguageModel(nn.Module):
    """Token ids to hidden states, and hidden rows to logits; the head is only ever applied to the rows asked for.

    Args:
        spec: the model.
        vocab_size: V.
        max_len: longest sequence, for learned positions and for mixers that need one.
    """

    def __init__(self, spec: ModelSpec, vocab_size: int, max_len: int) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(vocab_size, spec.d_model)
        self.positions = nn.Embedding(max_len, spec.d_model) if spec.positions == "learned" else None
        make = _ZoologyBlock if spec.frame == "zoology" else _PreNormBlock
        self.blocks = nn.ModuleList(make(spec, index, max_len) for index in range(spec.n_layers))
        self.norm = nn.LayerNorm(spec.d_model) if spec.frame == "zoology" else nn.RMSNorm(spec.d_model)
        for table in (self.embedding, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of token ids, positions and dropout included: [B, T, D]."""
        x_BTD = self.embedding(ids_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[: ids_BT.shape[1]]
        plain = self.spec.frame == "zoology" and self.spec.layer(0).mixer in MAMBA_BLOCK
        return x_BTD if plain else F.dropout(x_BTD, self.spec.embed_dropout, self.training)

    def hidden(self, x_BTD: Tensor) -> Tensor:
        """Runs the blocks over embeddings; the result still lacks the final norm: [B, T, D]."""
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return x_BTD

    def logits(self, h_RD: Tensor) -> Tensor:
        """Final norm and tied head on the rows given: [R, D] to [R, V]."""
        return F.linear(self.norm(h_RD), self.embedding.weight)

    def forward(self, ids_BT: Tensor, rows_BM: Tensor | None = None) -> Tensor:
        """Logits of the labelled rows.

        Args:
            ids_BT: token ids, [B, T].
            rows_BM: positions of the M labelled rows of each example, [B, M]; None means every position.

        Returns:
            Logits, [B, M, V] or [B, T, V].
        """
        h_BTD = self.hidden(self.embed(ids_BT))
        if rows_BM is not None:
            h_BTD = h_BTD.gather(1, rows_BM[..., None].expand(-1, -1, h_BTD.shape[-1]))
        return self.logits(h_BTD)

    def mixers(self) -> Iterator[Mixer]:
        """The mixers, first layer first."""
        for block in self.blocks:
            yield block.mixer  # type: ignore[misc]

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> tuple[int, int, int]:
        """State per sequence over all layers after `seq_len` tokens: true, published (fp32 elements) and read bytes."""
        true = published = read = 0
        for mixer in self.mixers():
            size = mixer.state_bytes(seq_len, dtype)
            elements = mixer.state_elements(seq_len)
            declared = mixer.published_elements(seq_len)
            true += size
            published += 4 * (elements if declared is None else declared)
            read += round(size * mixer.read_elements(seq_len) / elements) if elements else 0
        return true, published, read


class _ZoologyBlock(nn.Module):
    """Zoology's TransformerBlock with an identity state mixer, or the Mamba repository's block for its own mixers."""

    def __init__(self, spec: ModelSpec, index: int, max_len: int) -> None:
        super().__init__()
        layer = spec.layer(index)
        self.mixer = build_mixer(layer, spec.d_model, index, max_len)
        self.plain = layer.mixer in MAMBA_BLOCK
        self.norm1 = nn.RMSNorm(spec.d_model, eps=1e-5) if self.plain else nn.LayerNorm(spec.d_model)
        self.norm2 = None if self.plain else nn.LayerNorm(spec.d_model)
        if self.plain:
            _scale_output(self.mixer, 1 / math.sqrt(spec.n_layers))
        else:
            _zoology_init(self.mixer, spec.n_layers)

    def forward(self, r_BTD: Tensor) -> Tensor:
        r_BTD = r_BTD + self.mixer(self.norm1(r_BTD))[0]
        return r_BTD if self.norm2 is None else r_BTD + self.norm2(r_BTD)


class _PreNormBlock(nn.Module):
    """r += mixer(RMSNorm(r)); r += SwiGLU(RMSNorm(r))."""

    def __init__(self, spec: ModelSpec, index: int, max_len: int) -> None:
        super().__init__()
        hidden = round(spec.mlp_ratio * spec.d_model * 2 / 3)
        self.mixer = build_mixer(spec.layer(index), spec.d_model, index, max_len)
        self.norm1 = nn.RMSNorm(spec.d_model)
        self.norm2 = nn.RMSNorm(spec.d_model)
        self.gate_up = nn.Linear(spec.d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, spec.d_model, bias=False)

    def forward(self, r_BTD: Tensor) -> Tensor:
        r_BTD = r_BTD + self.mixer(self.norm1(r_BTD))[0]
        gate, up = self.gate_up(self.norm2(r_BTD)).chunk(2, dim=-1)
        return r_BTD + self.down(F.silu(gate) * up)


def _zoology_init(mixer: Mixer, n_layers: int) -> None:
    """Zoology's initialisation: it overwrites whatever the mixer chose for its linear layers."""
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear):
            is_output = name.rpartition(".")[2] == "out_proj"
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * n_layers) if is_output else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _scale_output(mixer: Mixer, factor: float) -> None:
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] == "out_proj":
            with torch.no_grad():
                module.weight.mul_(factor)
