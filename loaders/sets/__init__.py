"""Where images come from: folders, lists, arrays, Hugging Face data, and their labelled and held-out parts."""
