"""Data: captioned images from a folder or from a pictogram set, to batches of one bucket.

Writing: `images` decodes and encodes untrusted images, `records` is the format of one example, `shards` are the files
they lie in (`writer` writes those of a whole data set), `index` says what a data set holds, `buckets` are the sizes and
`caption_length` the classes of captions, `scenes` and `phrases` compose captioned images, `sources` finds examples, and
`prepare` writes data sets.

Reading: `config` says what to train on, `datasets` opens and checks it, `mixture` says which images make a batch and
`order` (with `permutation`) in what order a stream is read, `reader` reads records, and `pipeline` makes batches of
them. `tfds_builder` exposes data sets to tensorflow-datasets.
"""
