"""Drawing on a ring: sectors, spokes, upright tiles and text that follows the ring."""

import numpy as np
from matplotlib.patches import Wedge

from .palette import GRAY
from .ring_layout import polar

# width of a (bold) character, height of a capital and of a line, in font sizes
_CHARACTER_WIDTH = 0.7
_CAPITAL_HEIGHT = 0.78
_LINE_HEIGHT = 1.3
# points per data unit on the 9 inch figure that sizes are given for
_FULL_SIZE = 275.0


class RingCanvas:
    """Axes around the origin, `limit` wide to each side, with angles clockwise from the top.

    On small axes text and lines shrink by `scale`, so that the picture stays the same.
    """

    def __init__(self, ax, limit):
        self.ax = ax
        self.limit = limit
        ax.set_axis_off()
        ax.set_aspect("equal")
        box = ax.get_window_extent()
        # text has no size in data units, so it is worked out from the room on the paper
        self.points_per_unit = min(box.width, box.height) / ax.figure.dpi * 72 / (2 * limit)
        self.scale = min(1.0, self.points_per_unit / _FULL_SIZE)

    def finish(self):
        """Set the limits: last, because images move them."""
        self.ax.set(xlim=(-self.limit, self.limit), ylim=(-self.limit, self.limit))

    def sector(self, inner, outer, start, end, **style):
        """Add a piece of the ring."""
        # matplotlib's angles are degrees, counterclockwise from the right
        degrees = 90 - np.rad2deg([end, start])
        self.ax.add_patch(Wedge((0, 0), outer, *degrees, width=outer - inner, **style))

    def spoke(self, inner, outer, angle, color):
        """Add a radial line."""
        x, y = polar(np.array([inner, outer]), angle)
        self.ax.plot(x, y, color=color, linewidth=1.4 * self.scale, solid_capstyle="butt", zorder=1)

    def tile(self, rgba, center, side):
        """Add an upright square image and return it."""
        (x, y), half = center, side / 2
        extent = (x - half, x + half, y - half, y + half)
        return self.ax.imshow(rgba, extent=extent, interpolation="bicubic", zorder=3)

    def dot(self, color):
        """Mark the origin."""
        self.ax.plot(0, 0, "o", color=color, markersize=9 * self.scale, zorder=4)

    def size_that_fits(self, text, width, height=np.inf, *, largest):
        """Return the font size at which `text` stays within `width` and `height` in data units.

        It is at most `largest` points on axes of full size, and in proportion less on smaller ones.
        """
        by_width = width / (_CHARACTER_WIDTH * max(len(text), 1))
        return min(self.points_per_unit * min(by_width, height / _LINE_HEIGHT), largest * self.scale)

    def upright_size_that_fits(self, text, spacing, *, largest):
        """Return the largest font size at which upright texts that far apart keep clear of each other.

        Neighbours on a ring lie in any direction; boxes that are further apart than their diagonal can't
        overlap in any.
        """
        diagonal = np.hypot(_CHARACTER_WIDTH * len(text), _CAPITAL_HEIGHT)
        return min(self.points_per_unit * spacing / diagonal, largest * self.scale)

    def write_upright(self, text, radius, angle, size, **style):
        """Write horizontally, centred, and return the text."""
        style = {"ha": "center", "va": "center", "zorder": 3} | style
        return self.ax.text(*polar(radius, angle), text, fontsize=size, **style)

    def write_number(self, number, radius, angle, size, color):
        """Write on a spoke, which stops short of the number, and return the text."""
        ground = {"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": "none"}
        return self.write_upright(str(number), radius, angle, size, color=color, bbox=ground)

    def write_in_corner(self, side, text):
        """Write a note into the lower left or right corner and return it."""
        position = 0.015 if side == "left" else 0.985
        style = {"transform": self.ax.transAxes, "ha": side, "va": "bottom", "linespacing": 1.5}
        return self.ax.text(position, 0.015, text, fontsize=9 * self.scale, color=GRAY, **style)

    def write_along(self, text, radius, angle, size, **style):
        """Write along the ring, never upside down, and return the text."""
        rotation = _readable(-np.rad2deg(angle))
        style = {"ha": "center", "va": "center", "rotation": rotation, "zorder": 3} | style
        return self.ax.text(*polar(radius, angle), text, fontsize=size, **style)

    def write_outwards(self, text, radius, angle, size, **style):
        """Write along the radius, beginning or ending at `radius`, and return the text."""
        rotation = _readable(90 - np.rad2deg(angle))
        side = "left" if np.sin(angle) >= 0 else "right"
        style = {
            "ha": side,
            "va": "center",
            "rotation": rotation,
            "rotation_mode": "anchor",
            "zorder": 3,
        } | style
        return self.ax.text(*polar(radius, angle), text, fontsize=size, **style)


def _readable(degrees):
    return (degrees + 90) % 180 - 90
