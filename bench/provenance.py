"""Where a number comes from: commit, uncommitted changes, code hashes, versions, hardware and the command."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import catalog
from bench.records import Provenance
from bench.spec import RunSpec, digest

PACKAGES = ("mixer-bench", "torch", "triton", "numpy", "einops")


def code_hashes(spec: RunSpec) -> dict[str, str]:
    """Source hashes of the mixers and the task of a run, which are part of its identity, by "mixer:<name>", "task:<name>"."""
    hashes = {f"mixer:{layer.mixer}": catalog.source_hash(catalog.source_file("mixer", layer.mixer)) for layer in spec.model.layers}
    hashes[f"task:{spec.task.name}"] = catalog.source_hash(catalog.source_file("task", spec.task.name))
    return hashes


def identity_code(spec: RunSpec) -> str:
    """One hash of `code_hashes`: a changed mixer or task makes a new run."""
    return digest(code_hashes(spec))


TRAINER = (
    "build", "capture", "data", "dropout", "ends", "evaluate", "fleet", "graph_passes", "joined_rows", "long_sums", "member",
    "model", "scoring", "stacked", "streamed", "train", "two_terms",
)  # fmt: skip
"""Modules that decide how a run trains and is scored."""


@cache
def shared_hashes() -> dict[str, str]:
    """Source hashes of the modules that every run uses; not part of the identity, but the report warns when they mix."""
    root = catalog.package_dir("bench").parent
    folders = {
        "kernels": sorted((root / "kernels").rglob("*.py")),
        "mixers": sorted((root / "mixers").glob("_*.py")),
        "tasks": sorted((root / "synthetic_tasks").glob("_*.py")),
        "trainer": [root / "bench" / f"{name}.py" for name in TRAINER],
    }
    return {f"shared:{key}": digest([catalog.source_hash(path) for path in paths]) for key, paths in folders.items()}


def collect(spec: RunSpec, hardware: dict[str, str]) -> Provenance:
    """The provenance of a run that happens now, in this process."""
    return now({**code_hashes(spec), **shared_hashes()}, versions(), hardware)


def collect_speed(mixers: Iterable[str], hardware: dict[str, str]) -> Provenance:
    """The provenance of a speed that is measured now; `mixers` are those that took part."""
    code = {f"mixer:{name}": catalog.source_hash(catalog.source_file("mixer", name)) for name in mixers}
    return now(code | {key: shared_hashes()[key] for key in ("shared:kernels", "shared:mixers")}, versions(), hardware)


def now(code: dict[str, str], found: dict[str, str], hardware: dict[str, str]) -> Provenance:
    """The provenance of what happens now, in this process.

    Args:
        code: hashes of the source that took part.
        found: versions of packages.
        hardware: where it ran.
    """
    commit, dirty, diff_hash = git_state()
    return Provenance(
        commit=commit,
        dirty=dirty,
        diff_hash=diff_hash,
        code=code,
        versions=found,
        hardware=hardware,
        command=os.environ.get("BENCH_COMMAND") or command_line(sys.argv),
    )


def command_line(argv: list[str]) -> str:
    """The command as a user would type it again."""
    return shlex.join([Path(argv[0]).name, *argv[1:]])


@cache
def git_state() -> tuple[str | None, bool | None, str | None]:
    """Commit, dirty flag and hash of the uncommitted changes; `BENCH_COMMIT` names the commit where there is no repository."""
    root = catalog.package_dir("bench").parent

    def git(*arguments: str) -> bytes | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    commit = git("rev-parse", "HEAD")
    if commit is None or not (root / ".git").exists():
        return os.environ.get("BENCH_COMMIT"), None, None
    diff = (git("diff", "HEAD") or b"") + (git("ls-files", "--others", "--exclude-standard") or b"")
    return commit.decode().strip(), bool(diff), hashlib.sha256(diff).hexdigest()[:12] if diff else None


@cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Model name of the CPU, with the number of cores this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {usable_cores()} cores"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
