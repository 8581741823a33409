"""The three parts of `make gpu-check`: kernels against references, speed against rooflines, and a training."""
