"""Pictures of an index: its hash tree, the sizes of its leaves, and what its speed costs in precision."""

from .bucket_occupancy import BucketOccupancyDisplay
from .hash_tree import HashTreeDisplay
from .speedup_precision import SpeedupPrecisionDisplay

__all__ = ["BucketOccupancyDisplay", "HashTreeDisplay", "SpeedupPrecisionDisplay"]
