"""Zoology's own training loop, timed from a checkout of its repository, for `tests.benchmarks.fleet_speed`.

Its Trainer, model configuration and data generator run as they are; only its logger's package, which needs an account, and
its progress bar are replaced by empty ones. Commit dbcb60d trains MQAR, the one after it does not.
"""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

BATCHES = 30
BATCH = 256


class _Silent:
    """Its logger, without a service."""

    def log(self, _: dict[str, Any]) -> None:
        """Drops what it is given."""


class _Bar:
    """Its progress bar, without the terminal."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def set_postfix(self, _: dict[str, Any]) -> None:
        """Shows nothing; the loss it is given has been waited for."""


def _model(mixer: str, width: int) -> Any:
    """The models of its Based figure: one short-convolution layer, then the mixer; no MLP."""
    from zoology.config import ModelConfig, ModuleConfig
    from zoology.model import LanguageModel

    conv = {"name": "zoology.mixers.base_conv.BaseConv", "kwargs": {"l_max": 1024, "kernel_size": 3, "implicit_long_conv": True}}
    mixers = {
        "attention": {"name": "zoology.mixers.attention.MHA", "kwargs": {"dropout": 0.1, "num_heads": 1}},
        "based": {
            "name": "zoology.mixers.based.Based",
            "kwargs": {
                "l_max": 1024,
                "feature_dim": 16,
                "feature_name": "taylor_exp",
                "num_key_value_heads": 1,
                "num_heads": 1,
                "train_view": "quadratic",
            },
        },
    }
    config = ModelConfig(
        block_type="TransformerBlock",
        d_model=width,
        n_layers=2,
        sequence_mixer=ModuleConfig(name="zoology.mixers.hybrid.Hybrid", kwargs={"configs": [conv, mixers[mixer]]}),
        state_mixer=ModuleConfig(name="torch.nn.Identity"),
        max_position_embeddings=0,
        vocab_size=8192,
        name=mixer,
    )
    return LanguageModel(config=config)


def milliseconds(repository: Path, mixer: str, width: int, lengths: dict[int, int]) -> dict[int, float]:
    """Milliseconds of a training step at each length (values: key-value pairs), from its `train_epoch` over 30 batches of 256."""
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))
    from zoology import train
    from zoology.data.multiquery_ar import MQARConfig
    from zoology.data.utils import DataSegment, _SyntheticDataset

    found = {}
    train.tqdm = lambda batches, **_: _Bar(batches)  # type: ignore[assignment]
    torch.set_float32_matmul_precision("highest")
    for length, pairs in lengths.items():
        config = MQARConfig(vocab_size=8192, num_examples=BATCHES * BATCH, input_seq_len=length, num_kv_pairs=pairs)
        segments = _SyntheticDataset([DataSegment.from_config(config)], batch_size=BATCH)
        loader = torch.utils.data.DataLoader(segments, batch_size=None, num_workers=0, shuffle=False)
        trainer = train.Trainer(_model(mixer, width), loader, learning_rate=1e-3, device="cuda", logger=_Silent())  # type: ignore[arg-type]
        trainer.model.to("cuda")
        trainer.loss_fn = torch.nn.CrossEntropyLoss()
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3, weight_decay=0.1)
        trainer.train_epoch(0)
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.train_epoch(1)
        torch.cuda.synchronize()
        found[length] = 1e3 * (time.perf_counter() - began) / BATCHES
        del trainer
        torch.cuda.empty_cache()
    return found
