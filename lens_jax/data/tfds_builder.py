"""A prepared data set as a tensorflow-datasets builder, without TensorFlow.

    builder = as_tfds("data/openmoji", "data/tfds")
    source = builder.as_data_source("train[:10%]")      # later: tfds.builder_from_directory(builder.data_dir)

Images are handed over encoded (arrays would make tensorflow-datasets import TensorFlow), and texts come back as
bytes. The features: image [H, W, 3] uint8, captions {language, text}, height, width, source, licence, meta (JSON).
"""

import io
import json
import os

import numpy as np

from lens_jax.data.index import SPLITS, load_index
from lens_jax.errors import LensError


def as_tfds(data_dir: str | os.PathLike, tfds_dir: str | os.PathLike):
    """Copy the data set at `data_dir` to `tfds_dir` in tensorflow-datasets' layout; returns the builder.

    Does nothing when it is there already. LensError when the data set or the package is missing.
    """
    index = load_index(data_dir)
    try:
        import importlib_resources  # noqa: F401  (imported by tensorflow-datasets, missing from its requirements)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise LensError(f'the package {error.name} is missing: pip install "lens-jax[tfds]"') from error

    class LensData(tfds.core.GeneratorBasedBuilder):
        """Captioned images prepared by lens-jax."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "captions": tfds.features.Sequence({"language": text, "text": text}),
                "height": tfds.features.Scalar(np.int32),
                "width": tfds.features.Scalar(np.int32),
                "source": text,
                "licence": text,
                "meta": text,
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{index.source}, prepared by lens-jax, fingerprint {index.fingerprint}",
                features=tfds.features.FeaturesDict(features),
                license=index.licence,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS if any(index.counts(split))}

        def _generate_examples(self, split):
            for number, record in enumerate(index.records(split)):
                pairs = [(language, text) for language, texts in record.captions.items() for text in texts]
                yield (
                    number,
                    {
                        "image": io.BytesIO(record.image),
                        "captions": [{"language": language, "text": text} for language, text in pairs],
                        "height": record.height,
                        "width": record.width,
                        "source": record.source,
                        "licence": record.licence,
                        "meta": json.dumps(dict(record.meta), ensure_ascii=False),
                    },
                )

    # The name carries the fingerprint, so that a data set prepared anew is not mistaken for the old one.
    LensData.name = f"lens_{index.source}_{index.fingerprint}"
    builder = LensData(data_dir=os.fspath(tfds_dir), file_format="array_record")
    builder.download_and_prepare()
    return builder
