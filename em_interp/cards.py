"""What objects look like in a notebook: what it is, where it is from, and a small plot by layer. No dependency."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Final

_WIDTH: Final = 260.0
_HEIGHT: Final = 44.0
_CELL: Final = "text-align:left;vertical-align:top;padding:0;border:none"


def card(what: str, facts: Mapping[str, object], plot: str = "") -> str:
    """HTML of a title, rows of (name, fact) and a plot. Empty facts are left out; all text is escaped.

    Colours are those of the page, so that it reads in a dark notebook too.
    """
    rows = "".join(
        f'<tr style="background:none"><td style="{_CELL};opacity:.7;padding-right:1em;white-space:nowrap">'
        f'{escape(name)}</td><td style="{_CELL}">{_lines(fact)}</td></tr>'
        for name, fact in facts.items()
        if fact not in ("", None, (), [])
    )
    return (
        '<div style="border-left:3px solid currentColor;padding:.1em 0 .1em .8em;line-height:1.45">'
        f"<strong>{escape(what)}</strong>"
        f'<table style="border:none;margin:.2em 0;background:none">{rows}</table>{plot}</div>'
    )


def bars(by_layer: Mapping[int, float], of: str, chosen: Collection[int] = ()) -> str:
    """An inline SVG with a bar a layer, its height the value's; nothing for fewer than two layers.

    of: what the values are, in the title that a pointer and a screen reader get. chosen: layers that stand out.
    """
    values = {layer: value for layer, value in sorted(by_layer.items()) if math.isfinite(value) and value >= 0}
    highest = max(values.values(), default=0.0)
    if len(values) < 2 or not highest > 0:
        return ""
    first, last = min(values), max(values)
    step = _WIDTH / (last - first + 1)
    drawn = []
    for layer, value in values.items():
        tall = _HEIGHT * value / highest
        strong = not chosen or layer in chosen
        drawn.append(
            f'<rect x="{(layer - first) * step + 0.1 * step:.1f}" y="{_HEIGHT - tall:.1f}" width="{0.8 * step:.1f}" '
            f'height="{tall:.1f}" fill="currentColor" fill-opacity="{0.75 if strong else 0.25}">'
            f"<title>layer {layer}: {value:.4g}</title></rect>"
        )
    at = max(values, key=values.__getitem__)
    said = f"{of} by layer, {first} to {last}; the largest is {highest:.4g}, at layer {at}"
    text = 'fill="currentColor" font-size="10" font-family="sans-serif"'
    return (
        f'<svg role="img" aria-label="{escape(said)}" width="{_WIDTH + 60:.0f}" height="{_HEIGHT + 16:.0f}" '
        f'viewBox="0 0 {_WIDTH + 60:.0f} {_HEIGHT + 16:.0f}"><title>{escape(said)}</title>{"".join(drawn)}'
        f'<text x="0" y="{_HEIGHT + 12:.0f}" {text}>{first}</text>'
        f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT + 12:.0f}" text-anchor="middle" {text}>{escape(of)}, by layer</text>'
        f'<text x="{_WIDTH:.0f}" y="{_HEIGHT + 12:.0f}" text-anchor="end" {text}>{last}</text>'
        f'<text x="{_WIDTH + 5:.0f}" y="10" {text}>{highest:.4g}</text></svg>'
    )


def ranges(layers: Sequence[int]) -> str:
    """'layer 24', 'layers 0-47', 'layers 3, 5-7'."""
    parts: list[str] = []
    start = previous = layers[0]
    for layer in [*layers[1:], None]:
        if layer is not None and layer == previous + 1:
            previous = layer
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        if layer is not None:
            start = previous = layer
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(parts)


def short(source: str) -> str:
    """A hub name as it is; of a path its last two parts."""
    parts = source.replace("\\", "/").rstrip("/").split("/")
    return source if len(parts) < 3 and not source.startswith((".", "/", "~")) else "/".join(parts[-2:])


def _lines(fact: object) -> str:
    return "<br/>".join(escape(str(line)) for line in (fact if isinstance(fact, (tuple, list)) else [fact]))
