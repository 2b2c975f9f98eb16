"""Language models behind OpenAI-compatible endpoints, hosted or one's own: the one client of all that asks them."""
