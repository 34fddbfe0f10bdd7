"""The one language model: embedding, layers of mixers in one of two frames, final norm, head.

Frames:
    zoology   The block of Zoology's MQAR experiments (Arora et al. 2023), quirks included, so that its figures can be
              reproduced. With the residual r, a block adds mixer(LN1(r)), and the next one starts by adding LN2(r):
              the "state mixer" is the identity, there is no MLP. Mamba and Mamba-2 sit in the plain block of their own
              repository instead: add, RMSNorm, mixer. Linear layers start from N(0, 0.02) with zero bias, which
              overrides a mixer's own initialisation, and `out_proj` from N(0, 0.02 / sqrt(2 L)).
    prenorm   r += mixer(RMSNorm(r)); r += SwiGLU(RMSNorm(r)). Mixers keep their own initialisation.

Shape legend: B batch, T time, D width, F features, V vocabulary, K values, M labelled rows of an example.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import catalog, ends
from bench.dropout import dropout
from bench.errors import UserError
from bench.spec import LayerSpec, ModelSpec
from kernels.labelled_head import labelled_head
from kernels.norms import layer_norm, norm_pair, stream_norm
from kernels.rows import pick_rows
from mixers import Mixer
from synthetic_tasks import Task

MAMBA_BLOCK = frozenset({"mamba", "mamba2", "hax"})
"""Mixers that Zoology trains in the block and with the initialisation of the Mamba repository, and HAX, which extends one."""

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
    construct = cast(Callable[..., Mixer], cls)
    try:
        return construct(d_model, layer=layer, **options)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # torch refuses sizes with the latter two
        raise UserError(f"Mixer {spec.label()} at d_model={d_model}: {' '.join(str(error).split())}") from error


class LanguageModel(nn.Module):
    """Inputs to hidden states, and hidden rows to predictions; the head is only ever applied to the rows asked for.

    Args:
        spec: the model.
        task: decides what is read (token ids or features) and what is predicted (tokens by a head tied to the embedding where
            tokens are read too, real values, or all labels from the last position); see `bench.ends`. Its longest sequence
            bounds learned positions and mixers that need a length.
    """

    def __init__(self, spec: ModelSpec, task: Task) -> None:
        super().__init__()
        self.spec = spec
        max_len = task.max_length()
        self.embedding = ends.reader(task, spec.d_model)
        self.positions = nn.Embedding(max_len, spec.d_model) if spec.positions == "learned" else None
        make = _ZoologyBlock if spec.frame == "zoology" else _PreNormBlock
        self.blocks = nn.ModuleList(make(spec, index, max_len) for index in range(spec.n_layers))
        self.norm = nn.LayerNorm(spec.d_model) if spec.frame == "zoology" else nn.RMSNorm(spec.d_model)
        self.head = ends.head(task, spec.d_model)
        ends.initialise(self.embedding)
        ends.initialise(self.positions)

    @property
    def embed_dropout(self) -> float:
        """Rate at which embeddings are dropped in training; the Mamba repository's block has none."""
        plain = self.spec.frame == "zoology" and self.spec.layer(0).mixer in MAMBA_BLOCK
        return 0.0 if plain else self.spec.embed_dropout

    def embed(self, inputs: Tensor, key_B: Tensor | None = None) -> Tensor:
        """Embeddings of token ids [B, T] or features [B, T, F], positions included: [B, T, D].

        Args:
            inputs: what the task gives.
            key_B: each example's key of what dropout drops, from `bench.dropout`; None drops nothing.
        """
        x_BTD = ends.computed(self.embedding(inputs))
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[: inputs.shape[1]].to(x_BTD.dtype)
        return x_BTD if key_B is None else dropout(x_BTD, key_B, self.embed_dropout)

    def hidden(self, x_BTD: Tensor, rows_BM: Tensor | None = None) -> Tensor:
        """Runs the blocks over embeddings; the result still lacks the final norm: [B, T, D].

        Args:
            x_BTD: embeddings.
            rows_BM: the only positions wanted, [B, M], for a result [B, M, D]: what follows the last mixer is left out elsewhere.
        """
        blocks: list[_Block] = list(self.blocks)  # type: ignore[assignment]
        r_BTD, x_BTD = x_BTD, normed(blocks[0].norm1, x_BTD)
        x_BMD = None
        for block, following in itertools.pairwise(blocks):
            wanted = rows_BM if following is blocks[-1] else None
            r_BTD, x_BTD, x_BMD = block.to_next(block.mixed(r_BTD, x_BTD), following.norm1, wanted)
        last = blocks[-1]
        if rows_BM is None:
            return last.finished(last.mixed(r_BTD, x_BTD))
        if x_BMD is None:  # a single layer
            r_BTD, x_BMD = pick_rows(r_BTD, rows_BM), pick_rows(x_BTD, rows_BM)
        return last.finished(r_BTD + last.mixer.at_rows(x_BTD, rows_BM, x_BMD).to(r_BTD.dtype))

    def predict(self, h_BMD: Tensor) -> Tensor:
        """Final norm and head on the hidden rows given: [B, M, D] to [B, M, V or K]."""
        h_BMD = normed(self.norm, h_BMD)
        return self.head(h_BMD) if self.head is not None else F.linear(h_BMD, self.embedding.weight)  # type: ignore[arg-type]

    def forward(
        self, inputs: Tensor, rows_BM: Tensor | None = None, key_B: Tensor | None = None, labels_BM: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predictions at the labelled rows.

        Args:
            inputs: token ids [B, T] or features [B, T, F].
            rows_BM: positions of the M labelled rows of each example, [B, M]; None means every position.
            key_B: as for `embed`.
            labels_BM: with a tied head only: the labels of the rows, -100 for none.

        Returns:
            Logits or values, [B, M, V or K], or [B, T, V or K] without `rows_BM`. With labels, the loss of each row and the token
            predicted, [B, M] each, as from `kernels.labelled_head`, which keeps no logits.
        """
        x_BTD = self.embed(inputs, key_B)
        if isinstance(self.head, ends.LastDecoder):
            every_BT = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
            return self.head(self.norm(self.hidden(x_BTD)[:, -1]), every_BT if rows_BM is None else rows_BM)
        h_BMD = self.hidden(x_BTD, rows_BM)
        if labels_BM is None:
            return self.predict(h_BMD)
        loss_R, predicted_R = labelled_head(normed(self.norm, h_BMD).flatten(0, 1), self.embedding.weight, labels_BM.flatten())  # type: ignore[arg-type]
        return loss_R.view(labels_BM.shape), predicted_R.view(labels_BM.shape)

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


class _Block(nn.Module):
    """One layer: what a mixer adds to the residual stream, and what follows."""

    mixer: Mixer
    norm1: nn.Module

    def mixed(self, r_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """The residual stream after the mixer, r + mixer(x)."""
        return r_BTD + self.mixer(x_BTD)[0].to(r_BTD.dtype)

    def finished(self, r: Tensor) -> Tensor:
        """The residual stream after the layer, from that after its mixer."""
        raise NotImplementedError

    def to_next(self, r_BTD: Tensor, norm: nn.Module, rows_BM: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`finished`, at `rows_BM` if given; its norm at every position, for the next layer's mixer; and that at `rows_BM`."""
        r_BTD = self.finished(r_BTD)
        if rows_BM is not None and isinstance(norm, nn.RMSNorm) and norm.eps is not None:
            return stream_norm(r_BTD, norm.weight, rows_BM, norm.eps)
        x_BTD = normed(norm, r_BTD)
        return (r_BTD, x_BTD, None) if rows_BM is None else (pick_rows(r_BTD, rows_BM), x_BTD, pick_rows(x_BTD, rows_BM))


class _ZoologyBlock(_Block):
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

    def finished(self, r: Tensor) -> Tensor:
        return r if self.norm2 is None else r + normed(self.norm2, r)

    def to_next(self, r_BTD: Tensor, norm: nn.Module, rows_BM: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if not (isinstance(self.norm2, nn.LayerNorm) and isinstance(norm, nn.LayerNorm)):
            return super().to_next(r_BTD, norm, rows_BM)
        return norm_pair(r_BTD, (self.norm2.weight, self.norm2.bias), (norm.weight, norm.bias), rows_BM)


class _PreNormBlock(_Block):
    """r += mixer(RMSNorm(r)); r += SwiGLU(RMSNorm(r))."""

    def __init__(self, spec: ModelSpec, index: int, max_len: int) -> None:
        super().__init__()
        hidden = round(spec.mlp_ratio * spec.d_model * 2 / 3)
        self.mixer = build_mixer(spec.layer(index), spec.d_model, index, max_len)
        self.norm1 = nn.RMSNorm(spec.d_model)
        self.norm2 = nn.RMSNorm(spec.d_model)
        self.gate_up = nn.Linear(spec.d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, spec.d_model, bias=False)

    def finished(self, r: Tensor) -> Tensor:
        gate, up = self.gate_up(normed(self.norm2, r)).chunk(2, dim=-1)
        return r + self.down(F.silu(gate) * up).to(r.dtype)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in the dtype of its input: autocast's norms answer in fp32, and whatever reads them would read twice the bytes."""
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(x, (norm.weight, norm.bias), norm.eps)
    weight = cast(Tensor, norm.weight)
    return norm(x.to(weight.dtype)).to(x.dtype)  # torch warns where input and weight differ


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
