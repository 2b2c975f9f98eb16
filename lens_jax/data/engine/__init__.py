"""The data engine: raw collections of images to packed data sets, as the report cleans and captions its own.

A *unit* is some thousand images of one source. A *stage* is a pure function of a unit to one table, which is written
aside and renamed; the name of its file says of which unit, and of which settings. So each image is processed exactly
once whatever becomes of the workers, whoever started them.
"""
