"""Captions by the batch API: files within its limits, what comes of batches that end badly, and kills."""

import collections

import pytest

from lens_jax.data.engine.captions import batch as captions_batch
from lens_jax.errors import LensError
from lens_jax.llm import batch as api

pytest.importorskip("openai", reason="pip install 'lens-jax[caption]'")
pytest.importorskip("py3langid", reason="pip install 'lens-jax[data]'")
FAST = {"mode": "batch", "poll_seconds": 0.05}


def whole(place, **changes):
    return [row["text"] for row in place.rows(**changes)] == [place.text(i) for i in range(len(place.numbers))]


def test_files_within_limits(site, batches, fake_server, monkeypatch):
    """Four lines or so many bytes a file; all answered once; nothing is left at the server."""
    monkeypatch.setattr(api, "MAX_REQUESTS", 4)
    place = site(22, unit_rows=11, **FAST)
    server = batches(place)
    assert place.caption(batches=2).counts == {"ok": 22}
    assert whole(place)
    assert len(server.uploaded) == 2 * 3
    assert len(server.answered) == len(set(server.answered)) == 22
    assert not server.files
    monkeypatch.setattr(api, "MAX_BYTES", 2 * max(server.uploaded) // 4)
    other = place.caption(temperature=0.3)
    assert other.counts == {"ok": 22}
    assert max(server.uploaded[6:]) <= api.MAX_BYTES
    assert {body["endpoint"] for *_, body in fake_server.seen} == {"/v1/chat/completions"}


def test_batches_that_end_badly(site, batches, fake_server):
    """Turned down for its tokens, expired with a part, completed without a file; a refusal, an error."""
    place = site(20, **FAST)
    tries = collections.Counter()

    def script(number):
        tries[number] += 1
        if number == 3 and tries[3] == 1:
            return "I'm sorry, I can't help with that."
        if number == 4 and tries[4] == 1:
            return 500, {"error": {"message": "oops"}}
        return None

    server = batches(place, script)
    ends = {0: ("failed", 0), 1: ("expired", 7), 2: ("completed", 0)}
    server.ends = lambda number, lines: ends.get(number, ("completed", lines))
    outcome = place.caption(poll_seconds=0.02)
    assert outcome.counts == {"ok": 20}
    assert outcome.rejected == {"refusal": 1}
    assert whole(place)
    assert tries.total() == 22
    assert not server.files
    # All of it by batches: no question was asked online.
    assert {path for _, path, _ in fake_server.seen} == {"/v1/batches"}


def test_failed_for_good(site, batches, fake_server):
    place = site(20, **FAST)
    server = batches(place)
    server._end = lambda batch: batch.update(
        status="failed", errors={"data": [{"code": "invalid_request", "message": "no such model m"}]}
    )
    with pytest.raises(LensError, match=r"batch batch_0 failed: no such model m"):
        place.caption()
    server = batches(place)
    server.ends = lambda number, lines: ("completed", 0)
    with pytest.raises(LensError, match=r"left 20 of 20 questions .* without an answer in 3 rounds"):
        place.caption()


def test_killed_between_any_two_steps(site, batches, fake_server, monkeypatch):
    """A process that ends after any step of a batch's life goes on with what there is: each image is answered once."""
    place = site(12, **FAST)
    server = batches(place)

    class Killed(Exception):
        pass

    def killing(owner, name, before):
        method = getattr(owner, name)

        def killed(*args, **options):
            if not before:
                method(*args, **options)
            raise Killed

        return lambda m: m.setattr(owner, name, killed)

    steps = [
        killing(api.Batches, "upload", True), killing(api.Batches, "upload", False),
        killing(api.Batches, "create", True), killing(api.Batches, "create", False),
        killing(api.Batches, "look", True), killing(api.Batches, "results", True),
        killing(api.Batches, "remove", True), killing(captions_batch.Online, "run", True),
    ]  # fmt: skip
    for step in steps:
        with monkeypatch.context() as patched:
            step(patched)
            with pytest.raises(Killed):
                place.caption()
    assert place.caption().counts == {"ok": 12}
    assert whole(place)
    assert len(server.answered) == len(set(server.answered)) == 12


def test_lost_reply_makes_no_second_batch(site, batches, fake_server):
    place = site(5, **FAST)
    server = batches(place)
    server.cut.add("create")
    assert place.caption().counts == {"ok": 5}
    assert len(server.batches) == 1
    assert len(server.answered) == 5


def test_budget(site, batches, fake_server, monkeypatch):
    """No file is sent that might take more than what is left: 40 answers of 900 tokens at 10 dollars a million."""
    monkeypatch.setattr(api, "MAX_REQUESTS", 5)
    place = site(40, unit_rows=10, **FAST)
    server = batches(place)
    with pytest.raises(LensError, match=r"max_usd is 0\.1, .* are spent, and the next file may take"):
        place.caption(usd_per_million=(2.0, 10.0), max_usd=0.1)
    # Three files: 0.045 are spent then, and the next might take 0.06.
    assert len(server.answered) == 15
    assert place.caption().counts == {"ok": 40}
    assert len(server.answered) == 40
