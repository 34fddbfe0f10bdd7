"""A tiny randomly initialised teacher with a tokenizer of its own, and a text to train on."""

from pathlib import Path

import pytest
import torch
import transformers

SENTENCES = (
    "A mixer reads one token at a time and keeps what it needs.",
    "The window sees the last keys; the state holds the rest.",
    "Every number in this table names the record it was read from.",
    "Recall beyond the window is where most students fail.",
)
HEDGEHOG = {"feature_map": "hedgehog"}


@pytest.fixture(scope="session", autouse=True)
def offline():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(f"{i}. {SENTENCES[i % 4]} {SENTENCES[(i * 7 + 1) % 4]}" for i in range(400)))
    return path


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")


def tiny(kind: str = "Llama", **changes):
    """A decoder with two layers, four query heads and two key heads."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 280,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()


def tokens(rows: int = 3, length: int = 60) -> torch.Tensor:
    return torch.randint(1, 280, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher():
    return tiny().requires_grad_(False)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
