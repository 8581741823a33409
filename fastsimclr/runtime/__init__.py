"""The process a run lives in: versions, device and precision, environment, random state, memory."""
