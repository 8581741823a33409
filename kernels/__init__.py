"""The loss, view and optimizer kernels: a plain torch reference of each; nothing here knows of the trainer."""

if __name__ != "fastsimclr.kernels":
    raise ImportError(f"import fastsimclr.kernels, not {__name__}: the folder kernels/ is part of that package")
