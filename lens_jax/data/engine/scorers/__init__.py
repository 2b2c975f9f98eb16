"""Networks that score images, each behind the protocol of `scorer.py`."""
