"""Influence maps as pictures: how much of what moves an output comes from where, with the links a query should find.

The file's row t holds the norm of d h_t / d x_s for every input position s. Here each row is divided by its sum over the
*earlier* positions: a token's influence on its own output needs no memory and is left out.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOUR = (0x2F, 0x7F, 0xC4)
"""Readable on white and on dark; the strength of an influence is the pixel's opacity."""
LEVELS = 32
MAX_PIXELS = 128


@dataclass(frozen=True)
class Link:
    """A query and where its answer stood, as positions in the sequence.

    Args:
        query: position of the query.
        source: position of the answer, or of the key where the answer's is unknown.
        share: part of the query's influence that lies on its key and its answer, 0 to 1.
        uniform: the same part if all earlier positions counted alike.
    """

    query: int
    source: int
    share: float
    uniform: float


@dataclass(frozen=True)
class Picture:
    """An influence map ready for the page.

    Args:
        length: sequence length.
        png: the map as a data URI, transparent where there is no influence.
        links: the queries.
        alt: what the picture shows, in words.
    """

    length: int
    png: str
    links: list[Link]
    alt: str

    @property
    def share(self) -> float | None:
        """Mean share over the queries."""
        return float(np.mean([link.share for link in self.links])) if self.links else None

    @property
    def uniform(self) -> float | None:
        """Mean uniform share over the queries."""
        return float(np.mean([link.uniform for link in self.links])) if self.links else None


def picture(arrays: dict[str, Any], name: str) -> Picture:
    """The picture of one run's influence file.

    Args:
        arrays: `map` [T, T], `query_positions`, `key_positions` and `value_positions` [Q], -1 where there is none.
        name: the point's name, for the text alternative.

    Raises:
        KeyError: an array is missing.
        ValueError: the shapes do not fit.
    """
    share_TT = past_shares(np.asarray(arrays["map"], dtype=float))
    links = _links(share_TT, arrays)
    return Picture(len(share_TT), _png(share_TT), links, _alt(name, len(share_TT), links))


def past_shares(map_TT: np.ndarray) -> np.ndarray:
    """Each row over its sum before the diagonal; rows without influence from the past stay zero.

    Raises:
        ValueError: the map is not square or not finite.
    """
    if map_TT.ndim != 2 or map_TT.shape[0] != map_TT.shape[1] or not np.isfinite(map_TT).all():
        raise ValueError(f"an influence map is a finite square matrix; given shape {map_TT.shape}")
    past = np.tril(map_TT, -1)
    total = past.sum(axis=1, keepdims=True)
    return np.divide(past, total, out=np.zeros_like(past), where=total > 0)


def _links(share_TT: np.ndarray, arrays: dict[str, Any]) -> list[Link]:
    """The queries whose answer or key stands in the sequence before them."""
    columns = (arrays["query_positions"], arrays["key_positions"], arrays["value_positions"])
    links = []
    for query, key, value in zip(*(np.asarray(column).tolist() for column in columns), strict=True):
        sources = sorted({position for position in (key, value) if 0 <= position < query})
        if sources:
            share = float(share_TT[query, sources].sum())
            links.append(Link(query, value if value in sources else sources[0], share, len(sources) / query))
    return links


def _alt(name: str, length: int, links: list[Link]) -> str:
    """The picture in words: each query's share, and what a mixer that ignores content would have."""
    if not links:
        return f"Influence map of {name} over {length} tokens; no query has its answer in the sequence."
    mean, uniform = np.mean([link.share for link in links]), np.mean([link.uniform for link in links])
    each = "; ".join(f"position {link.query}: {100 * link.share:.0f} % from {link.source}" for link in links[:16])
    more = f"; and {len(links) - 16} more" if len(links) > 16 else ""
    return (
        f"Influence map of {name} over {length} tokens with {len(links)} queries. On average {100 * mean:.0f} % of the past's "
        f"influence on a query lies on its own key and value; even attention to all would give {100 * uniform:.0f} %. "
        f"By query: {each}{more}."
    )


def _png(share_TT: np.ndarray) -> str:
    """A palette image with one hue; opacity is the square root of the share, so that weak links stay visible."""
    from PIL import Image

    factor = -(-len(share_TT) // MAX_PIXELS)
    if factor > 1:
        # The largest value of a block, so that single strong links survive the reduction.
        pad = -len(share_TT) % factor
        padded = np.pad(share_TT, (0, pad))
        blocks = len(padded) // factor
        share_TT = padded.reshape(blocks, factor, blocks, factor).max(axis=(1, 3))
    levels = np.rint(np.sqrt(np.clip(share_TT, 0, 1)) * (LEVELS - 1)).astype(np.uint8)
    image = Image.fromarray(levels).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(list(COLOUR) * LEVELS)
    buffer = io.BytesIO()
    opacity = bytes(round(255 * level / (LEVELS - 1)) for level in range(LEVELS))
    image.save(buffer, "PNG", transparency=opacity, optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
