"""The command line's surface is frozen, and it starts without torch."""

from __future__ import annotations

import importlib
import subprocess
import sys

import typer

from bench.cli import app

OPTIONS = {
    "synthetic": [
        "--task", "--mixer", "--recipe", "--suite", "--preset", "--set", "--seeds", "--select-seeds", "--device", "--jobs",
        "--fleet", "--launch", "--rerun", "--dry-run", "--check", "--report", "--no-report", "--store", "--json", "--debug",
    ],
    "list": ["--json", "--debug"],
    "status": ["--watch", "--store", "--json", "--debug"],
    "convert": [
        "--model", "--recipe", "--out", "--mixer", "--window", "--sinks", "--layers", "--data", "--set", "--tokens", "--seconds",
        "--seed", "--device", "--precision", "--trust-remote-code", "--dry-run", "--json", "--debug",
    ],
    "sample": [
        "--model", "--out", "--tokens", "--length", "--batch", "--temperature", "--seed", "--device", "--json", "--debug",
    ],
    "throughput": [
        "--mixer", "--kernel", "--preset", "--mode", "--length", "--batch", "--heads", "--width", "--device", "--dtype",
        "--no-peers", "--dry-run", "--store", "--json", "--debug",
    ],
    "eval": [
        "--model", "--tasks", "--suite", "--rows", "--teacher", "--control", "--include-path", "--data-dir", "--items", "--text",
        "--limit", "--lengths", "--fewshot", "--chat", "--batch-size", "--device", "--precision", "--trust-remote-code",
        "--dry-run", "--rerun", "--report", "--no-report", "--store", "--json", "--debug",
    ],
    "report": ["--out", "--task", "--paper", "--store", "--json", "--debug"],
    "compare": ["--fail", "--store", "--json", "--debug"],
    "check": ["--json", "--debug"],
    "doctor": ["--store", "--json", "--debug"],
}  # fmt: skip


def test_options_are_frozen() -> None:
    """A new knob goes into a spec, where `--set` reaches it; a new option is a decision."""
    group = typer.main.get_command(app)
    found = {
        name: [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert {name: [option for option in options if option != "--help"] for name, options in found.items()} == OPTIONS


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys; from bench import cli; from bench.commands import listing, status, compare, report, throughput, eval; "
        "from bench.catalog import names; [names(kind) for kind in ('mixer', 'task', 'recipe')]; "
        "print([name for name in ('torch', 'pandas', 'scipy', 'altair', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_recipe_returns_a_sweep_and_says_what_it_costs() -> None:
    from bench import catalog
    from bench.sweep import Sweep

    for name in catalog.names("recipe"):
        assert isinstance(catalog.load("recipe", name)(), Sweep)
        module = importlib.import_module(f"bench.recipes.{name}")
        assert "bench synthetic" in (module.__doc__ or ""), name


def test_doctor_sees_the_kernels_clash(monkeypatch) -> None:
    from bench.commands import doctor

    versions = {"kernels": "0.18.5"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_accepted_by_transformers", lambda: ">=0.18.2,<0.19.0")
    assert doctor.kernels_clash()[1] == "FAIL"
    versions["kernels"] = "0.17.2"
    assert doctor.kernels_clash()[1] == "ok"
    monkeypatch.setattr(doctor, "_accepted_by_transformers", lambda: None)
    assert doctor.kernels_clash()[1] == "note"
    del versions["kernels"]
    assert doctor.kernels_clash()[1] == "ok"
