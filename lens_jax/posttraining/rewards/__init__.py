"""What an image is worth, given its prompt: one contract (`reward.py`), one file a kind of reward."""
