"""Colours of the hash tree, and the images in them."""

import numpy as np

INK = np.array([0.14, 0.15, 0.17])
GRAY = np.array([0.44, 0.46, 0.48])


def wheel_colors(n_colors):
    """Return colours that differ in hue only, evenly around the wheel: (n_colors, 3) in [0, 1].

    Lightness and chroma are constant in OKLCH (https://bottosson.github.io/posts/oklab), so no bucket
    looks heavier than another, as yellow and blue of one HSV brightness do.
    """
    hues = np.deg2rad(255) + 2 * np.pi * np.arange(n_colors) / max(n_colors, 1)
    lightness, chroma = 0.63, 0.145
    a, b = chroma * np.cos(hues), chroma * np.sin(hues)
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_linear_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_linear_rgb @ cones**3, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).T


def tint(color, share):
    """Mix a colour into white."""
    return 1 - share * (1 - np.asarray(color))


def shade(color):
    """Darken a colour until text in it reads well on white."""
    return np.asarray(color) * 0.55


class Pictures:
    """Images turned into RGBA tiles.

    Gray images on a flat ground, as scanned digits are, become ink on a transparent ground, so that the
    colour of the leaf shows through; other gray images and colour images stay as they are.

    Parameters
    ----------
    images : ndarray of shape (n_samples, height, width[, 3])
        Values of any range; `uint8` and floats in [0, 1] are shown as they are, others are scaled by
        their smallest and largest value.
    """

    def __init__(self, images):
        low, high = (0, 255) if images.dtype == np.uint8 else (images.min(), images.max())
        if images.dtype.kind == "f" and low >= 0 and high <= 1:
            low, high = 0, 1
        values = (images - float(low)) / max(float(high) - float(low), 1e-12)
        self.values = values
        self.is_ink = False
        if values.ndim == 3:
            border = np.concatenate([values[:, [0, -1]].ravel(), values[:, :, [0, -1]].ravel()])
            if np.mean(border < 0.05) > 0.5:
                self.is_ink = True
            elif np.mean(border > 0.95) > 0.5:
                self.is_ink = True
                self.values = 1 - values

    def tile(self, item, ink):
        """Return one image as (height, width, 4) floats in [0, 1]."""
        values = self.values[item]
        rgba = np.ones((*values.shape[:2], 4))
        if self.is_ink:
            rgba[..., :3] = ink
            rgba[..., 3] = values
        else:
            rgba[..., :3] = values if values.ndim == 3 else values[..., np.newaxis]
        return rgba
