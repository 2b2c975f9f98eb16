"""Images of rendered text, a source of the report of its own (section 1): words and sentences on backgrounds.

`draw.synthesize` is a pure function of a seed and a number; what it draws with is loaded once by `materials`.
"""
