"""Figures as pages, as parts of a page, and as images."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from em_interp.errors import OutputError, UsageError
from em_interp.figures.layout import WIDTH, caption_of
from em_interp.figures.phone import narrow_layout
from em_interp.files.atomic import atomic_path, write_text

CONFIG: Final = {
    "displaylogo": False,
    "responsive": True,
    "toImageButtonOptions": {"format": "svg"},
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
"""Plotly's settings of a figure on a page."""
ENDINGS: Final = {".html": 1, ".svg": 1, ".png": 2}
"""What a figure can be written as, and at which scale."""
NARROW_BELOW: Final = 600
"""Pixels of room below which a figure is laid out for a phone."""
CHROME: Final = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome")
"""What the browser that draws is called, where it is installed."""
_FIT: Final = """
(function () {
  const figure = document.getElementById("{plot_id}"), layouts = LAYOUTS;
  let now = "wide";
  function fit() {
    const room = figure.clientWidth, next = room < BELOW ? "narrow" : "wide";
    if (!room || next === now) return;
    now = next;
    figure.style.height = layouts[next].height + "px";
    Plotly.relayout(figure, layouts[next]);
  }
  new ResizeObserver(fit).observe(figure);
  fit();
})();
"""


def fragment(figure: go.Figure) -> str:
    """A <div> for a page that has plotly.js: as wide as its place, on the page's own paper, narrow on a phone."""
    shown = go.Figure(figure).update_layout(paper_bgcolor="rgba(0,0,0,0)")
    narrow = narrow_layout(figure)
    layouts = {"narrow": narrow, "wide": {name: _value(figure, name) for name in narrow}}
    fit = _FIT.replace("LAYOUTS", json.dumps(layouts)).replace("BELOW", str(NARROW_BELOW))
    return str(
        shown.to_html(
            include_plotlyjs=False,
            full_html=False,
            config=CONFIG,
            default_width="100%",
            default_height=f"{figure.layout.height}px",
            post_script=fit,
        )
    )


def _value(figure: go.Figure, name: str) -> Any:
    """What the layout has under a name such as annotations[0].x; None where plotly decides."""
    found: Any = figure.layout
    for part in name.replace("[", ".").replace("]", "").split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    return list(found) if isinstance(found, tuple) else found


def save_html(figure: go.Figure, path: Path) -> Path:
    """An interactive page; plotly.js lies beside it once for all figures of the folder, so no network is needed."""
    script = path.parent / "plotly.min.js"
    if not script.exists():
        write_text(script, get_plotlyjs())
    return write_text(path, _page(figure, path.stem, '<script src="plotly.min.js"></script>'))


def save(figure: go.Figure, path: Path) -> Path:
    """One figure as a file of its own: .html (interactive, with all that it needs inside), .svg or .png.

    Raises `UsageError` for another ending, `OutputError` where it cannot be written or drawn.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path}: a figure is written as {', '.join(ENDINGS)}. Give it one of those endings.")
    if path.suffix == ".html":
        return write_text(path, _page(figure, path.stem, f"<script>{get_plotlyjs()}</script>"))
    if not static_images_available():
        raise OutputError(f"{path}: drawing {path.suffix} needs Chrome and the extra `static`. Write .html instead.")
    _draw({path: figure}, {path.suffix: ENDINGS[path.suffix]})
    return path


def _page(figure: go.Figure, title: str, script: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        "<style>body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #222; background: white; margin: 0 auto; "
        f"padding: 1rem; max-width: {WIDTH}px; }}</style>"
        f"{script}</head><body>{fragment(figure)}<p>{html.escape(caption_of(figure))}</p></body></html>"
    )


def static_images_available() -> bool:
    """Whether the `static` extra and a Chrome are here."""
    try:
        import kaleido  # noqa: F401
    except ImportError:
        return False
    return any(shutil.which(name) for name in CHROME)


def save_static(figures: dict[Path, go.Figure]) -> list[Path]:
    """Write each figure as .svg and .png (2x) beside the given paths, through one Chrome for all.

    Raises `OutputError` with the reason if Chrome cannot be started; the interactive figures are not touched.
    """
    return _draw(figures, {ending: scale for ending, scale in ENDINGS.items() if ending != ".html"})


def _draw(figures: Mapping[Path, go.Figure], endings: Mapping[str, int]) -> list[Path]:
    import kaleido

    written: list[Path] = []
    try:
        kaleido.start_sync_server(silence_warnings=True)
        try:
            for path, figure in figures.items():
                for suffix, scale in endings.items():
                    options = {"format": suffix[1:], "scale": scale, "width": figure.layout.width or WIDTH}
                    image = kaleido.calc_fig_sync(figure, opts=options)
                    with atomic_path(path.with_suffix(suffix)) as temporary:
                        temporary.write_bytes(image)
                    written.append(path.with_suffix(suffix))
        finally:
            kaleido.stop_sync_server(silence_warnings=True)
    except OutputError:
        raise
    except Exception as error:  # kaleido and choreographer raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise OutputError(f"static images could not be drawn by Chrome ({type(error).__name__}: {reason}).") from error
    return written
