"""The parts of a hash tree's picture: branches, images or counts, names."""

import numpy as np

from .palette import GRAY, INK, Pictures, shade, tint
from .ring_layout import OUTER_RADIUS, Arc

# shares of a leaf below this are drawn as one, without their names
_SMALLEST_SHARE = 0.06
# in points; smaller text is left out rather than written
_SMALLEST_FONT = 5.5
_LONGEST_UPRIGHT_NAME = 3
_LONGEST_OUTWARD_NAME = 9
_PALE = tint(INK, 0.12)


def draw_branches(canvas, layout, digits, branching_factor, colors):
    """Draw root, spokes and arcs, and write each bucket's digit on the spoke that leads to it."""
    color_of_first = dict(zip(digits[:, 0].tolist(), colors, strict=True))
    leaves = [
        Arc(tuple(path), start, end, layout.leaf_inner, OUTER_RADIUS)
        for path, start, end in zip(digits.tolist(), layout.starts, layout.ends, strict=True)
    ]
    widest_number = str(branching_factor - 1)
    texts = []
    inner = 0.0
    for level in range(1, digits.shape[1] + 1):
        branches = [branch for branch in [*layout.arcs, *leaves] if len(branch.path) == level]
        outer = branches[0].inner
        # near the root the spokes are too close together for numbers
        radius = 0.8 * outer if level == 1 else (inner + outer) / 2
        middles = np.array([branch.middle for branch in branches])
        spacing = radius * np.diff(middles, append=middles[0] + 2 * np.pi).min()
        size = canvas.upright_size_that_fits(widest_number, min(spacing, outer - inner), largest=10.5)
        for branch in branches:
            color = color_of_first[branch.path[0]]
            canvas.spoke(inner, outer, branch.middle, color)
            texts.append(canvas.write_number(branch.path[-1], radius, branch.middle, size, shade(color)))
        inner = branches[0].outer
    for arc in layout.arcs:
        color = color_of_first[arc.path[0]]
        canvas.sector(arc.inner, arc.outer, arc.start, arc.end, facecolor=color, linewidth=0, zorder=2)
    canvas.dot(INK)
    return texts


def draw_images(canvas, layout, contents, colors, images):
    """Fill each leaf's cells with a sample of its items: (leaf, item, is_framed, tile) for each."""
    pictures = Pictures(images)
    drawn = []
    for leaf, content in enumerate(contents):
        cells = [cell for cell in layout.cells if cell.leaf == leaf]
        for (item, rank), cell in zip(content.sample(len(cells)), cells, strict=False):
            sector = (cell.inner, cell.outer, cell.start, cell.end)
            ground, ink = (tint(colors[leaf], 0.24), shade(colors[leaf])) if rank == 0 else (_PALE, INK)
            canvas.sector(*sector, facecolor=ground, edgecolor="white", linewidth=canvas.scale, zorder=1)
            if rank > 0:
                canvas.sector(*sector, fill=False, edgecolor=INK, linewidth=1.3 * canvas.scale, zorder=2)
            tile = canvas.tile(pictures.tile(item, ink), cell.center, cell.side)
            drawn.append((leaf, item, rank > 0, tile))
    return drawn


def draw_counts(canvas, layout, contents, colors):
    """Split each leaf's sector in proportion to its labels, the most frequent one innermost."""
    texts = []
    for leaf, content in enumerate(contents):
        start, end = layout.starts[leaf], layout.ends[leaf]
        named = [(label, count) for label, count in content.counts if count >= _SMALLEST_SHARE * content.size]
        parts = [(f"{label}: {count:,}", count) for label, count in named]
        n_others = content.size - sum(count for _, count in named)
        if n_others:
            parts.append(("", n_others))
        bounds = np.cumsum([0, *(count for _, count in parts)]) / content.size
        radii = layout.leaf_inner + bounds * (OUTER_RADIUS - layout.leaf_inner)
        for rank, (text, _) in enumerate(parts):
            inner, outer = radii[rank : rank + 2]
            ground, ink = (tint(colors[leaf], 0.45), shade(colors[leaf])) if rank == 0 else (_PALE, INK)
            style = {"facecolor": ground, "edgecolor": "white", "linewidth": canvas.scale, "zorder": 1}
            canvas.sector(inner, outer, start, end, **style)
            size = canvas.size_that_fits(text, (end - start) * inner, outer - inner, largest=10.5)
            if text and size >= _SMALLEST_FONT:
                middle = ((inner + outer) / 2, (start + end) / 2)
                texts.append(canvas.write_along(text, *middle, size, color=ink))
    return texts


def name_leaves(canvas, layout, contents, colors, *, along_the_ring):
    """Write each leaf's most frequent label outside of it, or its size where there are no labels."""
    names = [content.counts[0][0] if content.counts else f"{content.size:,}" for content in contents]
    longest = max(names, key=len)
    width = _sector_width(layout)
    if len(longest) <= _LONGEST_UPRIGHT_NAME:
        # a 6 that is turned over is a 9
        write, radius = canvas.write_upright, OUTER_RADIUS + 0.045
        size = canvas.upright_size_that_fits(longest, width, largest=12)
    elif along_the_ring:
        write, radius = canvas.write_along, OUTER_RADIUS + 0.04
        size = canvas.size_that_fits(longest, width, largest=12)
    else:
        write, radius = canvas.write_outwards, OUTER_RADIUS + 0.015
        names = [_shorten(name) for name in names]
        size = canvas.size_that_fits(max(names, key=len), 0.11, width, largest=10)
    return [
        write(name, radius, angle, size, color=shade(color), fontweight="bold")
        for name, angle, color in zip(names, (layout.starts + layout.ends) / 2, colors, strict=True)
    ]


def write_sizes(canvas, layout, contents):
    """Write each leaf's number of items, and the most frequent label's share where others are in it."""
    sizes = []
    for content in contents:
        share = content.counts[0][1] / content.size
        sizes.append(f"{content.size:,}" if share == 1 else f"{content.size:,} · {share:.0%}")
    font_size = canvas.size_that_fits(max(sizes, key=len), _sector_width(layout), largest=9)
    if font_size < _SMALLEST_FONT:
        return []
    return [
        canvas.write_along(size, OUTER_RADIUS + 0.1, angle, font_size, color=GRAY)
        for size, angle in zip(sizes, (layout.starts + layout.ends) / 2, strict=True)
    ]


def _sector_width(layout):
    return float(layout.ends[0] - layout.starts[0]) * OUTER_RADIUS


def _shorten(name):
    return name if len(name) <= _LONGEST_OUTWARD_NAME else f"{name[: _LONGEST_OUTWARD_NAME - 1]}…"
