"""Batches: complete, reproducible, and independent of history and of the number of hosts."""

import json

import numpy as np
import pytest

from lens_jax.data.manifest import NAME, fingerprint, load_manifest
from lens_jax.data.permutation import permute
from lens_jax.data.pipeline import BatchPlan, BatchSource, DataConfig, batches, validation_batches
from lens_jax.data.prepare import OpenMojiConfig, prepare_openmoji
from lens_jax.errors import LensError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = OpenMojiConfig(
        out=str(tmp_path_factory.mktemp("data") / "openmoji"), concepts=8, scenes=60, copies=1, validation=11
    )
    return str(prepare_openmoji(config, progress=False))


def equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_permutations_are_permutations_and_stay_what_they_are():
    for size in (1, 2, 3, 8, 9, 1000, 4097):
        np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, 5, 6)), np.arange(size))
    # Literal numbers: a change here would break the resumption of every run.
    assert permute(np.arange(10), 10, 0, 1, 2).tolist() == [2, 6, 4, 0, 9, 8, 1, 7, 5, 3]
    huge = permute(np.arange(1000), 10**12, 3)
    assert len(np.unique(huge)) == 1000
    assert abs(huge.mean() / 10**12 - 0.5) < 0.05  # five standard errors


@pytest.mark.parametrize("counts", [(100, 37, 0, 5), (7,), (64, 64)])
def test_every_record_once_an_epoch(counts):
    plan = BatchPlan(counts, batch_size=8, seed=3)
    streams = [[] for _ in counts]
    for step in range(10 * sum(plan.batches)):
        bucket, positions = plan.plan(step)
        assert len(positions) == 8
        streams[bucket].extend(positions)
    for count, stream, share in zip(counts, streams, plan.batches):
        assert len(stream) == 10 * share * 8
        epochs = [stream[start : start + count] for start in range(0, len(stream) - count + 1, max(count, 1)) if count]
        for epoch in epochs:
            assert sorted(epoch) == list(range(count))
        if count > 6:
            assert len(set(map(tuple, epochs))) == len(epochs)  # each epoch in another order


def test_plan_does_not_depend_on_history():
    forward = BatchPlan((50, 20), 8, 1)
    backward = BatchPlan((50, 20), 8, 1)
    ahead = {step: forward.plan(step) for step in range(40)}
    for step in reversed(range(40)):
        bucket, positions = backward.plan(step)
        assert bucket == ahead[step][0]
        np.testing.assert_array_equal(positions, ahead[step][1])
    other = BatchPlan((50, 20), 8, 2)
    assert any(other.plan(step)[1].tolist() != ahead[step][1].tolist() for step in range(3))


def test_weights_change_the_share_of_a_bucket():
    assert BatchPlan((80, 80), 8, 0, (1, 3)).batches == (10, 30)
    with pytest.raises(LensError, match="weights"):
        BatchPlan((80, 80), 8, 0, (1,))


def test_hosts_partition_the_batch(data):
    manifest, config = load_manifest(data), DataConfig(path=data, batch_size=6, seed=4)
    whole = BatchSource(manifest, "train", config)
    # As a torus has them: the rows of a host are no block.
    rows = [np.array([0, 2, 5]), np.array([1, 3, 4])]
    halves = [BatchSource(manifest, "train", config, lambda size, mine=mine: mine) for mine in rows]
    for step in (0, 5, 1000):
        batch, parts = whole[step], [half[step] for half in halves]
        for part, mine in zip(parts, rows):
            np.testing.assert_array_equal(batch["pixels"][mine], part["pixels"])
            assert [batch["captions"][row] for row in mine] == part["captions"]
        assert {batch["bucket"], *(part["bucket"] for part in parts)} == {batch["pixels"].shape[1:3]}


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_equals_no_interruption(data, threads):
    config = DataConfig(path=data, batch_size=4, threads=threads)
    iterator = batches(config, num_steps=12)
    first = [next(iterator) for _ in range(5)]
    state = iterator.get_state()
    rest = list(iterator)
    iterator.close()
    assert [batch["step"] for batch in first + rest] == list(range(12))

    restored = batches(config, num_steps=12)
    restored.set_state(json.loads(json.dumps(state)))
    again = batches(config, start_step=5, num_steps=7)
    for expected, one, other in zip(rest, restored, again, strict=True):
        equal(expected, one)
        equal(expected, other)
    restored.close()
    again.close()


def test_transform_and_languages(data):
    config = DataConfig(path=data, batch_size=4, languages=("de",), threads=1)
    iterator = batches(config, num_steps=2, transform=lambda batch: {"n": len(batch["captions"]), **batch})
    assert next(iterator)["n"] == 4
    iterator.close()
    for languages, words in ((("it",), "'it'"), (("xx",), "'xx'")):  # held out; unknown
        with pytest.raises(LensError, match=words):
            batches(DataConfig(path=data, languages=languages))
    assert next(validation_batches(DataConfig(path=data, languages=("it",))))["captions"]


def test_validation_sees_every_record_once(data):
    manifest, config = load_manifest(data), DataConfig(path=data, batch_size=4)
    runs = [list(validation_batches(config)) for _ in range(2)]
    assert sum(batch["weight"].sum() for batch in runs[0]) == 11 == sum(manifest.counts("validation"))
    for one, other in zip(*runs, strict=True):
        equal(one, other)
    seen = [image.tobytes() for b in runs[0] for image, weight in zip(b["pixels"], b["weight"]) if weight]
    assert len(set(seen)) == 11
    host = list(validation_batches(config, rows=lambda size: np.arange(1, size, 2)))
    np.testing.assert_array_equal(host[0]["pixels"], runs[0][0]["pixels"][1::2])


def test_damage_is_named(data, tmp_path):
    import shutil

    with pytest.raises(LensError, match="lens-jax prepare openmoji"):
        load_manifest(tmp_path / "none")
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    manifest = load_manifest(copy)
    assert fingerprint(manifest) == fingerprint(load_manifest(data))
    shard = copy / manifest.shards[0].name
    content = shard.read_bytes()

    shard.write_bytes(content[:-65_536])
    with pytest.raises(LensError, match="truncated"):
        load_manifest(copy)

    # The same damage, hidden from the check of sizes.
    text = (copy / NAME).read_text()
    fields = json.loads(text)
    fields["shards"][0]["bytes"] -= 65_536
    (copy / NAME).write_text(json.dumps(fields))
    with pytest.raises(LensError, match=shard.name):
        list(load_manifest(copy).records("train"))

    shard.unlink()
    with pytest.raises(LensError, match="missing"):
        load_manifest(copy)
    for bad in (text[:200], "[]", text.replace('"version": 1', '"version": 9'), text.replace('"records"', '"r"')):
        (copy / NAME).write_text(bad)
        with pytest.raises(LensError, match=NAME):
            load_manifest(copy)
