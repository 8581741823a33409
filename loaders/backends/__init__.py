"""What reads, decodes and batches for a Loader: one module a backend."""
