"""Charts of measurements: curves over a cost, and histograms of single images.

They need matplotlib (`pip install "vistok[eval]"`), which `require` checks before any long work.
"""

import base64
import functools
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import numpy as np

from ...extras import missing
from ...files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
BINS = 24
# Distinct for readers with any colour vision; Okabe and Ito, "Color Universal Design" (2008).
COLOURS = ("#0072b2", "#000000", "#56b4e9", "#e69f00")
BASELINES = ("#8a93a3", "#d55e00", "#009e73", "#cc79a7")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#3a4252",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ee",
    "xtick.color": "#5b6475",
    "ytick.color": "#5b6475",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Series:
    """One line: `y` over `x`, both [n], and the ends of intervals around `y` where there are some.

    The chart's subject has `baseline` False and a stronger line than the baselines.
    """

    label: str
    x: list[float]
    y: list[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    baseline: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing and what it shows."""

    title: str
    figure: "Figure"

    def svg(self) -> str:
        """The drawing as a data URL."""
        from matplotlib import rc_context

        file = io.BytesIO()
        with rc_context({**STYLE, "svg.hashsalt": "vistok"}):  # the same drawing is the same file
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"

    def save(self, path: str | Path) -> None:
        """Write a PNG."""
        from matplotlib import rc_context

        with rc_context(STYLE), atomic_write(path) as aside:
            self.figure.savefig(aside, format="png", dpi=130)


def require() -> None:
    """Raise ModuleNotFoundError, with what to install, if nothing can be drawn here."""
    if find_spec("matplotlib") is None:
        raise missing("matplotlib", "eval", "a page with charts (--no-html writes none)")


def _styled(draw: Callable[P, "Chart"]) -> Callable[P, "Chart"]:
    """Draw in vistok's style, whatever matplotlib settings the program uses."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> "Chart":
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def curves(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, from_zero: bool = False
) -> Chart:
    """Lines with a mark at every point, over a logarithmic cost; values that are not finite are left out."""
    figure, axes = _empty()
    # Another marker for each round of the colours.
    strong = itertools.cycle(itertools.product("osD^v", COLOURS))
    weak = itertools.cycle(itertools.product(".x+1", BASELINES))
    for line in series:
        x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
        order = x.argsort(kind="stable")
        x, y = x[order], np.where(np.isfinite(y), y, np.nan)[order]
        marker, colour = next(weak if line.baseline else strong)
        style = {"linewidth": 1.2, "linestyle": "--", "zorder": 2}
        if not line.baseline:
            style = {"linewidth": 2.2, "markersize": 5, "zorder": 3}
        axes.plot(x, y, label=line.label, color=colour, marker=marker, **style)
        if line.low is not None and line.high is not None:
            low, high = (np.asarray(ends, np.float64)[order] for ends in (line.low, line.high))
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0, zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(series) > 1:
        # Named one by one: on its own matplotlib hides labels that begin with "_".
        axes.legend(axes.lines, [line.label for line in series], fontsize=9)
    return Chart(title, figure)


@_styled
def histogram(title: str, label: str, values: Sequence[float] | np.ndarray) -> Chart:
    """A histogram of finite values [n] in equal bins from the least to the most, with their mean."""
    values = np.asarray(values, np.float64)
    figure, axes = _empty(height=2.6)
    least, most = values.min(), values.max()
    margin = 0 if least < most else max(1, abs(least) / 4)
    axes.hist(values, bins=BINS, range=(least - margin, most + margin), color=COLOURS[0], rwidth=0.94)
    axes.axvline(values.mean(), color=BASELINES[1], linewidth=1.4)
    axes.annotate(
        f"mean {values.mean():.4g}",
        (values.mean(), 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        color=BASELINES[1],
        fontsize=9,
    )
    axes.grid(visible=True, axis="y")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(label)
    axes.set_ylabel("images")
    return Chart(title, figure)


@_styled
def bars(title: str, label: str, values: dict[str, float]) -> Chart:
    """One bar per name, the longest on top, each with its number."""
    names = sorted(values, key=lambda name: values[name])
    figure, axes = _empty(height=0.7 + 0.28 * len(names))
    patches = axes.barh(names, [values[name] for name in names], color=COLOURS[0], height=0.7)
    axes.bar_label(patches, [f" {values[name]:.3g}" for name in names], fontsize=9, color="#5b6475")
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)
    return Chart(title, figure)


def _empty(height: float = 3.6) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()
