"""Flow matching: how noise is mixed in for training, and how it is taken out for sampling."""
