"""Episodes as one self-contained HTML page: images at the views the model saw, turns, token counts, rewards."""

from vtengine.viewer.render import PageOptions, render_page
from vtengine.viewer.totals import Totals, TotalsCounter

__all__ = ["PageOptions", "Totals", "TotalsCounter", "render_page"]
