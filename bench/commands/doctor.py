"""`bench doctor`: is this installation able to do its work?"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from rich.table import Table

from bench import __version__
from bench.commands.console import Output
from bench.errors import UserError
from bench.provenance import cpu_name, versions
from bench.store import Store

AGREEMENT = 1e-4
"""Largest relative error of a recurrence in fp32."""

Finding = tuple[str, str, str]
"""What was looked at, "ok", "note" or "FAIL", and what was found."""


def run(root: Path, output: Output) -> int:
    """Prints what was found.

    Returns:
        The exit code: 1 if something must be mended, else 0.
    """
    findings = [
        ("versions", "ok", ", ".join(f"{name} {number}" for name, number in {**versions(), "bench": __version__}.items())),
        ("cpu", "ok", cpu_name()),
        _gpu(),
        _triton(),
        _kernels(),
        *(_extra(name) for name in ("eval", "gpu", "ray", "slurm", "dev")),
        kernels_clash(),
        _store(root),
    ]
    table = Table(title="bench doctor")
    for column in ("what", "result", "found"):
        table.add_column(column, overflow="fold")
    for what, result, found in findings:
        table.add_row(what, result, found)
        output.emit("finding", {"what": what, "result": result, "found": found})
    output.console.print(table)
    return 1 if any(result == "FAIL" for _, result, _ in findings) else 0


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return "gpu", "note", "torch sees no CUDA device; everything runs on the CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "gpu", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}"


def _triton() -> Finding:
    from torch.utils._triton import has_triton

    if importlib.util.find_spec("triton") is None:
        return "triton", "note", "not installed; the torch kernels are used"
    if not has_triton():
        return "triton", "note", f"triton {version('triton')} is installed but has no GPU to compile for"
    from kernels.assembler import tensor_core_obstacle

    if (obstacle := tensor_core_obstacle()) is not None:
        return "triton", "note", f"triton {version('triton')}: {obstacle}; until then recurrences and sparse attention run in torch"
    return "triton", "ok", f"triton {version('triton')} can compile for this GPU"


def _kernels() -> Finding:
    """Every kind of recurrence on a small problem against its definition, while kernels look at the values they are given."""
    import torch

    from kernels.dispatch import watched
    from kernels.recurrence import linear_recurrence
    from kernels.reference import linear_recurrence_reference
    from kernels.values import checked_values

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, gate = torch.randn(4, 1, 70, 2, 32, device=device, generator=generator).unbind(0)
    k, decay = torch.nn.functional.normalize(k, dim=-1), torch.nn.functional.logsigmoid(gate)
    errors: list[float] = []
    with watched() as seen, checked_values():
        for log_decay in (None, decay[..., 0], decay):
            for beta in (None, gate[..., 0].sigmoid()):
                o, _ = linear_recurrence(q, k, v, log_decay=log_decay, beta_BTH=beta)
                decay_64, beta_64 = (None if x is None else x.double() for x in (log_decay, beta))
                true, _ = linear_recurrence_reference(q.double(), k.double(), v.double(), log_decay=decay_64, beta_BTH=beta_64)
                errors.append(float((o - true).norm() / true.norm()))
        try:
            linear_recurrence(q, k, v, log_decay=-decay[..., 0])
        except ValueError:
            refused = True
        else:
            refused = False
    what = f"the {seen['linear_recurrence']} recurrences on {device}"
    if not all(error <= AGREEMENT for error in errors):  # NaN is no agreement
        return "kernels", "FAIL", f"{what} differ from their definition, by " + ", ".join(f"{error:.0e}" for error in errors)
    if not refused:
        return "kernels", "FAIL", f"{what} accept a gate that grows, although values are looked at"
    return "kernels", "ok", f"{what} are their definition to {max(errors):.0e} in fp32"


def _extra(name: str) -> Finding:
    """Whether the packages of an optional extra are there."""
    try:
        wanted = [text for text in requires("mixer-bench") or [] if f"extra == '{name}'" in text or f'extra == "{name}"' in text]
    except PackageNotFoundError:
        return f"extra {name}", "note", "mixer-bench is not installed as a package; run `pip install -e .`"
    missing = []
    for text in wanted:
        package = re.split(r"[<>=~!;\[ ]", text, maxsplit=1)[0]
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return f"extra {name}", "note", f"without {', '.join(missing)}; `pip install 'mixer-bench[{name}]'` adds it"
    return f"extra {name}", "ok", "installed"


def kernels_clash() -> Finding:
    """Whether a foreign distribution named `kernels` would take the place of ours inside transformers.

    Hugging Face publishes a package imported as `kernels`. transformers imports from it if its version lies in the range
    that transformers accepts, finds our folder of that name instead, and fails.
    """
    try:
        foreign = version("kernels")
    except PackageNotFoundError:
        return "kernels name", "ok", "no foreign package named kernels"
    accepted = _accepted_by_transformers()
    if accepted is None:
        return "kernels name", "note", f"kernels {foreign} is installed beside ours; transformers is not, so nothing clashes"
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(accepted).contains(foreign, prereleases=True):
        return (
            "kernels name",
            "FAIL",
            f"kernels {foreign} makes transformers import our kernels folder; `pip uninstall kernels`",
        )
    return "kernels name", "ok", f"kernels {foreign} is outside the range {accepted} that transformers would import"


def _accepted_by_transformers() -> str | None:
    """The versions of `kernels` that the installed transformers accepts, or None without transformers."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    table = Path(spec.origin).with_name("dependency_versions_table.py")
    found = re.search(r'"kernels":\s*"kernels([^"]*)"', table.read_text()) if table.exists() else None
    return found[1] if found else ""


def _store(root: Path) -> Finding:
    try:
        Store(root).check_writable()
    except UserError as error:
        return "store", "FAIL", str(error)
    return "store", "ok", f"{root} can be written"
