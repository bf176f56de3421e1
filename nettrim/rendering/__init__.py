"""How a report looks: in words, as a page, as a figure. No figure is made here that was not measured elsewhere."""

from nettrim.rendering import figure, page, text
from nettrim.rendering.text import WIDTH, number, percent, verdict

__all__ = ["WIDTH", "figure", "number", "page", "percent", "text", "verdict"]
