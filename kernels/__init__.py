"""Loss, views, gather, optimizer and batch norm: Triton kernels and their torch references, usable on their own.

    from fastsimclr.kernels import batch_norm, gather_views, lars_step, make_views, nt_xent

Nothing here knows of the trainer. On CUDA the Triton kernels run, elsewhere the references; `backend` says otherwise.
"""

if __name__ != "fastsimclr.kernels":
    raise ImportError(f"import fastsimclr.kernels, not {__name__}: the folder kernels/ is part of that package")

from fastsimclr.kernels.batch_norm import batch_norm
from fastsimclr.kernels.gather import gather_views
from fastsimclr.kernels.lars import lars_step
from fastsimclr.kernels.nt_xent import NtXent, nt_xent
from fastsimclr.kernels.views import make_views

__all__ = ["NtXent", "batch_norm", "gather_views", "lars_step", "make_views", "nt_xent"]
