"""A folder of your own images as a data set: cleaned in the report's nine steps, packed, with a report page.

    lens-jax data build data_example --sources.0.path ~/photos

Put images in `photos/`, each with a caption in a text file beside it (`cat.jpg`, `cat.txt`), or describe them in
`metadata.jsonl`. `lens-jax data plan` says how long more of them will take. Copy this file to say more: other sources,
a model that writes the captions, networks that score. `docs/data_engine.md` has it all.
"""

from lens_jax.data.engine.config import EngineConfig, Source, Thresholds

config = EngineConfig(
    sources=(Source("photos", "folder", "photos", licence="my own", caption="keep"),),
    work="work/photos",
    out="data/photos",
    thresholds=Thresholds(),
    buckets=("lens-512",),
    validation=0.02,
)
