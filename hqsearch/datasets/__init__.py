"""Data sets of the papers and stand-ins for them, from a folder, this machine, or scikit-learn itself.

Nothing here uses the network. All come in one form: training items first, then test items, and both as views.
"""

from hqsearch.datasets.cifar import fetch_cifar100
from hqsearch.datasets.digits import load_digits
from hqsearch.datasets.fashion_mnist import load_fashion_mnist
from hqsearch.datasets.glyphs import load_glyph100
from hqsearch.datasets.imagenet32 import fetch_imagenet32
from hqsearch.datasets.letters import load_letters

__all__ = [
    "fetch_cifar100",
    "fetch_imagenet32",
    "load_digits",
    "load_fashion_mnist",
    "load_glyph100",
    "load_letters",
]
