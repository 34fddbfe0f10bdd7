"""lm-eval's model class with batches that hold a number of tokens, not of rows: many short items or few long ones.

lm-eval's own "auto" finds one batch size for the longest item by running out of memory on purpose. Here items of similar length
go together and each group has as many rows as the free memory allows by an estimate; if that was too much, the share is halved.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models import huggingface
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.judge.likelihood import continuation, log_likelihoods

CPU_TOKENS = 4096
"""Tokens of a batch on a CPU, where larger batches only cost memory."""
LOGIT_BYTES = 14
"""A scored token's logit in the model's precision, in fp32, and as a log-probability, with room for one more."""
ACTIVATIONS = 48
"""Bytes of activations of a layer over its width, at its peak."""
MOST_ROWS = 256
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE]
"""cuDNN's attention, torch's first choice on a Hopper GPU, plans anew for every shape that it meets, and items have all lengths."""
HFLM: Any = huggingface.HFLM


class BudgetLM(HFLM):
    """A causal language model in memory, for lm-eval.

    Args:
        model: any causal language model of transformers.
        **kwargs: of lm-eval's `HFLM`; batch_size "auto" turns the budget on.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(pretrained=model, backend="causal", **kwargs)
        self.share = 0.5
        """Part of the free memory that a batch may take."""
        self.generating_rows = 0

    def rows(self, length: int, *, scored: bool) -> int:
        """Rows of a batch of sequences of `length` tokens.

        Args:
            length: tokens of the longest.
            scored: whether every token's logits are held, as in log-likelihoods.
        """
        config: Any = self.config
        if self.device.type == "cpu":
            tokens = int(CPU_TOKENS * 2 * self.share)
        else:
            width = config.hidden_size * ACTIVATIONS
            cache = 8 * config.hidden_size * config.num_hidden_layers
            each = width + (config.vocab_size * LOGIT_BYTES if scored else cache)
            tokens = int(self.share * _free_bytes(self.device) / each)
        return min(MOST_ROWS, max(1, tokens // max(1, length)))

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return self.generating_rows or self.rows(self.max_length, scored=True)

    @sdpa_kernel(WITHOUT_PLANS)
    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        fixed = override_bs if self.batch_size == "auto" else self.batch_size
        asked = [continuation(context, more, self.max_length) for _, context, more in requests]
        found = log_likelihoods(self.model, asked, lambda length: fixed or self.rows(length, scored=True), self.softmax_dtype)
        for (text, *_), answer in zip(requests, found, strict=True):
            if text is not None:  # parts of a rolling likelihood have none
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    @sdpa_kernel(WITHOUT_PLANS)
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers by generation; see `HFLM.generate_until`."""
        if self.batch_size != "auto":
            return super().generate_until(requests, disable_tqdm=True)
        found = [""] * len(requests)
        for length, indices in _buckets([len(self.tok_encode(request.args[0])) for request in requests]).items():
            self.generating_rows = self.rows(length + self.max_gen_toks, scored=False)
            part = super().generate_until([requests[i] for i in indices], disable_tqdm=True)
            for index, value in zip(indices, part, strict=True):
                found[index] = value
        self.generating_rows = 0
        return found


def _buckets(lengths: list[int]) -> dict[int, list[int]]:
    """Indices by length, rounded up to a power of two, long ones first, so that too large a batch shows at once."""
    found: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        found.setdefault(1 << max(0, length - 1).bit_length(), []).append(index)
    return dict(sorted(found.items(), reverse=True))


def _free_bytes(device: Any) -> int:
    """Memory that a batch could have: what the device has free, and what torch keeps but does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
