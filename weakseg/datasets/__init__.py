"""Images with image-level labels: readers, the `Sample` type, the sealed truth, the synthetic set."""

from weakseg.datasets.read import read
from weakseg.datasets.sample import Dataset, Sample

__all__ = ["Dataset", "Sample", "read"]
