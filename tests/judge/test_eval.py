"""`bench eval` as a command: a student beside its referees, resumed, compared, reported; and bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.errors import UserError
from bench.judge import harness, run
from bench.judge.suites import TASK_FOLDER
from bench.store import Store

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and datasets warn on import


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def evaluate(model: Path | str, *arguments: str) -> tuple[int, str, str]:
    return call("eval", "--model", str(model), "--device", "cpu", "--precision", "fp32", *arguments)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, student_folder: Path, item_wheel: Path) -> tuple[Store, str, Path]:
    """The whole offline suite on a student and its four referees."""
    folder = tmp_path_factory.mktemp("judged")
    code, out, err = evaluate(
        student_folder,
        *("--items", str(item_wheel), "--lengths", "512", "--limit", "3", "--json"),
        *("--store", str(folder / "runs"), "--report", str(folder / "report.html")),
    )
    assert code == 0, err
    return Store(folder / "runs"), out, folder / "report.html"


def test_every_row_is_judged_on_every_task(judged):
    records, warnings = judged[0].load_evals()
    assert not warnings
    names = {record.model.name for record in records}
    assert {"converted", "tiny", "converted, window only", "converted, mixer only"} < names and len(names) == 5
    tasks = {record.task for record in records}
    assert len(records) == 5 * len(tasks)
    assert {record.protocol for record in records} == {"log-likelihood", "generated", "measured"}
    assert {"memory_and_speed", "agreement", "bench_mqar_text", "bench_gsm8k", "bench_hellaswag_letters"} <= tasks
    student = next(record.model for record in records if record.model.name == "converted")
    assert set(student.referees) == {"teacher", "window", "window_only", "mixer_only"}
    assert {record.model.fingerprint for record in records} == {student.fingerprint, *student.referees.values()}


def test_measurements_are_of_the_live_cache(judged):
    state: dict[str, list[float]] = {}
    for record in judged[0].load_evals()[0]:
        if record.task == "memory_and_speed":
            state[record.model.kind] = [item.value or 0 for item in record.metrics if item.name == "state_bytes"]
            assert all((item.value or 0) > 0 for item in record.metrics)
        if record.task == "agreement" and record.model.kind == "plain":
            assert record.metric("kl").value == pytest.approx(0, abs=1e-6) and record.metric("top1").value == 1  # type: ignore[union-attr]
    assert state["plain"] == [256 * 2 * 2 * 2 * 16 * 4, 1024 * 2 * 2 * 2 * 16 * 4]
    assert state["converted"][0] == state["converted"][1]
    assert 0.9 * state["converted"][0] < state["window"][0] <= state["converted"][0] + 4 * 2 * 2 * 16 * 4 * 2


def test_items_are_kept_and_pair(judged):
    store, out, _ = judged
    records, _ = store.load_evals()
    for record in records:
        items = store.eval_items(record.eval_id)
        if record.task == "memory_and_speed":
            continue
        assert items is not None
        chosen = items[items["metric"] == record.primary]
        if record.task.startswith("bench_") and record.task != "bench_held_out_text":
            assert len(chosen) == record.items == 3
            assert chosen["value"].mean() == pytest.approx(record.metric(record.primary).value)  # type: ignore[union-attr]
    mine = [store.eval_items(record.eval_id) for record in records if record.task == "bench_needle"]
    assert all(list(frame["item"]) == list(mine[0]["item"]) for frame in mine)  # type: ignore[index]
    letters = [record for record in records if record.task == "bench_hellaswag_letters"]
    assert all(sum(answer.chosen for answer in record.answers) == 3 for record in letters)
    assert all(record.chance == 0.25 for record in letters)
    assert any(json.loads(line)["kind"] == "metric" for line in out.splitlines())


def test_what_is_scored_is_what_is_generated(judged):
    """Greedy generation through the cache and the greedy flag of the parallel pass must agree."""
    store, _, _ = judged
    by_task = {(r.model.name, r.task): r for r in store.load_evals()[0]}
    for (name, task), record in by_task.items():
        if task.endswith("_generated"):
            scored = by_task[name, task.removesuffix("_generated")]
            frames = [store.eval_items(found.eval_id) for found in (scored, record)]
            right = [frame[frame["metric"] == "acc"].set_index("item")["value"] for frame in frames]  # type: ignore[index]
            assert (right[0] <= right[1]).all(), (name, task)


def test_the_page_shows_it(judged):
    page = judged[2].read_text("utf-8")
    assert 'id="h-judged"' in page and "Paired differences" in page
    for text in ("untrained", "window only", "mixer only", "chance", "Answers by letter", "Decode, tokens/s"):
        assert text in page
    assert 'id="h-bridge"' not in page


def test_a_second_command_does_only_what_is_missing(judged, student_folder: Path, item_wheel: Path):
    store, _, _ = judged
    lost = next(record for record in store.load_evals()[0] if record.task == "bench_passkey" and record.model.kind == "window")
    shutil.rmtree(store.path(lost.eval_id))
    arguments = ["--items", str(item_wheel), "--lengths", "512", "--limit", "3", "--store", str(store.root), "--no-report"]
    code, out, _ = evaluate(student_folder, *arguments, "--dry-run")
    assert code == 0 and "1 of " in out and store.read_eval(lost.eval_id) is None
    code, out, _ = evaluate(student_folder, *arguments)
    assert code == 0 and out.count("[1/1]") == 1
    again = store.read_eval(lost.eval_id)
    assert again is not None and again.metric("acc") == lost.metric("acc")


def test_a_killed_evaluation_keeps_what_is_done(teacher_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch):
    real, seen = harness.evaluate, []

    def dies(lm, name, tasks, **given):
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(lm, name, tasks, **given)

    monkeypatch.setattr(run.harness, "evaluate", dies)
    arguments = ["--tasks", "bench_passkey,bench_needle", "--lengths", "512", "--limit", "1", "--store", "runs", "--no-report"]
    code, out, _ = evaluate(teacher_folder, *arguments)
    assert code == 130 and "goes on after the last finished task" in out
    assert [record.task for record in Store(Path("runs")).load_evals()[0]] == ["bench_passkey"]
    code, out, _ = evaluate(teacher_folder, *arguments)
    assert code == 0 and seen[2:] == ["bench_needle"]


def test_compare_pairs_items(judged):
    code, out, err = call("compare", "tiny", "converted", "--store", str(judged[0].root), "--json")
    assert code == 0, err
    found = {row["task"]: row for row in map(json.loads, out.splitlines()) if row["kind"] == "difference"}
    assert found["bench_hellaswag"]["n"] == 3 and found["recall, all items"]["n"] == 36
    assert found["agreement"]["mean"] < 0 and found["agreement"]["metric"] == "top1"
    code, out, _ = call("compare", "tiny", "converted", "--store", str(judged[0].root), "--fail", "accuracy:0.99")
    assert code == 1 and "regressed" in out
    code, _, err = call("compare", "tiny", "convertd", "--store", str(judged[0].root))
    assert code == 2 and "Did you mean 'converted'?" in err


def hub_folder(root: Path) -> Path:
    """A data folder shaped like the hub, with the set of the stock task arc_easy."""
    folder = root / "hub" / "allenai" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    row = {
        "id": "1",
        "question": "What reads a token?",
        "choices": {"text": ["A mixer", "A door"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    rows = [row | {"id": str(i), "question": f"{row['question']} {i}"} for i in range(4)]
    for split in ("train", "validation", "test"):
        chosen = rows if split == "test" else rows[:1]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    head = "configs:\n- config_name: ARC-Easy\n  data_files:\n"
    files = "".join(f"  - split: {split}\n    path: ARC-Easy/{split}.jsonl\n" for split in ("train", "validation", "test"))
    (folder.parent / "README.md").write_text(f"---\n{head}{files}---\n")
    return root / "hub"


def test_a_stock_task_runs_from_a_local_folder(teacher_folder: Path, work: Path):
    folder = hub_folder(work)
    arguments = ["--tasks", "arc_easy", "--data-dir", str(folder), "--store", "runs", "--no-report"]
    code, out, err = evaluate(teacher_folder, *arguments)
    assert code == 0, err
    record = Store(Path("runs")).load_evals()[0][0]
    assert (record.task, record.items, record.primary, record.chance) == ("arc_easy", 4, "acc", 0.5)
    assert "|arc_easy|" in out


def test_examples_that_are_scored_items_are_refused():
    class Task:
        eval_docs = ({"q": 1}, {"q": 2})

        def __init__(self, example: int) -> None:
            self.fewshot_docs = lambda: [{"q": example}]

    harness.check_examples({"clean": Task(3)})
    with pytest.raises(UserError, match="few-shot examples of leaky"):
        harness.check_examples({"leaky": Task(2)})


def test_an_own_task_runs_from_an_include_path(teacher_folder: Path, work: Path):
    (work / "mine").mkdir()
    (work / "mine" / "rows.jsonl").write_text("\n".join(json.dumps({"q": f"Item {i}:", "a": " yes"}) for i in range(3)))
    yaml = {
        **{"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(work / "mine" / "rows.jsonl")}}},
        **{"test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"},
        **{"metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
    }
    (work / "mine" / "mine.yaml").write_text(json.dumps(yaml))
    code, _, err = evaluate(teacher_folder, "--tasks", "mine", "--include-path", "mine", "--store", "runs", "--no-report")
    assert code == 0, err
    assert Store(Path("runs")).load_evals()[0][0].items == 3


def test_stock_lm_eval_runs_our_tasks(student_folder: Path):
    """As its command line does: the arguments of the model, given to the tasks, name the tokenizer."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from bench.judge.tasks import functions

    given = {"pretrained": str(student_folder), "trust_remote_code": True}
    sizes = {"max_seq_lengths": [512], "items_per_length": 2}
    index = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={**given, **sizes})
    asked = ["bench_passkey", "bench_passkey_generated"]
    found = lm_eval.simple_evaluate("hf", {**given, "device": "cpu"}, tasks=asked, task_manager=index, bootstrap_iters=0)
    assert found is not None and all(found["results"][task]["sample_len"] == 2 for task in asked)
    with pytest.raises(ValueError, match="bench_needle is made in a tokenizer; name one with --metadata"):
        functions.needle()


BAD = [
    (["--suite", "ofline"], "Did you mean 'offline'?"),
    (["--tasks", "hellaswg"], "Did you mean 'hellaswag'?"),
    (
        ["--tasks", "piqa,bench_passkey"],
        "piqa needs baber/piqa from the hub, which cannot be reached: give a folder that holds it with --data-dir, or use --suite "
        "offline, which needs no hub, or run the rest with --tasks bench_passkey.",
    ),
    (["--rows", "techer"], "Did you mean 'teacher'?"),
    (["--rows", "window"], "has no row window"),
    (["--precision", "fp8"], "Unknown precision"),
    (["--batch-size", "many"], "neither auto nor a positive number"),
    (["--lengths", "long"], "must be positive whole numbers"),
    (["--data-dir", "nowhere", "--tasks", "bench_passkey"], "There is no data folder"),
    (["--items", "nowhere"], "holds no item sets"),
    (["--tasks", "agreement", "--text", "text:missing.txt"], "There is no text file"),
    (["--tasks", "agreement", "--text", "recall"], "is no running text"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_input_is_one_sentence_and_writes_nothing(arguments: list[str], sentence: str, teacher_folder: Path, work: Path):
    code, out, err = evaluate(teacher_folder, *arguments)
    assert code == 2, out
    assert sentence in err, err
    assert err.startswith("bench: ") and len(err.strip().splitlines()) == 1
    assert not list(work.iterdir())


def test_a_damaged_or_foreign_folder_says_why(student_folder: Path, teacher_folder: Path, work: Path):
    shutil.copytree(student_folder, "broken")
    (work / "broken" / "model.safetensors").write_bytes(b"no")
    code, _, err = evaluate("broken")
    assert code == 2 and "broken cannot be loaded" in err
    shutil.copytree(teacher_folder, "foreign")
    config = json.loads((work / "foreign" / "config.json").read_text()) | {"auto_map": {"AutoConfig": "x.Y"}}
    (work / "foreign" / "config.json").write_text(json.dumps(config))
    code, _, err = evaluate("foreign")
    assert code == 2 and "add --trust-remote-code" in err
    shutil.copytree(student_folder, "lost")
    config = json.loads((work / "lost" / "config.json").read_text())
    config["conversion"]["teacher"] = "/gone"
    (work / "lost" / "config.json").write_text(json.dumps(config))
    code, _, err = evaluate("lost")
    assert code == 2 and "give it with --teacher, or judge the student alone with --rows student" in err
    code, _, err = evaluate("lost", "--rows", "student", "--tasks", "memory_and_speed", "--dry-run")
    assert code == 0, err
    code, _, err = evaluate(student_folder, "--control", str(teacher_folder))
    assert code == 2 and "is no control run" in err


def test_out_of_memory_names_a_batch_that_fits(teacher_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run.harness, "evaluate", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    code, _, err = evaluate(teacher_folder, "--tasks", "bench_passkey", "--lengths", "512", "--batch-size", "8", "--store", "runs")
    assert code == 2 and "ran out of memory; --batch-size 4 fits" in err
