"""Duplicates: exact ones by their bytes, near ones by the cosine of their embeddings (report, section 2, step 9).

Of duplicates the first in an order of priority is kept: an image is dropped if and only if an image that is kept, and
comes before it, is its duplicate. So no two kept images are duplicates, every dropped one names a kept one, and neither
the order of the input nor how the work is divided changes what is kept. `run.py` has the whole, `cells.py` why the
search is exact.
"""
