"""Look and layout of all pictures. Matplotlib is used by its object interface: no global state, no display."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.common.terminal import printable
from lowrank_vit.report.language import tr
from lowrank_vit.spectral.select import module_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

    from lowrank_vit.report.read import Run

INK = "#22303c"
MUTED = "#6b7a88"
GRID = "#dfe5ea"
TRAIN = "#9aa7b3"
MODEL = "#2b7bba"
EMA = "#d1603d"

_LOOKS = {
    "attn.qkv": ("#0072b2", "o"),
    "attn.qkv.q": ("#5b5bd6", "p"),
    "attn.qkv.k": ("#e69f00", "v"),
    "attn.qkv.v": ("#009e73", "D"),
    "attn.proj": ("#d55e00", "s"),
    "mlp.fc1": ("#56b4e9", "^"),
    "mlp.fc2": ("#cc79a7", "X"),
}
"""Colours that differ under deuteranopia and show on both backgrounds (Okabe & Ito, but for one), and marks."""
_OTHERS = (("#999933", "P"), ("#7a8793", "*"), ("#b0487c", "d"), ("#44aa99", "h"), ("#aa4499", "<"))
_SYMBOLS = {
    "o": "circle",
    "p": "pentagon",
    "v": "triangle-down",
    "D": "diamond",
    "s": "square",
    "^": "triangle-up",
    "X": "x",
    "P": "cross",
    "*": "star",
    "d": "diamond-tall",
    "h": "hexagon",
    "<": "triangle-left",
}


def type_look(kind: str) -> tuple[str, str]:
    """Colour and marker of a type of matrices, the same in every report."""
    return _LOOKS.get(kind) or _OTHERS[zlib.crc32(kind.encode("utf-8", "replace")) % len(_OTHERS)]


def browser_look(kind: str) -> dict[str, str]:
    """`type_look` in the form that the page's charts need."""
    color, marker = type_look(kind)
    return {"color": color, "symbol": _SYMBOLS[marker]}


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty white figure, rendered by Agg, whose layout makes room for labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)  # inches
    figure = Figure(figsize=(width_in, height_in), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """A bold title and a lighter line of explanation under it, at the left."""
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK)
    # Placed by hand under the title: the constrained layout has reserved the empty second line for it.
    height = figure.get_size_inches()[1]
    look: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": 10, "color": MUTED}
    figure.text(0.012, 1 - 0.36 / height, printable(subtitle), **look, parse_math=False)  # it may hold users' texts


def tidy(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Title and labels, a light grid, no box."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9.5, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9.5, color=MUTED)
    axes.tick_params(which="both", labelsize=8.5, colors=MUTED)
    axes.grid(visible=True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def index_ticks(count: int) -> list[int]:
    """Indices to write at an axis of `count` values, from 1 on: 1, 5, 10 and so on, about six of them."""
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count <= 6 * step), 1000)
    return sorted({1, *range(step, count + 1, step)})


def update_ticks(axis: Axis) -> None:
    """Few and short ticks for counts that may reach millions: 0, 50k, 100k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.set_major_formatter(EngFormatter(sep=""))


_DARK = {"#ffffff": "#1b242c", "#000000": "#e4eaef", INK: "#e4eaef", MUTED: "#9fb0bd", GRID: "#31404c"}
"""The colours of paper, ink and lines in dark pictures. Colours of data stay."""
_IS_DARK: ContextVar[bool] = ContextVar("is_dark", default=False)


@contextmanager
def dark_pictures() -> Generator[None]:
    """Within it `png` gives dark pictures."""
    token = _IS_DARK.set(True)
    try:
        yield
    finally:
        _IS_DARK.reset(token)


def _darken(figure: Figure) -> None:
    """Replace `_DARK` colours in all parts of a figure."""
    from matplotlib.colors import to_hex, to_rgba

    def dark(color: Any) -> Any:
        if getattr(color, "ndim", 1) == 2:  # a collection has one for each member
            return np.array([dark(one) for one in color]).reshape(-1, 4)
        rgba: Any = to_rgba(color)
        found: Any = _DARK.get(str(to_hex(rgba)), rgba)
        return to_rgba(found, rgba[3])

    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            get: Any = getattr(artist, f"get_{name}", None)
            if get is not None:
                with suppress(ValueError, TypeError):  # "none", "auto", nothing
                    artist.set(**{name: dark(get())})


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes, without a date or version inside, so that equal data give equal files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    figure.set_layout_engine("none")
    figure.set_dpi(dpi)
    if _IS_DARK.get():
        _darken(figure)
    buffer = BytesIO()
    # `savefig` would first go through everything once more for nothing, which takes a third of the time.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


MAX_TYPES = 6
"""Q, K and V separately, and the three other types of a ViT."""


def by_type(modules: Iterable[str]) -> dict[str, list[str]]:
    """Module names by type, in model order; with more than MAX_TYPES types, those with the most modules."""
    types: dict[str, list[str]] = {}
    for name in modules:
        types.setdefault(module_type(name), []).append(name)
    # A picture with more columns would be unreadable; the report's table has every type.
    most = sorted(types, key=lambda kind: -len(types[kind]))[:MAX_TYPES]
    return {kind: names for kind, names in types.items() if kind in most}


def first_middle_last(names: list[str]) -> list[str]:
    """The first, the middle and the last name, or fewer if there are fewer."""
    return [names[i] for i in dict.fromkeys((0, len(names) // 2, len(names) - 1))]


def middle(names: list[str]) -> str:
    """The middle name."""
    return names[len(names) // 2]


def style_bar(bar: Colorbar, label: str) -> None:
    """A colour bar without a box, labelled in the usual ink."""
    bar.set_label(label, fontsize=9.5, color=INK)
    bar.ax.tick_params(labelsize=8.5, colors=MUTED)
    bar.outline.set_visible(False)


def moment(run: Run, update: int) -> str:
    """When something was measured: the update, or the moment of the analysis."""
    return run.moment() if run.moment else tr("at update {n:,}", n=update)


def subtitle(run: Run, updates_T: np.ndarray, of_what: str = "refreshes") -> str:
    """The model, and number and time of the refreshes (or what `of_what` names)."""
    model = f"{run.args['model']}  ·  " if run.args.get("model") else ""
    if len(updates_T) == 1:
        return model + moment(run, updates_T[0])
    return f"{model}{len(updates_T)} {of_what}, updates {updates_T[0]:,} to {updates_T[-1]:,}"
