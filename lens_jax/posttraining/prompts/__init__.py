"""Sets of prompts to train and judge on, in the manner of the report's Lens-RL-8K: `prompt.py` is the record."""
