"""The benchmark of captions asks a real server in another process, in three ways. No speed is judged here."""

import pytest

from lens_jax.bench.captions import CaptionsBench, bench_captions
from lens_jax.errors import LensError

pytest.importorskip("openai", reason="pip install 'lens-jax[caption]'")
pytest.importorskip("py3langid", reason="pip install 'lens-jax[data]'")


def test_captions(tmp_path):
    path = tmp_path / "result.json"
    result = bench_captions(CaptionsBench(count=5, in_flight=3, milliseconds=1.0, repeats=1, json=str(path)))
    assert path.is_file()
    assert 80 < result["kilobytes_a_request"] < 300
    for name in ("whole", "asking", "sdk"):
        assert result[f"{name}_captions_a_core_second"] > 0
    ratio = result["asking_captions_a_core_second"] / result["sdk_captions_a_core_second"]
    assert result["asking_ratio_to_sdk"] == pytest.approx(ratio)
    with pytest.raises(LensError, match="--count is 0"):
        CaptionsBench(count=0)
