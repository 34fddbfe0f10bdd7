"""Specs hash what matters; the store writes whole files or none and never loses a reader's trust."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from bench import catalog, schema_page
from bench.catalog import source_hash
from bench.errors import UserError
from bench.grammar import apply_settings, named_layers, parse_layers, parse_value
from bench.provenance import identity_code
from bench.spec import LayerSpec, ModelSpec, RunSpec, TaskSpec, TrainSpec, run_id
from bench.store import Store, atomic_write
from bench.sweep import Experiment, Sweep


def spec(**changes: object) -> RunSpec:
    fields = {"task": TaskSpec(name="mqar"), "model": ModelSpec(**named_layers("gla:n_heads=4")), "train": TrainSpec(), "seed": 0}
    return RunSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_identity() -> None:
    base = run_id(spec(), "code")
    assert run_id(spec(), "code") == base
    assert run_id(spec(seed=1), "code") != base
    assert run_id(spec(), "other code") != base
    renamed = spec(model=ModelSpec(layers=parse_layers("gla:n_heads=4"), alias="another name"))
    assert run_id(renamed, "code") == base
    assert spec(seed=1).point_id() == spec(train=TrainSpec(lr=0.5)).point_id() == spec().point_id()
    assert spec(train=TrainSpec(epochs=1)).point_id() != spec().point_id()
    assert len({spec(), spec(), spec(seed=1)}) == 2


def test_specs_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        TrainSpec(learning_rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        spec().seed = 3  # type: ignore[misc]
    assert RunSpec.model_validate_json(spec().model_dump_json()) == spec()


def test_code_hash_ignores_comments_and_docstrings(tmp_path: Path) -> None:
    texts = ['"""One."""\nx = 1\n', '"""Two."""\n# why\nx  =  1\n', '"""One."""\nx = 2\n']
    hashes = []
    for index, text in enumerate(texts):
        path = tmp_path / f"{index}.py"
        path.write_text(text)
        hashes.append(source_hash(path))
    assert hashes[0] == hashes[1] != hashes[2]
    assert identity_code(spec()) != identity_code(spec(model=ModelSpec(**named_layers("attention"))))


def test_source_hash_does_not_see_fields_that_newer_pythons_add():
    tree = ast.parse("def f(a, *, b=None):\n    return f'{a!r:>{b}}', None\n\nclass C:\n    x: int = 0\n")
    before = catalog._dump(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node._fields = tuple(dict.fromkeys((*node._fields, "type_params")))  # type: ignore[misc]
            node.type_params = []  # type: ignore[attr-defined]
    assert catalog._dump(tree) == before != catalog._dump(ast.parse("def f(a, *, b=0): return a"))


def test_mixer_expressions() -> None:
    stem, gla, attention = LayerSpec(mixer="base_conv"), LayerSpec(mixer="gla"), LayerSpec(mixer="attention")
    assert parse_layers("gla") == (stem, gla)
    assert parse_layers("gla*2") == (gla, gla)
    assert parse_layers("gla*3+attention") == (gla, gla, gla, attention)
    assert parse_layers("base_conv") == (stem,)
    assert [layer.mixer for layer in parse_layers("based:feature_dim=8")] == ["base_conv", "linear_attention", "sliding_window"]
    assert ModelSpec(**named_layers("based:feature_dim=8")).mixer() == "based"
    assert ModelSpec(**named_layers("gla*3+attention"), n_layers=4).mixer() == "attention"
    values = ["1", "0.5", "true", "False", "none", "text", "[1, 2]"]
    assert [parse_value(value) for value in values] == [1, 0.5, True, False, None, "text", [1, 2]]


def test_settings_make_grids() -> None:
    experiment = Experiment(task=TaskSpec(name="mqar"), model=ModelSpec(**named_layers("gla")), lrs=(1e-3,))
    sweep = apply_settings(
        Sweep(experiments=(experiment,)), ["model.d_model=32,64", "train.lr=1e-3,3e-3", "task.vocab_size=128", "train.epochs=2,3"]
    )
    found = {(e.model.d_model, e.train.epochs, e.task.options["vocab_size"], e.lrs) for e in sweep.experiments}
    assert found == {(d, epochs, 128, (1e-3, 3e-3)) for d in (32, 64) for epochs in (2, 3)}


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "record.json"
    atomic_write(target, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old"


def test_store_reads_what_it_wrote(tmp_path: Path) -> None:
    from tests.report.fake_store import build

    store = build(tmp_path / "store")
    records, warnings = store.load()
    assert records and not warnings
    assert store.read(records[0].run_id) == records[0]
    with_map = next(record for record in records if store.influence(record.run_id) is not None)
    influence = store.influence(with_map.run_id)
    assert influence is not None and isinstance(influence["map"], np.ndarray)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file").check_writable()


def test_results_page_is_up_to_date() -> None:
    assert Path(schema_page.PAGE).read_text() == schema_page.page(), "run `python -m bench.schema_page`"
