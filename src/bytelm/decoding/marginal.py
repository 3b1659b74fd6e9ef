"""P(byte | bytes) of a token model, exactly: a sum over the tokenizations of what was read.

A document's tokens are its canonical ones, those of `Bpe.encode`. So the token model is conditioned on that, locally:
after each history the ids with which the encoding of no document goes on have no probability, and neither have
specials, but EOS where the history is the encoding of a whole document; the rest is renormalised. Then

    P(document begins with bytes b) = sum of P(t) · P(next token begins with b[p:] | t)

over every canonical history t whose bytes are b[:p], p < len(b), and P(next byte | b) is a quotient of two of these:

    P(x | b) = sum of P(t) · P(next token begins with b[p:] x | t) / P(b)          p <= len(b)
    P(EOS | b) = sum of P(t) · P(EOS | t) / P(b)                                   p = len(b)

This is a distribution over 256 bytes and EOS, and the product over a document's bytes and its EOS is the probability of
its canonical tokens and EOS. (Sums over covers: Phan et al. 2024, "Exact Byte-Level Probabilities from Tokenized
Language Models for FIM-Tasks and Model Ensembles"; Hayase et al. 2025, "Sampling from Your Language Model One Byte at a
Time". Conditioning on canonical encodings, locally: Vieira et al. 2025, "Language Models over Canonical Byte-Pair
Encodings".)

It takes few histories, as those of a word that is complete are one, and for each place in the open word there is one,
or two after whitespace (`data.canonical`). They form a tree, of which the token model reads each node once where bytes
are read in chunks: branch by branch, each rolled back before the next.

Bytes that do not begin with BOS, as in a window within a document, are read as if the document began there, without its
BOS: a word begins at the first byte, and the first token is any with equal probability.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytelm.data.canonical import START, Canonical, Place, has, part
from bytelm.interfaces.decoder import Decoder, Ints, NewTokens, Reals, Wanted
from bytelm.units import BYTES, EOS, VOCAB

NEVER = -10_000.0  # log of a probability that is 0 in any precision, but with which one can calculate
HELD = 1 << 22  # probabilities of a row that are held at once


@dataclass(eq=False, slots=True)
class Node:
    """A history: a canonical sequence of ids, the last of which is `id`."""

    parent: Node | None
    id: int
    token: int
    """The number of the sorted token; -1 for a special."""
    depth: int
    """Ids before the last one."""
    end: int
    """Ids of the row, bytes and specials, that the history stands for."""
    place: Place
    nats: float | None = None
    """-log P(id | the parent), where it was needed."""
    scores: NDArray[np.float64] | None = None
    """log P(sorted token | the history) `[tokens]`, -inf for those that cannot follow; None where it is not held."""
    ending: float = -np.inf
    """log P(EOS | the history), with `scores`."""


class Open(NamedTuple):
    """A history from which tokens reach beyond the bytes read: the sorted ones from `low` to `high` begin with them."""

    node: Node
    low: int
    high: int


class Tree:
    """The histories of one row."""

    def __init__(self, words: Canonical) -> None:
        self.words = words
        self.open: list[list[Open]] = [[]]
        """The histories that are open after so many ids."""

    def extend(self, id: int) -> None:
        """Read the next id."""
        end, before = len(self.open), self.open[-1]
        if id >= BYTES:
            parent = next((o.node for o in before if o.node.end == end - 1 and o.node.place.ends), None)
            depth = 0 if parent is None else parent.depth + 1
            self.open.append([self.fresh(Node(parent, id, -1, depth, end, START))])
            return
        if end == 1:
            before = [self.fresh(self.without_bos())]
        found: list[Open] = []
        ended: list[Open] = []
        for node, low, high in before:
            at = end - 1 - node.end
            low += at > 0 and int(self.words.sizes[low]) == at  # the token that ended before this id
            column = self.words.bytes[low:high, at]
            low, high = low + int(np.searchsorted(column, id)), low + int(np.searchsorted(column, id, "right"))
            if low == high:
                continue
            allowed = self.words.allowed(node.place, node.id)
            ends = int(self.words.sizes[low]) == at + 1
            if part(allowed, low + ends, high).any():
                found.append(Open(node, low, high))
            if ends and has(allowed, low):
                place = self.words.after(node.place, node.id, low)
                ended.append(self.fresh(Node(node, int(self.words.ids[low]), low, node.depth + 1, end, place)))
        self.open.append(found + ended)

    def fresh(self, node: Node) -> Open:
        """A history none of whose next token was read."""
        return Open(node, 0, len(self.words.ids))

    def without_bos(self) -> Node:
        """The history of nothing at all, after which every token is as likely as every other."""
        size = len(self.words.ids)
        return Node(None, -1, -1, -1, 0, START, scores=np.full(size, -np.log(size)))

    def needed(self, length: int) -> Iterator[Node]:
        """The histories whose scores `logits` needs after so many ids."""
        _, below = trunk(self.open[length])
        yield from (o.node for o in self.open[length])
        yield from (node.parent for node in below if node.nats is None and node.parent is not None)

    def logits(self, length: int) -> NDArray[np.float64]:
        """log P of each byte and of EOS after so many ids, `[VOCAB]`; NEVER for other specials."""
        opened, weight = self.open[length], self.weights(length)
        parts = [(self.longer(o, length), o) for o in opened]
        scores = [weight[o.node] + o.node.scores[low : o.high] for low, o in parts if o.node.scores is not None]
        endings = [weight[o.node] + o.node.ending for o in opened if o.node.end == length]
        top = max(*(float(some.max()) for some in scores), *endings, -np.inf)
        total = np.zeros(VOCAB)
        for (low, o), some in zip(parts, scores, strict=True):
            column = self.words.bytes[low : o.high, length - o.node.end]
            total[:BYTES] += np.bincount(column, np.exp(some - top), BYTES)
        total[EOS] = sum(float(np.exp(ending - top)) for ending in endings)
        with np.errstate(divide="ignore"):
            return np.maximum(np.log(total) - np.log(total.sum()), NEVER)

    def longer(self, opened: Open, length: int) -> int:
        """The first of its tokens that reaches beyond `length` ids."""
        at = length - opened.node.end
        return opened.low + int(at > 0 and int(self.words.sizes[opened.low]) == at)

    def weights(self, length: int) -> dict[Node, float]:
        """log P of each open history given the one that all of them begin with."""
        top, below = trunk(self.open[length])
        weight = {top: 0.0}
        for node in reversed(below):
            assert node.parent is not None
            if node.nats is None:
                assert node.parent.scores is not None
                node.nats = -float(node.parent.scores[node.token])
            weight[node] = weight[node.parent] - node.nats
        return weight


def trunk(opened: Iterable[Open]) -> tuple[Node, list[Node]]:
    """The longest history with which all of some begin, and those between it and them, the longest first."""
    level, below = {o.node for o in opened}, list[Node]()
    while len(level) > 1:
        node = max(level, key=lambda node: node.depth)
        assert node.parent is not None
        below.append(node)
        level.remove(node)
        level.add(node.parent)
    return level.pop(), below


class ByteDecoder(Decoder):
    """The bytes of a token model, by a decoder of its tokens; see `bytewise.bytewise`."""

    prefills = True

    def __init__(self, inner: Decoder, words: Canonical, capacity: int) -> None:
        """`inner`: of as many rows, of the same capacity: a history has no more tokens than bytes."""
        super().__init__(inner.rows, capacity)
        self.inner, self.words = inner, words
        self.repeats, self.thread_pool = inner.repeats, inner.thread_pool
        self.chunk = max(1, min(inner.chunk, HELD // len(words.ids)))
        self.trees = [Tree(words) for _ in range(inner.rows)]
        self.paths: list[list[Node]] = [[] for _ in range(inner.rows)]
        """What each row of the inner decoder has read."""
        self.held: list[set[Node]] = [set() for _ in range(inner.rows)]
        """The histories of each row whose scores are held."""
        self.exact = False
        """Whether the token model computes in float64; known once it was asked."""

    def rollback(self, rows: Ints, lengths: Ints) -> None:
        """See `Decoder`: to any length."""
        super().rollback(rows, lengths)
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            del self.trees[row].open[length + 1 :]

    def reusable(self, row: int, length: int) -> int:
        """See `Decoder`: all of it."""
        return length

    def logits_after(self, new: NewTokens) -> Any:
        """See `Decoder`."""
        return self.wanted_logits(new, None)

    def wanted_logits(self, new: NewTokens, wanted: Wanted | None) -> Any:
        """See `Decoder`."""
        for row, id in zip(new.row.tolist(), new.ids.tolist(), strict=True):
            self.trees[row].extend(id)
        asked = [(row, at + 1) for row, at in zip(new.row.tolist(), new.position.tolist(), strict=True)]
        if wanted is not None:
            asked = [place for place, want in zip(asked, wanted.tolist(), strict=True) if want]
        needed: dict[int, set[Node]] = {}
        for row, length in asked:
            nodes = needed.setdefault(row, set())
            nodes.update(node for node in self.trees[row].needed(length) if node.scores is None)
        self.read_nodes(needed)
        found = np.array([self.trees[row].logits(length) for row, length in asked]).reshape(-1, VOCAB)
        for row, nodes in needed.items():
            still = {opened.node for opened in self.trees[row].open[-1]}
            for node in (self.held[row] | nodes) - still:
                node.scores = None
            self.held[row] = (self.held[row] | nodes) & still
        return found if self.exact else found.astype(np.float32)

    def read_nodes(self, needed: dict[int, set[Node]]) -> None:
        """Give nodes their scores: those of each row in an order in which none is read twice, all rows in step."""
        pieces = {row: self.pieces(row, nodes) for row, nodes in sorted(needed.items())}
        while pieces:
            parts = {row: piece for row, more in pieces.items() if (piece := next(more, None))}
            pieces = {row: more for row, more in pieces.items() if row in parts}
            if not parts:
                return
            rows = np.array(list(parts)).repeat([len(piece) for piece in parts.values()])
            nodes = [node for piece in parts.values() for node in piece]
            wanted = np.array([node in needed[row] for row, node in zip(rows.tolist(), nodes, strict=True)])
            logits = self.inner.read(rows, np.array([node.id for node in nodes]), wanted)
            for row, piece in parts.items():
                self.paths[row] += piece
            for place, line in zip(wanted.nonzero()[0].tolist(), logits, strict=True):
                self.score(nodes[place], line)

    def pieces(self, row: int, needed: set[Node]) -> Iterator[list[Node]]:
        """What the inner row reads, call by call, rolled back before where a branch ends."""
        path, inner = self.paths[row], self.inner
        for branch in branches(needed, path):
            parent = branch[0].parent
            length = 0 if parent is None else parent.depth + 1
            kept = inner.reusable(row, length)
            inner.rollback(np.array([row]), np.array([kept]))
            del path[kept:]
            while parent is not None and parent.depth >= kept:
                branch.insert(0, parent)
                parent = parent.parent
            for at in range(0, len(branch), inner.chunk):
                yield branch[at : at + inner.chunk]

    def score(self, node: Node, logits: Reals) -> None:
        """The scores after a node from the logits of the token model `[vocabulary]`: see the head of this file."""
        self.exact = logits.dtype == np.float64
        words = self.words
        allowed = part(words.allowed(node.place, node.id), 0, len(words.ids))
        scores = np.where(allowed, logits[words.ids].astype(np.float64), -np.inf)
        ending = float(logits[EOS]) if node.place.ends else -np.inf
        top = max(float(scores.max()), ending)
        total = top + np.log(np.exp(scores - top).sum() + np.exp(ending - top))
        node.scores, node.ending = scores - total, ending - total

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.inner.row_bytes + self.ids[0].nbytes + self.chunk * len(self.words.ids) * 8

    def traffic(self, length: int) -> float:
        """See `Decoder`; a byte takes a step of the inner decoder, or two after whitespace."""
        return self.inner.traffic(length)


def branches(needed: set[Node], path: list[Node]) -> Iterator[list[Node]]:
    """Nodes to be read, and those before them that are not on the path: branches, each below the path or one before.

    Of the branches at a node the one that reaches farthest is last, and so are those at earlier nodes of the path.
    """
    children: dict[Node | None, list[Node]] = {}
    known: set[Node] = set()
    for node in sorted(needed, key=lambda node: (-node.end, -node.depth)):
        above: Node | None = node
        while above is not None and above.depth >= 0 and above not in known and (above is node or not on(path, above)):
            known.add(above)
            children.setdefault(above.parent, []).append(above)
            above = above.parent
    starts = sorted(
        (node for node in children if node not in known), key=lambda node: -1 if node is None else node.depth
    )
    waiting = [node for start in starts for node in children[start]]
    branch: list[Node] = []
    while waiting:
        node = waiting.pop()
        if branch and node.parent is not branch[-1]:
            yield branch
            branch = []
        branch.append(node)
        waiting += children.get(node, [])
    if branch:
        yield branch


def on(path: list[Node], node: Node) -> bool:
    """Whether a node is on a path."""
    return node.depth < len(path) and path[node.depth] is node
