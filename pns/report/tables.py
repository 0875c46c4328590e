"""Tables of a page, from data. Names and cells are untrusted text, and are escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_NARROW = 4  # columns at most that a telephone shows as they are
_MARKS = {  # of a significant difference
    "better": Markup('<span class="mark better" title="better">▲</span>'),
    "worse": Markup('<span class="mark worse" title="worse">▼</span>'),
}


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] with its 95 % interval, where there is one. `verdict` is "better" or "worse" where it
    differs significantly from what it is compared with; anything else is no mark."""

    value: float
    low: float | None = None
    high: float | None = None
    verdict: str = ""


def results_table(
    rows: Mapping[str, Mapping[str, Share]], notes: Mapping[str, str] | None = None, caption: str = ""
) -> Markup:
    """A row a model or arm, a column a suite, shares in % with their intervals and marks of significance. The
    columns are those of all rows, as they first come; `notes` stand below their names ("n = 40")."""
    columns = list(dict.fromkeys(column for shares in rows.values() for column in shares))
    heads = [_head(column, (notes or {}).get(column, "")) for column in columns]
    cells = {name: [share_cell(shares.get(column)) for column in columns] for name, shares in rows.items()}
    return table(["", *heads], [[name, *own] for name, own in cells.items()], caption)


def share_cell(share: Share | None) -> Markup:
    """ "57.3 ▲ [55.1, 59.4]" in %, the interval on a line of its own."""
    if share is None:
        return Markup("–")
    mark = _MARKS.get(share.verdict, Markup(""))
    text = Markup("{}{}").format(f"{100 * share.value:.1f}", mark)
    if share.low is None or share.high is None:
        return text
    interval = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
    return Markup('{} <span class="interval">{}</span>').format(text, interval)


def table(heads: Sequence[str | Markup], rows: Sequence[Sequence[str | Markup]], caption: str = "") -> Markup:
    """A table; the first cell of a row names it. On a telephone each row of a wide one becomes a block of
    named cells."""
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name in heads)
    body = Markup("").join(_row(heads, row) for row in rows)
    below = Markup("<p class=caption>{}</p>").format(caption) if caption else ""
    kind = "wide" if len(heads) > _NARROW else "narrow"
    whole = Markup("<table class={}><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}")
    return whole.format(kind, head, body, below)


def _row(heads: Sequence[str | Markup], row: Sequence[str | Markup]) -> Markup:
    first, *others = row
    cells = [Markup("<th scope=row>{}</th>").format(first)]
    for head, cell in zip(heads[1:], others, strict=True):
        name = head.striptags() if isinstance(head, Markup) else head
        cells.append(Markup('<td data-name="{}"><span>{}</span></td>').format(name, cell))
    return Markup("<tr>{}</tr>").format(Markup("").join(cells))


def _head(name: str, note: str) -> Markup:
    below = Markup(" <span class=note>{}</span>").format(note) if note else ""
    return Markup("{}{}").format(name, below)
