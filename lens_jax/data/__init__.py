"""Data: captioned images from a folder or from a pictogram set, to batches of one bucket.

`images` decodes and encodes untrusted images, `records` is the format of one example, `shards` are the files they lie
in (`shard_set` writes those of a whole data set, `atomic` makes it appear whole or not at all),
`manifest` the description of a data set, `buckets` the sizes, `scenes` and `phrases` compose captioned images,
`sources` finds examples, `prepare` writes data sets, `pipeline` (with `permutation`) reads them in batches, and
`tfds_builder` exposes them to tensorflow-datasets.
"""
