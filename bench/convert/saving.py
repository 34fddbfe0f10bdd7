"""The folder that a conversion leaves: safetensors, configuration, tokenizer, recipe and report, or nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.convert.student import LinearizedForCausalLM
from bench.errors import UserError

SHIM = '''"""Loads this folder with trust_remote_code=True in programs that do not import Mixer Bench, which must be installed."""

from bench.convert.student import LinearizedConfig, LinearizedForCausalLM

__all__ = ["LinearizedConfig", "LinearizedForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": "modeling_linearized.LinearizedConfig",
    "AutoModelForCausalLM": "modeling_linearized.LinearizedForCausalLM",
}


def partial_folder(out: Path) -> Path:
    """Where an unfinished conversion keeps its checkpoint, beside the folder it will become."""
    return out.with_name(f".{out.name}.partial")


def check_out(out: Path) -> None:
    """Refuses to overwrite anything.

    Raises:
        UserError: `out` exists, or its parent cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it first.")
    try:
        partial_folder(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written ({error.strerror}); choose another --out.") from None


def write_model(folder: Path, student: LinearizedForCausalLM, tokenizer: Any, dtype: torch.dtype, facts: dict[str, Any]) -> None:
    """Writes everything but the report.

    Args:
        folder: made anew; an older one of the same name is a leftover and is removed.
        student: its weights are rounded to `dtype` in memory too, so that what is checked is what is stored.
        tokenizer: the teacher's.
        dtype: of the stored weights.
        facts: what `config.json` says about the conversion; `recipe` is the resolved recipe.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    nn.Module.to(student, dtype)
    student.config.conversion = {key: value for key, value in facts.items() if key != "recipe"}
    student.config.auto_map = AUTO_MAP
    student.config.dtype = dtype
    student.save_pretrained(folder)
    nn.Module.to(student, torch.float32)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_linearized.py").write_text(SHIM)
    write_json(folder / "recipe.json", facts["recipe"])


def publish(folder: Path, out: Path) -> None:
    """Renames a finished folder into its place and removes the rest of the conversion."""
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    folder.rename(out)
    shutil.rmtree(partial_folder(out), ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Indented JSON; numbers that are not finite become null, as JSON has no word for them."""
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save_checkpoint(out: Path, content: dict[str, Any]) -> None:
    """Writes a training checkpoint; a reader sees the old one or the new one."""
    target = partial_folder(out) / "checkpoint.pt"
    temporary = target.with_suffix(".tmp")
    with temporary.open("wb") as handle:
        torch.save(content, handle)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(target)


def load_checkpoint(out: Path, identity: str, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint of this very conversion, or None; tensors only, nothing is executed.

    Raises:
        UserError: the checkpoint is of another conversion, or damaged.
    """
    path = partial_folder(out) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); remove {path.parent} to start again.") from error
    if content["identity"] != identity:
        raise UserError(
            f"{path.parent} holds an unfinished conversion with other settings; give the same command to continue it, remove "
            "the folder, or choose another --out."
        )
    return content
