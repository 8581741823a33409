"""Benchmarks of the loader, the step and whole training, each beside a baseline that runs in the same rounds."""
