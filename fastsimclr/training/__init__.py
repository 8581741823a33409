"""The training loop of every stage: the step, the feed, the settings, and what runs between steps."""
