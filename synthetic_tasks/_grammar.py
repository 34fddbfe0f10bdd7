"""Random grammars with hidden states, strings from them, and exact filters of the hidden state.

Source: SelectivBench / SymSeq. Every letter comes in `depth` hidden instances; a state and the next letter decide the next
state (unifilar), so the state can be tracked exactly once it is known. Shape legend: N examples, M symbols, S states,
A letters, D out-edges, depth d.
"""

from __future__ import annotations

import numpy as np

EDGE, STARTS = 0.4, 4
MAX_STRING = 200
"""Longest string, its end symbol included."""


class Grammar:
    """A grammar of `letters` letters and the end symbol, id `letters`.

    State s < A d is instance s mod d of letter s // d; the last state is the end. From each state each letter has an edge with
    probability 0.4, to a uniformly chosen instance; the end has one with probability 0.4 / d. Edges are equiprobable. A
    string begins in one of 4 start states; here they have different letters, so that the state is known from the first symbol on
    and the exact solver scores 100 % (published: 99.4 to 99.5). Grammars with a state that cannot reach the end are drawn again.

    Args:
        letters: number of letters A.
        depth: hidden instances a letter.
        rng: source of the grammar.
    """

    def __init__(self, letters: int, depth: int, rng: np.random.Generator) -> None:
        self.letters, self.depth = letters, depth
        self.end = letters * depth
        self.states = self.end + 1
        for _ in range(1000):
            self.next = self._edges(rng)
            if self._reaches_end(self.next):
                break
        else:
            raise ValueError(
                f"no grammar of {letters} letters with {depth} instances each lets every state reach the end in 1000 draws; "
                "use more letters"
            )
        first = rng.choice(letters, size=min(STARTS, letters), replace=False)
        self.starts = first * depth + rng.integers(0, depth, size=first.size)
        self.degree = (self.next >= 0).sum(axis=1)
        # Successors of each state, padded by S, a state of weight 0; the end is followed by the starts.
        width = max(int(self.degree.max()), self.starts.size)
        order = np.argsort(self.next < 0, axis=1, kind="stable")[:, :width]
        successors = np.take_along_axis(self.next, order, axis=1)
        self.successors = np.where(successors < 0, self.states, successors)
        self.successors[self.end] = self.states
        self.successors[self.end, : self.starts.size] = self.starts
        self.reach = self._reach()

    def _edges(self, rng: np.random.Generator) -> np.ndarray:
        """Next state by state and letter, -1 where there is no edge, [S, A + 1]; the row of the end is empty."""
        instance = rng.integers(0, self.depth, size=(self.states, self.letters))
        edge = rng.random((self.states, self.letters)) < EDGE
        table = np.full((self.states, self.letters + 1), -1)
        table[:, : self.letters] = np.where(edge, np.arange(self.letters) * self.depth + instance, -1)
        table[rng.random(self.states) < EDGE / self.depth, self.letters] = self.end
        table[self.end] = -1
        return table

    def _reaches_end(self, table: np.ndarray) -> bool:
        """Whether every state can reach the end."""
        good = np.arange(self.states) == self.end
        while True:
            more = good | (good[table] & (table >= 0)).any(axis=1)
            if (more == good).all():
                return bool(good.all())
            good = more

    def _reach(self) -> np.ndarray:
        """Probability of the end within m more symbols, [MAX_STRING + 1, S + 1]; the pad state never reaches it."""
        reach = np.zeros((MAX_STRING + 1, self.states + 1))
        reach[:, self.end] = 1
        inner = self.successors[: self.end]
        for m in range(1, MAX_STRING + 1):
            reach[m, : self.end] = reach[m - 1][inner].sum(axis=1) / self.degree[: self.end]
        return reach

    def letter(self, states: np.ndarray) -> np.ndarray:
        """The letter of each state; the end symbol for the end."""
        return states // self.depth

    def sample(self, rng: np.random.Generator, rows: int, symbols: int) -> np.ndarray:
        """State sequences of concatenated strings of at most `MAX_STRING` symbols, cut at `symbols`, [N, M] int64.

        Each successor is weighted by the probability that the end can still be reached in time, which is the law of free
        strings given that they are short enough, without rejecting any.
        """
        state = np.full(rows, self.end)
        left = np.full(rows, MAX_STRING)
        out = np.empty((rows, symbols), dtype=np.int64)
        for t in range(symbols):
            options = self.successors[state]
            weights = np.cumsum(self.reach[left[:, None] - 1, options], axis=1)
            draw = rng.random(rows) * weights[:, -1]
            state = options[np.arange(rows), (weights <= draw[:, None]).sum(axis=1)]
            left = np.where(state == self.end, MAX_STRING, left - 1)
            out[:, t] = state
        return out

    def occupancy(self) -> np.ndarray:
        """Fraction of symbols at which each state stands in long concatenations of strings, [S]."""
        flow = np.zeros((MAX_STRING + 1, self.states + 1))
        begin = self.reach[MAX_STRING - 1, self.starts]
        flow[MAX_STRING - 1, self.starts] = begin / begin.sum()
        inner = self.successors[: self.end]
        for m in range(MAX_STRING - 1, 0, -1):
            scale = flow[m, : self.end] / np.maximum(self.reach[m, : self.end] * self.degree[: self.end], 1e-300)
            np.add.at(flow[m - 1], inner, scale[:, None] * self.reach[m - 1][inner])
        total = flow[:, : self.states].sum(axis=0)
        return total / total.sum()

    def window_filters(self, letters: np.ndarray, windows: tuple[int, ...]) -> dict[int, np.ndarray]:
        """The likeliest state given nothing but the last k symbols, for each k.

        Args:
            letters: symbols [N, M].
            windows: the values of k, each at least 1.

        Returns:
            State ids [N, M] for each k; the first columns see as many symbols as there are.
        """
        begin, prior = self._priors()
        belief = prior[letters]
        found = {1: self._likeliest(belief, letters)}
        for k in range(2, max(windows) + 1):
            belief = np.concatenate([belief[:, :1], self._advance(belief, letters, begin, prior)], axis=1)
            found[k] = self._likeliest(belief, letters)
        return {k: found[k] for k in windows}

    def history_filter(self, letters: np.ndarray) -> np.ndarray:
        """The likeliest state given all symbols so far [N, M] and that the first begins a string, [N, M]."""
        begin, prior = self._priors()
        belief = begin[letters[:, :1]]
        out = np.empty_like(letters)
        for t in range(letters.shape[1]):
            if t:
                belief = self._advance(np.repeat(belief, 2, axis=1), letters[:, t - 1 : t + 1], begin, prior)
            out[:, t : t + 1] = self._likeliest(belief, letters[:, t : t + 1])
        return out

    def _priors(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of each letter's instances at the beginning of a string and anywhere, each [A + 1, d]."""
        anywhere, begin = np.zeros((2, (self.letters + 1) * self.depth))
        anywhere[: self.states] = self.occupancy()
        begin[self.starts] = 1
        prior = anywhere.reshape(-1, self.depth)
        return _normalised(begin.reshape(-1, self.depth), prior), _normalised(prior, prior)

    def _likeliest(self, belief: np.ndarray, letters: np.ndarray) -> np.ndarray:
        """The state of largest belief."""
        return np.where(letters == self.letters, self.end, letters * self.depth + belief.argmax(axis=2))

    def _advance(self, belief: np.ndarray, letters: np.ndarray, begin: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """Beliefs over the instances of symbols 1 .. M - 1 from those of symbols 0 .. M - 2, [N, M - 1, d].

        Args:
            belief: over the instances of each symbol, [N, M, d].
            letters: symbols [N, M].
            begin: over the instances of each letter at the beginning of a string, [A + 1, d].
            prior: over the instances of each letter anywhere, taken where the symbols seen are impossible, [A + 1, d].
        """
        before, after = letters[:, :-1], letters[:, 1:]
        state = np.minimum(before[..., None] * self.depth + np.arange(self.depth), self.end)
        target = self.next[state, after[..., None]]
        weight = np.where(target >= 0, belief[:, :-1] / np.maximum(self.degree[state], 1), 0.0)
        cell = np.arange(after.size).reshape(*after.shape, 1) * self.depth + np.maximum(target, 0) % self.depth
        moved = np.bincount(cell.ravel(), weight.ravel(), minlength=after.size * self.depth).reshape(*after.shape, self.depth)
        return np.where((before == self.letters)[..., None], begin[after], _normalised(moved, prior[after]))

    def distracted_filter(self, letters: np.ndarray, chance: float, first: int) -> np.ndarray:
        """The likeliest state after each symbol when some symbols are distractors, given the whole history.

        Args:
            letters: symbols [N, M], distractors among them.
            chance: probability of one distractor after a symbol: a uniform letter that the grammar does not allow there.
            first: number of the first symbol that may be followed by a distractor.

        Returns:
            State ids [N, M].
        """
        rows, symbols = letters.shape
        allowed = self.next[:, : self.letters] >= 0
        foreign = ~allowed / np.maximum((~allowed).sum(axis=1, keepdims=True), 1)
        # Beliefs over states: one may be followed by a distractor, the other has just been.
        clean, after = np.zeros((rows, self.states)), np.zeros((rows, self.states))
        clean[:, self.end] = 1
        out = np.empty((rows, symbols), dtype=np.int64)
        offset = np.arange(rows)[:, None] * self.states
        for t in range(symbols):
            letter = letters[:, t]
            odds = chance if t > first else 0.0
            distractor = clean * odds * np.where(letter[:, None] < self.letters, foreign[:, letter % self.letters].T, 0.0)
            source = clean * (1 - odds) + after
            target = self.next[:, letter].T
            weight = np.where(target >= 0, source / np.maximum(self.degree, 1), 0.0)
            clean = np.bincount((offset + np.maximum(target, 0)).ravel(), weight.ravel(), minlength=rows * self.states)
            clean = clean.reshape(rows, -1)
            starting = self.starts[None] * np.ones((rows, 1), dtype=np.int64)
            share = source[:, self.end :] / self.starts.size * (self.letter(starting) == letter[:, None])
            np.put_along_axis(clean, starting, np.take_along_axis(clean, starting, axis=1) + share, axis=1)
            after = distractor
            total = np.maximum((clean + after).sum(axis=1, keepdims=True), 1e-300)
            clean, after = clean / total, after / total
            out[:, t] = (clean + after).argmax(axis=1)
        return out


def _normalised(weights: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Weights summing to 1 along the last axis, `fallback` (normalised too) where they are all 0."""
    weights = np.where(weights.sum(axis=-1, keepdims=True) > 0, weights, fallback)
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
