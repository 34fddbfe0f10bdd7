"""Suites: names for lists of lm-eval tasks and of our own measurements. No lm-eval is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.errors import unknown

TASK_FOLDER = Path(__file__).parent / "tasks"
"""lm-eval task files of our own; stock lm-eval reads them with --include_path."""
FAMILIES = ("passkey", "needle", "needles", "phone_book", "mqar_text", "ngram_lookup")
MEMORY_AND_SPEED = "memory_and_speed"
AGREEMENT = "agreement"
MEASUREMENTS = {
    MEMORY_AND_SPEED: "state bytes of the live cache, prefill and decode tokens/s, peak memory",
    AGREEMENT: "perplexity, and KL and first-choice agreement with the teacher, on held-out text",
}
"""What is measured by us, not by lm-eval."""
RECALL_TASKS = (*(f"bench_{family}" for family in FAMILIES), *(f"bench_{family}_generated" for family in FAMILIES))
PACKAGED_ITEMS = ("bench_hellaswag", "bench_hellaswag_letters", "bench_truthfulqa", "bench_gsm8k")
SUITES: dict[str, tuple[str, ...]] = {
    "commonsense": ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada_openai"),
    "recall": ("swde", "fda", "squad_completion"),
    "niah": (
        *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "bench_passkey_generated"),
    ),
    "mmlu": ("mmlu",),
    "offline": (MEMORY_AND_SPEED, AGREEMENT, "bench_held_out_text", *RECALL_TASKS, *PACKAGED_ITEMS),
}
EXAMPLES = {"mmlu": 5}
"""Examples in the prompts of a suite's tasks where the published protocol has them and lm-eval's task does not."""
OFFLINE = "offline"
SUMMARIES = {
    "offline": "memory, speed, agreement with the teacher, recall items made on the spot, items that packages ship",
    "commonsense": "six log-likelihood tasks that converted models are usually scored by",
    "recall": "answers to be read out of web pages, documents and paragraphs",
    "niah": "RULER's needle tasks and the passkey, at growing lengths",
    "mmlu": "57 subjects, five examples each",
}
RECALL = (*RECALL_TASKS, *SUITES["recall"], *(name for name in SUITES["niah"] if name not in RECALL_TASKS))
"""Tasks whose answers stand in the context: their mean is what the page calls recall."""


@dataclass(frozen=True)
class Size:
    """How much is evaluated unless the command line says otherwise.

    Args:
        limit: items per task, or per task and length; None for all.
        lengths: tokens of the recall items.
        windows: held-out sequences of `agreement`.
        window_tokens: tokens of each.
        measured: lengths at which memory and speed are measured.
        batches: batch sizes of decoding.
    """

    limit: int | None
    lengths: tuple[int, ...]
    windows: int
    window_tokens: int
    measured: tuple[int, ...]
    batches: tuple[int, ...]


SIZES = {
    "cpu": Size(limit=4, lengths=(256,), windows=4, window_tokens=256, measured=(256, 1024), batches=(1,)),
    "cuda": Size(
        limit=None,
        lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768),
        windows=64,
        window_tokens=1024,
        measured=(1024, 4096, 16384),
        batches=(1, 32),
    ),
}
PER_LENGTH = 64
"""Items at each length where no limit is given: recall items are made, so "all" has to be a number."""


def descriptions() -> dict[str, str]:
    """Every suite and what it holds, in a line."""
    return {name: f"{SUMMARIES[name]} ({len(tasks)} tasks)" for name, tasks in SUITES.items()}


def expand(tasks: list[str], suites: list[str]) -> list[str]:
    """Task names of suites and single tasks, each once, in order; the suite `offline` if nothing is named.

    Raises:
        UserError: an unknown suite.
    """
    for name in suites:
        if name not in SUITES:
            raise unknown("suite", name, SUITES)
    named = [name for suite in suites for name in SUITES[suite]] + tasks
    return list(dict.fromkeys(named or SUITES[OFFLINE]))
