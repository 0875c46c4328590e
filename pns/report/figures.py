"""Figures of a page, from data: each is a `<figure>` with a static SVG whose text is text and whose colours
are the page's CSS variables, so that it follows light and dark. Drawn by matplotlib.

A figure is drawn as wide as a telephone's page; a page puts as many beside each other as fit. Names that come
in (of lines, groups) are untrusted text: they are escaped, and no mathematics is read into them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from statistics import fmean
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pns.algo.metrics import auroc
from pns.report.tables import Share

NUM_COLOURS = 8  # the page's --series-0, --series-1, ...
_INCHES = (4.8, 2.9)  # of 72 units of the drawing
_TEXT, _GRID = "#000001", "#000002"  # stand for currentColor and --grid in what matplotlib writes
_SERIES = [f"#0000{number:02x}" for number in range(0x10, 0x10 + NUM_COLOURS)]
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
}
_BINS = 30
_MOST_POINTS = 400  # of a line; longer ones are drawn by the means of so many parts
_BELOW, _BESIDE = 20, 30  # characters of a name below an axis, and beside one
_TICKS = 34  # of all of them; where there are more they are turned
_LAST_STEP = 8  # first wrong steps beyond are drawn as one


@dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of x; a y of None is left out. `low` and `high`, as long as y, are drawn as
    a band. `smooth` draws the running mean over so many points, and the points, joined, faintly."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    smooth: int = 1


def curve(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    caption: str = "",
    percent: bool = False,
    points: bool = True,
) -> Markup:
    """Lines over one axis; a line alone needs no name, and one without points
    only keeps its colour. `percent`: y are shares, drawn in %; `points`: whether
    the points of smooth lines are drawn."""

    def draw(axes: Axes) -> None:
        for place, line in enumerate(lines):
            _draw_line(axes, line, _colour(place), points)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        drawn = [x for line in lines for x in line.x]
        if drawn and min(drawn) == max(drawn):
            axes.set_xlim(drawn[0] - 1, drawn[0] + 1)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))

    named = len(lines) > 1 or any(line.name for line in lines)
    legend = {place: line.name for place, line in enumerate(lines) if named and len(line.x)}
    return _figure(title, draw, legend, caption)


def histogram(
    title: str, groups: Mapping[str, Sequence[float]], x_label: str, right: str = "", caption: str = ""
) -> Markup:
    """Densities of the groups' values, in the same bins; n and mean of each stand in the legend. Where
    `right` names one of the groups, the caption says how well each other one is told from it (AUROC). Groups
    without values are left out."""
    places, known = _places(groups), {name: values for name, values in groups.items() if len(values)}
    edges = np.histogram_bin_edges([value for values in known.values() for value in values], _BINS)

    def draw(axes: Axes) -> None:
        for name, values in known.items():
            colour = _colour(places[name])
            axes.hist(values, edges, density=True, histtype="stepfilled", color=colour, alpha=0.12)
            axes.hist(values, edges, density=True, histtype="step", color=colour, linewidth=1.8)
        axes.set(xlabel=x_label, ylabel="density")

    legend = {
        places[name]: f"{name} (n = {len(values)}, mean {fmean(values):.2f})"
        for name, values in known.items()
    }
    return _figure(title, draw, legend, f"{caption} {separation(known, right)}".strip())


def separation(groups: Mapping[str, Sequence[float]], right: str) -> str:
    """ "AUROC of right against a .61, b .93 (.5: not told apart)." of the groups that have values."""
    if not len(groups.get(right, ())):
        return ""
    others = [name for name, values in groups.items() if name != right and len(values)]
    areas = ", ".join(f"{name} {auroc(groups[right], groups[name]):.2f}" for name in others)
    return f"AUROC of {right} against {areas} (0.5: not told apart)." if others else ""


def roc(title: str, groups: Mapping[str, Sequence[float]], right: str, caption: str = "") -> Markup:
    """How `right` is told from each other group by a threshold on their values: share of right ones above it,
    over the share of the others. Needs values of `right`."""
    places = _places(groups)
    others = {name: values for name, values in groups.items() if name != right and len(values)}

    def draw(axes: Axes) -> None:
        for name, values in others.items():
            axes.plot(*_roc_points(groups[right], values), color=_colour(places[name]))
        axes.plot([0, 1], [0, 1], color=_GRID, linewidth=1, linestyle="--")
        axes.set(xlabel="share of the others above the threshold", ylabel=f"share of {right} above it")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))

    legend = {
        places[name]: f"{name} (AUROC {auroc(groups[right], values):.2f})" for name, values in others.items()
    }
    return _figure(title, draw, legend, caption)


def first_wrong_step(title: str, groups: Mapping[str, Sequence[int | None]], caption: str = "") -> Markup:
    """Where the first wrong step stands in completions of each group: the share of them by its number from 0;
    None (no wrong step) is counted apart."""
    numbers = [step for steps in groups.values() for step in steps if step is not None]
    last = min(max(numbers, default=0), _LAST_STEP)
    names = [str(number) for number in range(last + 1)]
    if max(numbers, default=0) > last:
        names[-1] += "+"
    if any(step is None for steps in groups.values() for step in steps):
        names.append("none")
    shares: dict[str, dict[str, Share]] = {}
    for group, steps in groups.items():
        own = shares[f"{group} (n = {len(steps)})"] = {}
        counts = Counter("none" if step is None else names[min(step, last)] for step in steps)
        if steps:
            own |= {name: Share(counts[name] / len(steps)) for name in names}
    return bars(title, shares, "completions", "number of the first wrong step, from 0", caption)


def bars(
    title: str, groups: Mapping[str, Mapping[str, Share]], y_label: str, x_label: str = "", caption: str = ""
) -> Markup:
    """Shares in %, a colour a group: the groups' shares of one name stand side by side, with their intervals
    as lines. A group may lack a name."""
    names = list(dict.fromkeys(name for shares in groups.values() for name in shares))
    places, known = _places(groups), {group: shares for group, shares in groups.items() if shares}
    width = 0.8 / max(len(known), 1)

    def draw(axes: Axes) -> None:
        for number, (group, shares) in enumerate(known.items()):
            at = [names.index(name) + (number - (len(known) - 1) / 2) * width for name in shares]
            heights = [share.value for share in shares.values()]
            axes.bar(at, heights, 0.9 * width, color=_colour(places[group]), alpha=0.85)
            for x, share in zip(at, shares.values(), strict=True):
                if share.low is not None and share.high is not None:
                    axes.plot([x, x], [share.low, share.high], color=_TEXT, linewidth=1.2)
        ticks = [_short(name, _BELOW) for name in names]
        turned = {"rotation": 30, "ha": "right"} if sum(map(len, ticks)) > _TICKS else {}
        axes.set_xticks(range(len(names)), ticks, **turned)
        axes.grid(visible=False, axis="x")
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))

    return _figure(title, draw, {places[group]: group for group in known if len(known) > 1}, caption)


def differences(
    title: str, groups: Mapping[str, Mapping[str, Share]], x_label: str, caption: str = ""
) -> Markup:
    """Differences of shares in [-1, 1], drawn in points (hundredths) with their intervals beside 0: a line a
    name, a colour a group. A group may lack a name."""
    names = list(dict.fromkeys(name for shares in groups.values() for name in shares))
    places, known = _places(groups), {group: shares for group, shares in groups.items() if shares}

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=_TEXT, linewidth=0.8)
        for number, (group, shares) in enumerate(known.items()):
            colour, offset = _colour(places[group]), (number - (len(known) - 1) / 2) * 0.6 / len(known)
            for name, share in shares.items():
                at = names.index(name) + offset
                if share.low is not None and share.high is not None:
                    axes.plot([100 * share.low, 100 * share.high], [at, at], color=colour, linewidth=1.5)
                axes.plot(100 * share.value, at, color=colour, marker="o", markersize=4)
        axes.set_yticks(range(len(names)), [_short(name, _BESIDE) for name in names])
        axes.margins(y=0.08)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)

    return _figure(title, draw, {places[group]: group for group in known}, caption)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """At each place the mean of the values at most width // 2 places away; at the ends of fewer."""
    half = width // 2
    return [fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def _draw_line(axes: Axes, line: Line, colour: str, points: bool) -> None:
    at = [place for place, value in enumerate(line.y) if value is not None]
    parts = np.array_split(np.array(at), min(len(at), _MOST_POINTS)) if at else []

    def thinned(values: Sequence[float | None]) -> list[float]:
        known = np.array([np.nan if value is None else value for value in values])
        return [float(known[part].mean()) for part in parts]

    x, y = thinned(line.x), thinned(line.y)
    if line.low is not None and line.high is not None:
        axes.fill_between(x, thinned(line.low), thinned(line.high), color=colour, alpha=0.15, linewidth=0)
    if line.smooth > 1:
        if points:
            axes.plot(x, y, color=colour, alpha=0.35, linewidth=1)
        y = running_mean(y, line.smooth)
    axes.plot(x, y, color=colour, marker="o" if len(x) < 3 else None)


def _roc_points(right: Sequence[float], others: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """(share of the others, share of right ones) at or above each threshold, from the highest."""
    thresholds = np.unique(np.concatenate([right, others]))[::-1]
    sides = [np.sort(np.asarray(side, dtype=np.float64)) for side in (others, right)]
    shares = [1 - np.searchsorted(side, thresholds, side="left") / side.size for side in sides]
    x, y = (np.concatenate([[0.0], share]) for share in shares)
    return x.tolist(), y.tolist()


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _places(groups: Iterable[str]) -> dict[str, int]:
    """Of each group, whose colour it decides: the same groups have the same colours in several figures, also
    where some of them are empty."""
    return {name: place for place, name in enumerate(groups)}


def _colour(place: int) -> str:
    return _SERIES[place % NUM_COLOURS]


def _figure(title: str, draw: Callable[[Axes], None], legend: Mapping[int, str], caption: str) -> Markup:
    """The drawing with its title above, and names (by the places of their colours) and caption below."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        # Not pyplot: it looks for a display, and keeps every figure alive.
        figure = Figure(figsize=_INCHES, layout="constrained")
        draw(figure.add_subplot())
        svg = _svg(figure, title)
    items = [
        Markup('<li><span class="swatch series-{}"></span>{}</li>').format(place % NUM_COLOURS, name)
        for place, name in legend.items()
    ]
    names = Markup("<ul class=legend>{}</ul>").format(Markup("").join(items)) if items else ""
    below = Markup("<p>{}</p>").format(caption) if caption else ""
    return Markup("<figure><figcaption>{}</figcaption>{}{}{}</figure>").format(title, svg, names, below)


def _svg(figure: Figure, title: str) -> Markup:
    """The drawing as an element of an HTML page."""
    written = StringIO()
    # Without a date: the same data give the same page.
    FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(written.getvalue())
    linked = {use.get(_HREF, "").removeprefix("#") for use in root.iter(f"{_SVG}use")}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tail = None  # white space
        element.text = element.text if element.tag.endswith("text") else None
        element.tag = element.tag.removeprefix(_SVG)
        if element.get("id") not in linked and element.tag == "g":
            element.attrib.pop("id", None)  # of several figures on a page the same
        if target := element.attrib.pop(_HREF, None):
            element.set("href", target)
        if style := element.get("style"):
            element.set("style", _page_style(style))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_COLOUR_NAMES = {_TEXT: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{place})" for place, colour in enumerate(_SERIES)
}


def _page_style(style: str) -> str:
    """A style of matplotlib's with the page's colours and font."""
    style = re.sub(r"#0000[0-9a-f]{2}\b", lambda found: _COLOUR_NAMES.get(found[0], found[0]), style)
    return re.sub(r"font-family: [^;]*; ", "", style)
