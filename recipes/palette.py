"""Colours, lines and markers that all pictures share."""

from typing import Any

# Okabe and Ito's palette, with grey in the place of its yellow, which is faint on white: told apart with any colour
# vision. Lines and markers say the same once more.
COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]
LINES = ["--", "-.", "-", "-", ":", "--", "-.", ":"]
MARKERS = ["s", "^", "o", "D", "v", "P", "X", "*"]


def style(index: int) -> dict[str, Any]:
    """How the `index`-th method is drawn; past the last colour they begin anew, with other lines and markers."""
    turn, place = divmod(index, len(COLOURS))
    other = (place + turn) % len(COLOURS)
    return {"color": COLOURS[place], "linestyle": LINES[other], "marker": MARKERS[other]}
