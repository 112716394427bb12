"""Colours, lines and markers of all figures."""

from typing import Any

# Okabe and Ito's palette, with grey in the place of its yellow, which is faint on white: told apart with any colour
# vision. Behind it eight that are as far from those and from each other as the nearest of those are, simulated
# (Machado et al., 2009) for each kind of colour blindness.
COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]
COLOURS += ["#6600CC", "#663300", "#003366", "#8866FF", "#88CC66", "#880033", "#FF0066", "#3300FF"]
LINES = ["--", "-.", "-", "-", ":", "--", "-.", ":"]
MARKERS = ["s", "^", "o", "D", "v", "P", "X", "*"]


def style(index: int) -> dict[str, Any]:
    """
    How the `index`-th method is drawn.

    The first 16 each have a colour and a marker of their own: those behind the eighth have hollow ones, in another
    order. Further ones begin anew, with other lines and markers.
    """
    turn, place = divmod(index, len(MARKERS))
    other = (place + turn) % len(MARKERS)
    drawn = {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[other], "marker": MARKERS[other]}
    return drawn | ({"markerfacecolor": "white"} if turn % 2 else {})
