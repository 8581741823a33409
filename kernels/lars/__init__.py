"""LARS, the layer-wise scaled momentum step of SimCLR's training."""

from fastsimclr.kernels.lars.reference import Variant, lars_step

__all__ = ["Variant", "lars_step"]
