"""WebDataset tars, on disk or behind a URL, with their index and local cache."""
