"""How every plot of a result looks: panels side by side, one font size, colours told apart by most eyes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NEUTRAL = "#555555"
DPI = 130


@contextmanager
def new_picture(panels: int, title: str) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure with that many panels in a row, to be drawn within the context."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6 * panels, 6.5), layout="constrained")
        figure.suptitle(title)
        yield figure, figure.subplots(1, panels, squeeze=False)[0]
