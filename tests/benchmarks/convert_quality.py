"""What conversions keep: runs the experiments of the figures and judges them beside teacher and untrained windows.

    python -m tests.benchmarks.convert_quality train main-0 --model M --corpora corpora --out runs
    python -m tests.benchmarks.convert_quality judge teacher window:252 runs/main-0 --model M --corpora corpora --out judged

`convert_corpus` makes the corpora. `train` calls `bench convert`; a folder that exists is not made again, an interrupted one is
continued. `judge` writes one JSON file a model, once: held-out text against the teacher, recall beyond the window item by item,
and, if --hub names a folder shaped like the hub, lm-eval tasks. `table` prints what the files of --out say, with exact McNemar
tests of every model's recall against the untrained window of equal bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from bench import pretrained, provenance
from bench.cli import app
from bench.convert.data import load_data
from bench.convert.measure import ablated, agreement, cache_bytes, window_student
from bench.convert.spec import Source
from bench.judge.harness import language_model
from tests.benchmarks.convert_recall import recall

TEXT = {"news": 0.2, "faq": 0.15, "docs": 0.15}
RECALL = {"facts": 0.3, "lists": 0.1, "passages": 0.1}
GDN = ["--mixer", "gated_delta_net"]
RECIPES = ("lolcats", "lizard", "radlads", "haller", "mamba_in_llama")
MIXERS = ("gated_delta_net", "delta_net", "gla", "kda", "retention")
NARROW = ["--window", "60", "--set", "plan.groups=repeat"]
SHARE = ["--set", "plan.projections=share"]
OURS = ["--recipe", "align_distill"]


def budget(first: int, second: int, batch: int, micro: int, length: int = 2048) -> list[str]:
    """Tokens of both stages of `align_distill` or `far_heads`, of a step and of a forward pass, and of sequences of the second."""
    tokens = ["--set", f"stages.1.tokens={first}", "--set", f"stages.2.tokens={second}", "--set", "stages.1.seq_len=2048"]
    tokens += ["--set", f"stages.2.seq_len={length}", "--set", f"stages.batch_tokens={batch}"]
    return [*tokens, "--set", f"stages.micro_tokens={micro}"]


TINY = [*OURS, *budget(1_000_000, 2_900_000, 16_384, 4096), "--seconds", "240"]
FASTER = ["--set", "stages.2.lr=3e-4", "--set", "stages.2.mixer_lr=1e-3"]
FAR = ["--recipe", "far_heads", *budget(1_500_000, 1_048_576, 16_384, 16_384, 4096)]
STILL = ["--set", "stages.2.tokens=1", "--set", "stages.2.lr=1e-9"]
"""A second stage of one step that moves nothing: the teacher's weights under another attention."""
BESIDE = ["--window", "119", "--set", "plan.far_window=631", "--set", "plan.groups=share", "--set", "plan.projections=copy"]
BESIDE += ["--set", "plan.rope=drop", "--set", "plan.combine=gate", "--set", "stages.2.mixer_lr=2e-3"]
EQUAL = budget(300_000, 600_000, 16_384, 16_384)
SHORT = ["--tokens", "900000", "--set", "stages.batch_tokens=16384", "--set", "stages.micro_tokens=16384"]
EXPERIMENTS: dict[str, list[str]] = {
    "try-gentle": TINY,
    "try-copy": [*TINY, *FASTER],
    "try-base": [*TINY, *FASTER, *SHARE, "--set", "stages.1.lr=3e-3"],
    "try-narrow": [*TINY, *FASTER, *NARROW],
    "try-aligned": [*OURS, *FASTER, *budget(2_900_000, 1_000_000, 16_384, 4096), "--seconds", "240"],
    **{f"main-{seed}": [*FAR, "--seed", str(seed)] for seed in range(3)},
    # What of `far_heads` matters: scores alone; the newest keys instead of the best, untrained; a mixer in the place of window.
    "far-scores": [*FAR, *STILL],
    "far-newest": ["--recipe", "swa", "--window", "115", "--set", "plan.far_heads=auto:4", "--set", "plan.far_window=3200"],
    "far-mixer": [*FAR, *GDN, *BESIDE],
    **{f"mixer-{name}": [*OURS, "--mixer", name, *NARROW, *EQUAL] for name in MIXERS},
    **{f"recipe-{name}": ["--recipe", name, *GDN, "--layers", "all", *SHORT] for name in RECIPES},
}
DISTANCES = [768, 1536, 3072]
"""4, 8 and 16 times the widest window of a student here."""


def train(given: argparse.Namespace) -> None:
    """Converts, one experiment after the other."""
    for name in given.names:
        out = given.out / name
        if out.exists():
            continue
        sources = [f"corpus:{given.corpora}/{text}={share}" for text, share in TEXT.items()]
        sources += [f"recall:{kind}={share}" for kind, share in RECALL.items()]
        data = [part for source in sources for part in ("--data", source)]
        began = time.perf_counter()
        arguments = ["convert", "--model", given.model, *EXPERIMENTS[name], *data, *given.more]
        print(name, arguments, flush=True)
        app([*arguments, "--out", str(out)], standalone_mode=False)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


def judged(name: str, given: argparse.Namespace, teacher: Any, tokenizer: Any, keep: Callable[[dict[str, Any]], None]) -> None:
    """All measurements of one model; `keep` gets what there is after each, the tasks last because they take longest."""
    report: dict[str, Any] = {}
    if name == "teacher":
        model = teacher
    elif name.startswith("window:"):
        model = window_student(teacher, int(name.removeprefix("window:")))
    else:
        model = pretrained.load(name, dtype=torch.float32, device=str(teacher.device))[0]
        report = json.loads(Path(name, "report.json").read_text())
    corpora = [Source(kind="corpus", where=f"{given.corpora}/{text}") for text in ("news", "faq")]
    data = load_data(corpora, tokenizer, teacher.config.vocab_size, 0, min_length=1024, cap=10**9)
    bf16 = teacher.device.type == "cuda"
    held = agreement(model, teacher, data.held_out(given.held, 1024), bf16=bf16)
    low = copy.deepcopy(model).to(torch.bfloat16)
    constant, per_token = cache_bytes(low)
    text = np.asarray(data.corpora[0].held_out)
    result = {"model": name, "held_out": held, "state_bytes": constant, "bytes_per_token": per_token, "report": report}
    result |= {"commit": provenance.git_state()[0], "versions": provenance.versions(), "device": _device(teacher)}
    result["recall"] = recall(low, tokenizer, text, given.distances, given.items, given.batch_tokens)
    if report and all(plan and plan.mixer and plan.window for plan in low.plans):
        keep(result)
        with ablated(low, "window"):
            result["recall_of_its_window_alone"] = recall(low, tokenizer, text, given.distances, given.items, given.batch_tokens)
    keep(result)
    if given.hub:
        result["tasks"] = tasks(low, tokenizer, given.hub)
        keep(result)


def tasks(model: Any, tokenizer: Any, hub: Path) -> dict[str, Any]:
    """lm-eval's own scores on item sets in a folder shaped like the hub, zero-shot."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    # Of lm-eval's 14,000 task files only these: reading all of them takes longer than the tasks.
    own = Path(lm_eval.__file__).parent / "tasks"
    index = TaskManager(include_path=[own / name for name in ("arc", "lambada", "hellaswag")], include_defaults=False)
    before = Path.cwd()
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    os.chdir(hub)
    try:
        judge = language_model(model, tokenizer, batch_size="auto", max_length=2048)
        names = ["arc_easy", "lambada_openai", "hellaswag"]
        found = lm_eval.simple_evaluate(judge, tasks=names, task_manager=index, bootstrap_iters=0, log_samples=False)
    finally:
        os.chdir(before)
    assert found is not None
    return {
        name: {key: value for key, value in scores.items() if isinstance(value, float)} for name, scores in found["results"].items()
    }


def judge(given: argparse.Namespace) -> None:
    """Judges and writes, one model after the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = pretrained.load(given.model, dtype=torch.float32, device=device)
    teacher, tokenizer = loaded[0].requires_grad_(False), loaded[1]
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        target = given.out / (Path(name).name.replace(":", "_") + ".json")
        if target.exists():
            continue
        began, parts = time.perf_counter(), target.with_suffix(".part")

        def keep(result: dict[str, Any], began: float = began, parts: Path = parts) -> None:
            parts.write_text(json.dumps(result | {"seconds": time.perf_counter() - began}, indent=1))

        judged(name, given, teacher, tokenizer, keep)
        parts.rename(target)
        result = json.loads(target.read_text())
        shown = {key: round(sum(hits) / len(hits), 3) for key, hits in result["recall"].items()}
        print(name, result["held_out"], shown, result.get("tasks"), flush=True)


def table(given: argparse.Namespace) -> None:
    """Prints the judged models as Markdown, each beside teacher and window; names choose the rows."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(given.out.glob("*.json"))}
    baseline = next((result for name, result in found.items() if name.startswith("window")), None)
    if baseline is None:
        raise SystemExit("No window in --out to compare with: judge window:252 too.")
    distances = list(baseline["recall"])
    print("| model | state, MB | ppl | top-1 | KL | tasks |", " | ".join(distances), "| beyond the window, p |")
    print("|" + " --- |" * (7 + len(distances)))
    for name in given.names or found:
        result = found[name]
        held, scores = result["held_out"], [score for task in result.get("tasks", {}).values() for score in [_headline(task)]]
        row = [name, f"{result['state_bytes'] / 1e6:.2f}", f"{held['ppl']:.2f}", f"{held['top1']:.1%}", f"{held['kl']:.4f}"]
        row.append(f"{sum(scores) / len(scores):.4f}" if scores else "")
        row += [f"{sum(result['recall'][key]) / len(result['recall'][key]):.2f}" for key in distances]
        # An item depends on its number alone, so a model that was asked fewer was asked the first ones.
        pairs = [pair for key in distances for pair in zip(result["recall"][key], baseline["recall"][key], strict=False)]
        better, worse = (sum(pair == wanted for pair in pairs) for wanted in ((1, 0), (0, 1)))
        row.append(f"{better}:{worse}, {binomtest(better, better + worse).pvalue:.1e}" if better + worse else "no difference")
        print("| " + " | ".join(row) + " |")
    for stem, members in _seeds(found).items():
        print(f"\n{stem}, {len(members)} seeds: {seeds_against(members, baseline['recall'])}")


def _seeds(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Results that differ in their seed alone, by their common name."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in found.items():
        stem, _, seed = name.rpartition("-")
        if seed.isdigit():
            groups.setdefault(stem, []).append(result)
    return {stem: members for stem, members in groups.items() if len(members) > 1}


def seeds_against(members: list[dict[str, Any]], baseline: dict[str, list[int]]) -> str:
    """Recall of several seeds against a model that has none: an exact sign test over items, each with its mean over the seeds.

    Items that all seeds are asked are no further items, so each counts once.
    """
    said = []
    for family in ("needle", "lookup"):
        keys = [key for key in baseline if key.startswith(family)]
        shares = [float(np.mean([member["recall"][key] for member in members])) for key in keys]
        ahead = [
            np.mean([member["recall"][key][item] for member in members]) - baseline[key][item]
            for key in keys
            for item in range(len(baseline[key]))
        ]
        better, worse = sum(a > 0 for a in ahead), sum(a < 0 for a in ahead)
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        listed = ", ".join(f"{key} {share:.3f}" for key, share in zip(keys, shares, strict=True))
        said.append(f"{listed}; {better} of {len(ahead)} items better, {worse} worse, p = {p:.1e}")
    return "; ".join(said)


def _headline(scores: dict[str, float]) -> float:
    """A task's accuracy, normalised by length where the task offers it."""
    return scores.get("acc_norm,none", scores["acc,none"])


def _device(model: Any) -> str:
    return torch.cuda.get_device_name() if model.device.type == "cuda" else provenance.cpu_name()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "judge", "table"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--model")
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hub", type=Path)
    parser.add_argument("--items", type=int, default=100, help="per family and distance")
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES)
    parser.add_argument("--held", type=int, default=32, help="held-out sequences of 1,024 tokens")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further arguments of bench convert")
    given = parser.parse_args()
    {"train": train, "judge": judge, "table": table}[given.what](given)


if __name__ == "__main__":
    main()
