r"""Segmentation of a completion into reasoning steps (BCPG-NSA, arXiv 2505.14403), at edges of its tokens.

A splitter proposes boundaries; those are kept that cut no formula, and pieces are joined or cut to a range of
tokens. What follows the reasoning block, from `</think>` on, is the last step: the final answer.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pns.algo.formatting import THINK_TAGS
from pns.algo.formulas import TAG, Whole, cuts, wholes

# The positions of a text where a sentence begins: increasing, without 0 and the text's length.
Splitter = Callable[[str], list[int]]

_OPENING, _CLOSING = THINK_TAGS
_NO_CONTENT = re.compile(rf"(?:\s|{TAG.pattern})*+")

# Sentence ends: the mark, what closes quotes, brackets, emphasis and formulas, and white space; behind a
# displayed formula a capital letter is enough.
_END = re.compile(
    r"(?P<wide>[。！？｡]++[”’」』）】》\"')\]]*+\s*+)"
    r"|(?P<display>[.!?]\s*+(?:\\\]|\$\$|\\end\{[A-Za-z]+\*?\})(?=[A-Z]))"
    r"|(?<![.!?…])(?P<mark>[.!?…]++)(?:[\"'”’»)\]}*_`]|\$\$?|\\[\])])*+(?:\s++|\Z)"
    r"|(?P<line>[\r\n]\s*+)"
)
_ABBREVIATIONS = set(
    "e.g E.g i.e I.e vs cf viz resp approx Dr Mr Mrs Ms Prof St Fig Figs Eq Eqs Eqn eq eqs eqn Thm Lem Prop "
    "Cor Def Ch Sec Ref Refs pp w.l.o.g w.r.t s.t i.i.d".split()
)
# May end a sentence; before a small letter they do not.
_UNITS = set("etc al in ft oz lb lbs hr hrs min sec sq cu mi yd km cm mm kg inc ltd jr sr".split())
_NUMBERED = set("no nos vol".split())  # before a digit
# Words that begin a sentence and are no family names.
_OPENERS = set(
    "a also an and as at because but by each finally for hence he however if in it let next note now on she "
    "since so that the then there therefore these they this thus to wait we what when where which".split()
)
_LAST_WORD = re.compile(r"[A-Za-z][A-Za-z.]*\Z")
_LAST_TWO_WORDS = re.compile(r"(?:([A-Za-z]+\.?)[ \u00a0])?([A-Z])\Z")
_FIRST_WORD = re.compile(r"[A-Za-z]+")
_HEAD = re.compile(
    rf"(?:{TAG.pattern})?[\s>*_#(+•-]*(?:(?:step|case|part|claim|lemma|theorem|method|example|solution)\s+)?"
    r"(?:\d{1,3}|[a-z]|[ivx]{1,4})",
    re.IGNORECASE,
)
_MAX_HEAD = 40  # characters


@dataclass(frozen=True)
class Segment:
    """One step: text[start:end] and token_ids[first_token:end_token]."""

    start: int
    end: int
    first_token: int
    end_token: int


def sentences(text: str) -> list[int]:
    r"""Boundaries at the ends of sentences and lines, a `Splitter`; white space belongs to what it follows.

    None in a formula, in balanced braces or in code (`pns.algo.formulas.wholes`); one before `</think>`, none
    after it. A full stop in a number, after an abbreviation, an initial or the head of a numbered list ends
    no sentence, nor does the exclamation mark of a factorial."""
    parts = wholes(text)
    ends: list[int] = []
    for match in _END.finditer(text):
        if not cuts(match.end(), parts) and _ends_sentence(text, match, ends[-1] if ends else 0):
            ends.append(match.end())
    return _boundaries(text, ends, parts)


def segment(
    text: str,
    offsets: Sequence[tuple[int, int]],
    min_tokens: int,
    max_tokens: int,
    split: Splitter = sentences,
) -> list[Segment]:
    r"""Cut a completion into steps of `min_tokens`..`max_tokens` tokens; joined they are the text, and every
    token belongs to exactly one.

    `offsets` (T,) are the characters of each token (`token_offsets`); characters before the first token
    belong to the first step. A boundary of `split` inside a token moves to an edge of the token, and counts
    only where it cuts nothing of `pns.algo.formulas.wholes`. Pieces are joined until they have `min_tokens`.
    One of more than `max_tokens` is cut at a line end (of code), else behind `;`, `:` or `,`, else at white
    space, else between tokens, never in a formula: a longer formula stays. A step may be shorter where
    joining it would exceed `max_tokens`, and before `</think>`. From the last `</think>` on the text is one
    step, whatever its length; a reasoning block without content is none.

    Raises ValueError where `min_tokens` and `max_tokens` are no range, and for offsets beyond the text."""
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"steps of {min_tokens}..{max_tokens} tokens: no range")
    if offsets and max(end for _, end in offsets) > len(text):
        raise ValueError(f"offsets go beyond the text of {len(text)} characters")
    if not text and not offsets:
        return []
    parts = wholes(text)
    edges = _Edges(text, offsets, parts, min_tokens, max_tokens)
    at_tags = {tag.start() for tag in TAG.finditer(text)}
    ends_of_regions: list[int] = []
    ends_of_pieces: list[int] = []
    for position in _boundaries(text, split(text), parts):
        edge = edges.nearest(position, must=text.startswith(_CLOSING, position))
        if edge is not None:
            ends = ends_of_regions if position in at_tags else ends_of_pieces
            ends += [edge] if edge not in (*ends[-1:], 0, edges.last) else []
    has_answer = _CLOSING in text
    regions = list(pairwise([0, *ends_of_regions, edges.last]))
    steps: list[tuple[int, int]] = []
    for index, (first, last) in enumerate(regions):
        if has_answer and index == len(regions) - 1:
            steps.append((first, last))
            continue
        inner = ends_of_pieces[bisect_right(ends_of_pieces, first) : bisect_left(ends_of_pieces, last)]
        pieces = [
            piece for long in pairwise([first, *inner, last]) for piece in pairwise(edges.cut_long(*long))
        ]
        steps += edges.joined(pieces)
    return [
        Segment(edges.places[first], edges.places[last], edges.tokens[first], edges.tokens[last])
        for first, last in steps
    ]


def token_offsets(
    token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], text: str
) -> list[tuple[int, int]]:
    """The characters of `text` that each token covers: (T,) ranges that follow one another up to the end.

    `text` is `decode(token_ids)`. What `decode` writes before any token (`pns.data.prompts.Prompts.decode`:
    the prompt's prefix) is of no token. A token that writes nothing (a special one, or the first bytes of a
    character that a later token completes) covers an empty range. Calls of `decode` are of few tokens, linear
    in number. Raises ValueError where the ids do not decode to the text."""
    prefix = decode([])
    if not text.startswith(prefix):
        raise ValueError(f"the text does not begin with {prefix!r}, as decoding does")

    def decoded(ids: Sequence[int]) -> str:
        return decode(ids)[len(prefix) :]

    body = text[len(prefix) :]
    ends = _ends_of_single_tokens(token_ids, decoded, body) or _ends_in_windows(token_ids, decoded, body)
    return list(pairwise([len(prefix), *(len(prefix) + end for end in ends)]))


def _ends_sentence(text: str, match: re.Match[str], start: int) -> bool:
    """Whether the mark that `match` found ends the sentence that began at `start`."""
    mark = match["mark"]
    if mark is None or match.end() == len(text) or re.search(r"[\r\n]", match[0]):
        return True
    following = text[match.end()]
    before = text[max(start, match.start() - _MAX_HEAD) : match.start()]
    if match[0].rstrip() != mark and following.islower():  # "Why?" he asked
        return False
    if mark == "!":  # 5! and (n-1)!
        return following.isupper() or re.search(r"(?:[\d)}]|\b[A-Za-z])\Z", before) is None
    if mark == "…" or mark.startswith(".."):
        return following.isupper()
    if mark != ".":
        return True
    if match.start() - start <= _MAX_HEAD and _HEAD.fullmatch(before):
        return False
    return not (
        _is_abbreviation(before, following) or _is_initial(before, _FIRST_WORD.match(text, match.end()))
    )


def _is_abbreviation(before: str, following: str) -> bool:
    found = _LAST_WORD.search(before)
    if found is None:
        return False
    word = found[0]
    if word in _ABBREVIATIONS:
        return True
    if word.lower() in _NUMBERED and following.isdigit():
        return before.strip() != word  # "No." may be a sentence
    return (word.lower() in _UNITS or "." in word) and following.islower()


def _is_initial(before: str, next_word: re.Match[str] | None) -> bool:
    """Whether a capital letter before a full stop is that of a name: before another initial, or after a word
    with a capital and before one that begins no sentence ("John F. Kennedy", not "Point A. Then")."""
    found = _LAST_TWO_WORDS.search(before)
    if found is None or next_word is None or not next_word[0][0].isupper():
        return False
    if len(next_word[0]) == 1 and next_word.string.startswith(".", next_word.end()):
        return True  # another initial
    return (found[1] or "A")[0].isupper() and next_word[0].lower() not in _OPENERS


def _boundaries(text: str, proposed: Iterable[int], parts: Sequence[Whole]) -> list[int]:
    """Those of the proposed boundaries that cut none of `parts`, and those of the reasoning tags; each piece
    has content, and what follows the last `</think>` stays whole."""
    at_tags = {tag.start() for tag in TAG.finditer(text)}
    answer = text.rfind(_CLOSING)
    last = answer if answer >= 0 else len(text) - 1
    kept = []
    content = _content_after(text, 0)
    for position in sorted({*proposed, *at_tags}):
        if content < position <= last and not cuts(position, parts):
            kept.append(position)
            content = _content_after(text, position)
    return kept


def _content_after(text: str, position: int) -> int:
    """The first character from `position` on that is neither white space nor of a reasoning tag."""
    match = _NO_CONTENT.match(text, position)
    assert match is not None, "it matches nothing, too"
    return match.end()


class _Edges:
    """The positions where a text may be cut, those between two tokens, by their number: 0 is the text's
    beginning, `last` its end. `places` are their characters, `tokens` the tokens before them."""

    def __init__(
        self,
        text: str,
        offsets: Sequence[tuple[int, int]],
        parts: Sequence[Whole],
        min_tokens: int,
        max_tokens: int,
    ) -> None:
        self.text, self.parts = text, parts
        self.formulas = [part for part in parts if not part.code]
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self.places, self.tokens = [0], [0]
        covered = offsets[0][1] if offsets else 0
        for token, (start, end) in enumerate(offsets[1:], start=1):
            # Of the tokens of one character the first is its edge.
            if max(covered, self.places[-1] + 1) <= start < len(text):
                self.places.append(start)
                self.tokens.append(token)
            covered = max(covered, end)
        self.places.append(len(text))
        self.tokens.append(len(offsets))
        self.last = len(self.places) - 1

    def size(self, first: int, last: int) -> int:
        """Tokens between two edges."""
        return self.tokens[last] - self.tokens[first]

    def nearest(self, position: int, must: bool) -> int | None:
        """The edge that a boundary moves to; None where each would cut a formula, unless it `must` be one."""
        right = bisect_left(self.places, position)
        if self.places[right] == position:
            return right
        left = right - 1
        head = self.text[self.places[left] : position]
        to_left = head.isspace() or len(head) <= self.places[right] - position
        for edge in (left, right) if to_left else (right, left):
            if not cuts(self.places[edge], self.parts):
                return edge
        return left if must else None

    def cut_long(self, first: int, last: int) -> list[int]:
        """`first`, edges that cut a piece of too many tokens as well as can be, `last`."""
        edges = [first]
        while (left := self.size(first, last)) > self.max_tokens:
            # Leaves enough for a step of its own.
            room = (
                min(self.max_tokens, left - self.min_tokens)
                if left >= 2 * self.min_tokens
                else self.max_tokens
            )
            free = (edge for edge in range(first + 1, last) if not cuts(self.places[edge], self.formulas))
            best = max(
                self._within(free, first, room), key=lambda edge: self._rank(first, edge), default=None
            )
            if best is None:
                break
            edges.append(best)
            first = best
        return [*edges, last]

    def _within(self, free: Iterator[int], first: int, room: int) -> list[int]:
        """The free edges at most `room` tokens behind `first`; where there is none, the next."""
        within: list[int] = []
        for edge in free:
            if self.size(first, edge) > room:
                return within or [edge]
            within.append(edge)
        return within

    def _rank(self, first: int, edge: int) -> tuple[bool, bool, int, int]:
        """How well a piece is cut there: the best has the greatest."""
        place = self.places[edge]
        before = self.text[max(0, place - 8) : place]
        stripped = before.rstrip()
        space = before[len(stripped) :]
        strength = 1 if space or self.text[place].isspace() else 0
        if stripped.endswith(("，", "；", "：", "、")) or (strength and stripped.endswith((";", ":", ","))):
            strength = 2
        if "\n" in space:
            strength = 3
        return strength > 0, self.size(first, edge) >= self.min_tokens, strength, edge

    def joined(self, pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pieces that follow one another, joined to steps: a short one with the next, else with the one
        before."""

        def join(pieces: Iterable[tuple[int, int]], short_at: Callable[..., bool]) -> list[tuple[int, int]]:
            steps: list[tuple[int, int]] = []
            for piece in pieces:
                if (
                    steps
                    and short_at(steps[-1], piece)
                    and self.size(steps[-1][0], piece[1]) <= self.max_tokens
                ):
                    steps[-1] = steps[-1][0], piece[1]
                else:
                    steps.append(piece)
            return steps

        forwards = join(pieces, lambda step, piece: self.size(*step) < self.min_tokens)
        return join(forwards, lambda step, piece: self.size(*piece) < self.min_tokens)


_WINDOW = 24  # tokens that are decoded together
_CONTEXT = 8  # of them that are known already
_MAX_UNMATCHED = 64  # characters that may still change with the tokens to come


def _ends_of_single_tokens(
    token_ids: Sequence[int], decoded: Callable[[Sequence[int]], str], text: str
) -> list[int] | None:
    """Where each token ends if each writes the same after any other, as most do; None where that does not
    give the text."""
    alone = {token: decoded([token]) for token in dict.fromkeys(token_ids)}
    # Some tokenizers leave out the space of the first token.
    first = next(
        (token for token, piece in alone.items() if piece and "\N{REPLACEMENT CHARACTER}" not in piece), None
    )
    if first is None:
        return None
    inside = {token: decoded([first, token]) for token in alone}
    if not all(piece.startswith(alone[first]) for piece in inside.values()):
        return None
    ends = [len(alone[token_ids[0]])]
    pieces = [alone[token_ids[0]]]
    for token in token_ids[1:]:
        pieces.append(inside[token][len(alone[first]) :])
        ends.append(ends[-1] + len(pieces[-1]))
    return ends if "".join(pieces) == text else None


def _ends_in_windows(
    token_ids: Sequence[int], decoded: Callable[[Sequence[int]], str], text: str
) -> list[int]:
    """Where each token ends: how much of the text the tokens up to it write, decoded after some before it."""
    start = 0  # of the window, a token
    place = 0  # where its text begins
    ends: list[int] = []
    settled: list[int] = []  # tokens at which all decoded text was that of `text`
    for index in range(len(token_ids)):
        written = decoded(token_ids[start : index + 1])
        matched = _num_equal(written, text[place : place + len(written)])
        if len(written) - matched > _MAX_UNMATCHED:
            break
        ends.append(max(place + matched, ends[-1] if ends else 0))
        if matched == len(written):
            settled.append(index + 1)
        if index + 1 - start >= _WINDOW:
            for token in reversed([token for token in settled if start < token <= index + 1 - _CONTEXT]):
                again = decoded(token_ids[token : index + 1])
                expected = text[ends[token - 1] : ends[-1]]
                # The space of the first may be left out; of blank ones alone that could not be told.
                if settled[-1] == index + 1 and again.strip() and expected.endswith(again):
                    start, place = token, ends[-1] - len(again)
                    settled = [known for known in settled if known > token]
                    break
    if len(ends) < len(token_ids) or len(token_ids) not in (0, *settled[-1:]) or [0, *ends][-1] != len(text):
        place = [0, *ends][-1]
        raise ValueError(
            f"the token ids do not decode to the text: they differ at character {place} of {len(text)}"
        )
    return ends


def _num_equal(left: str, right: str) -> int:
    """The length of the longest common beginning."""
    if left == right:
        return len(left)
    differing = (index for index, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(differing, min(len(left), len(right)))
