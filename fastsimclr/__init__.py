"""fastsimclr: SimCLR v1 and v2 from a folder of mostly unlabelled images to a compact classifier."""

__version__ = "0.1.0"
