"""A run folder: checkpoints, the log, text files, and clean stops."""
