"""What learned codes are compared with, as encoders that the same index searches.

Each ranks by the embedding of an encoder that it is given and puts items into buckets in its own way, so that
a comparison is one of codes alone.
"""

from hqsearch.baselines.random_hyperplane import RandomHyperplaneHashEncoder
from hqsearch.baselines.softmax import SoftmaxHashEncoder
from hqsearch.baselines.threshold import ThresholdHashEncoder
from hqsearch.baselines.vector_quantization import VectorQuantizationHashEncoder

__all__ = [
    "RandomHyperplaneHashEncoder",
    "SoftmaxHashEncoder",
    "ThresholdHashEncoder",
    "VectorQuantizationHashEncoder",
]
