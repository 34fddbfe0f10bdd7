"""Documents of a text source: local files, Hugging Face data sets, and what installed packages ship."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from bench.convert.spec import Source
from bench.errors import UserError

TEXT_FILES = (".txt", ".md", ".rst", ".jsonl", ".py")
FIELDS = ("text", "content", "document")
"""Names under which data sets keep running text."""
SHORTEST = 200
"""Shorter documents of packages are names and stubs, not prose."""


def documents(source: Source) -> Iterator[str]:
    """Every document of a source, in an order that does not change.

    Raises:
        UserError: the file, folder or data set does not exist or holds no text.
    """
    if source.kind == "text":
        return _files(Path(source.where).expanduser())
    if source.kind == "dataset":
        return _dataset(source.where)
    return _packages()


def _files(path: Path) -> Iterator[str]:
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise UserError(f"There is no text file or folder {path}.")
    found = sorted(file for file in path.rglob("*") if file.suffix in TEXT_FILES)
    if not found:
        raise UserError(f"The folder {path} holds no text; looked for {', '.join(TEXT_FILES)}.")
    return (text for file in found for text in _file(file))


def _file(path: Path) -> Iterator[str]:
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                raise UserError(f"Line {number} of {path} is not JSON.") from None
            yield str(row[_field(list(row), str(path))])


def _dataset(name: str) -> Iterator[str]:
    """A data set as `name`, `name:config` or `name:config:split`, streamed."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise UserError("The source dataset: needs the package datasets; `pip install 'mixer-bench[eval]'` adds it.") from None
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"The data set {name!r} cannot be loaded{offline}: {type(error).__name__}; without a hub use text:PATH, packages, "
            "or corpus:DIR from `bench sample`."
        ) from error
    field = ""
    for row in rows:
        field = field or _field(list(row), name)
        yield str(row[field])


def _field(names: list[str], where: str) -> str:
    for name in FIELDS:
        if name in names:
            return name
    raise UserError(f"{where} has the fields {', '.join(names)}; text is expected in {' or '.join(FIELDS)}.")


def _packages() -> Iterator[str]:
    """Python's own documentation topics, the readme of every installed package, and the standard library's source."""
    from importlib.metadata import distributions
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()))
    readmes = {dist.metadata["Name"]: cast(Any, dist.metadata).get_payload() for dist in distributions()}
    yield from (str(text) for _, text in sorted(readmes.items()) if isinstance(text, str) and len(text) > SHORTEST)
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if "site-packages" not in file.parts and "test" not in file.parts:
            text = file.read_text(encoding="utf-8", errors="replace")
            if len(text) > SHORTEST:
                yield text
