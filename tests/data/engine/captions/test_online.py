"""Captions through a real server that fails in every way: what is asked, what it costs, what stands in the table."""

import collections
import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lens_jax.data.engine.captions.command import CaptionOptions, run
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.journal import Journal, Taken, UnitAnswers, tokens_spent
from lens_jax.data.engine.tables import read_table
from lens_jax.errors import LensError
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.request import Answer, Message, Request

pytest.importorskip("openai", reason="pip install 'lens-jax[caption]'")
pytest.importorskip("py3langid", reason="pip install 'lens-jax[data]'")


CUT = (0, {}, b"cut the connection")


def error(status: int, code: str = "", **headers):
    body = {"error": {"message": f"says {status}", "code": code or None}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


def test_every_failure_ends_as_it_should(site, model, fake_server):
    """Each image meets another trouble first. In the end all that can be captioned is, with few calls too many."""
    place = site(40, unit_rows=16)
    first = {
        0: error(429, Retry_After="0.2"),
        1: error(429),
        2: error(500),
        3: (200, {}, b'{"choices": [{"message": {"content": "A wo'),
        4: (200, {}, b'{"choices": null}'),
        5: CUT,
        6: "slow",
        7: f"Here is a caption:\n\n{place.text(7)}",
        8: "I'm sorry, I can't help with that.",
        9: "A lamp beside a lamp on the path and " * 12,
        10: "word " * 800,
        11: "Ein hölzernes Boot steht neben einem Tisch auf einem Weg aus Kies, und dahinter lehnt eine alte Lampe.",
        12: fake_server.chat(place.text(12)[:60], finish_reason="length"),
        13: place.text(13) + " There is no visible text.",
        14: error(503),
    }
    always = {20: "I cannot assist with this request.", 21: error(400, "invalid_image"), 22: "1. a\n2. b"}

    def script(number, times):
        if number in always or times > 1:
            return always.get(number)
        if first.get(number) == "slow":
            time.sleep(1)
            return None
        return first.get(number)

    model(place, script)
    said = fake_server.reply
    fake_server.reply = lambda *call: None if (found := said(*call)) == CUT else found
    outcome = place.caption()
    rows = place.rows()
    assert [row["text"] for row in rows if row["status"] == "ok"] == [
        place.text(i) for i in range(40) if i not in always
    ]
    lost = {i: row["status"] for i, row in enumerate(rows) if row["status"] != "ok"}
    assert lost == {20: "refusal", 21: "not answered", 22: "list"}
    assert rows[21]["finish_reason"] == "HTTP 400 (invalid_image): says 400"
    assert outcome.counts["ok"] == 37
    assert outcome.repaired == {"lead-in cut off": 1}
    assert outcome.rejected["refusal"] == 1 + 3
    assert {"loop", "too long", "language", "cut off", "speaks of absent text"} <= outcome.rejected.keys()
    # Each trouble costs a call more; the three that cannot be captioned are asked 3, 1 and 3 times.
    assert {n: model.asked[n] for n in (0, 8, 20, 21, 22, 30)} == {0: 2, 8: 2, 20: 3, 21: 1, 22: 3, 30: 1}
    assert len(fake_server.seen) == 40 + 13 + 4
    seeds = [body.get("seed") for *_, body in fake_server.seen]
    assert sorted(filter(None, seeds)) == [1] * 8 + [2] * 2
    assert rows[0]["usd"] == 0.0
    assert (rows[8]["tokens_in"], rows[8]["attempts"], rows[30]["attempts"]) == (2000, 2, 1)
    # A second run finds the tables; one with other checks finds the answers.
    before = len(fake_server.seen)
    assert place.caption().counts == outcome.counts
    assert place.caption(most_alike=7).counts["ok"] == 37
    # Of the image that the server failed at only that call is made again, if asked for.
    place.caption(retry_failed=True)
    assert len(fake_server.seen) <= before + 2


def test_what_no_image_survives_stops_at_once(site, model, fake_server, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_TEST", "sk-secret-0123456789")
    place = site(60)
    for reply, message in (
        (error(401), "HTTP 401: says 401"),
        (error(404, "model_not_found"), "HTTP 404 (model_not_found)"),
        (error(429, "insufficient_quota"), "HTTP 429 (insufficient_quota)"),
        (error(402), "HTTP 402"),
    ):
        # After some answers: what worked may end to.
        model(place, lambda number, times, reply=reply: reply if sum(model.asked.values()) > 5 else None)
        before = len(fake_server.seen)
        with pytest.raises(LensError, match=re.escape(message)) as stop:
            place.caption(key_env="KEY_OF_TEST")
        assert len(fake_server.seen) - before <= 5 + 8
        assert "secret" not in str(stop.value)
    model(place)
    assert place.caption(key_env="KEY_OF_TEST").counts == {"ok": 60}
    # Nothing that was answered was asked for again, and the key is in no file.
    assert len(fake_server.seen) <= 60 + 4 * 8
    for path in (tmp_path / "work").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes()


def test_refusals_go_to_the_second_model(site, model, fake_server):
    place = site(10, second=Endpoint(url=fake_server.url, model="other", concurrency=2, wait_seconds=(0.01, 0.05)))

    def script(number, times):
        if number in (3, 7) and times == 1:
            return "I'm sorry, but I can't describe that." if number == 3 else error(400, "content_filter")
        return "I cannot help with that." if number == 9 else None

    model(place, script)
    outcome = place.caption()
    rows = place.rows()
    assert [row["model"] for row in rows] == ["other" if i in (3, 7, 9) else "m" for i in range(10)]
    assert [row["status"] for row in rows] == ["ok"] * 9 + ["refusal"]
    assert (outcome.refused, outcome.routed) == (3, 2)
    # The first model is asked once about what it refuses, the second like any other: three times.
    assert {n: model.asked[n] for n in (3, 7, 9)} == {3: 2, 7: 2, 9: 4}
    # Both refusals stand in the journal with what they cost.
    assert tokens_spent(Path(place.config.work) / "answers") == {"m": (9000, 900), "other": (5000, 500)}


def test_kinds(site, model, fake_server):
    """Both captions of one call; brief ones of the dense one's text, without the image; mixed by lot."""
    place = site(24, kinds=("dense", "brief"))
    both = lambda number: json.dumps({"dense": place.text(number), "brief": f"a photo of thing {number}"})
    model(place, lambda number, times: both(number))
    place.caption()
    rows = place.rows()
    assert [(row["kind"], row["text"]) for row in rows[:2]] == [
        ("dense", place.text(0)),
        ("brief", "a photo of thing 0"),
    ]
    assert (len(rows), len(fake_server.seen)) == (48, 24)
    assert sum(row["tokens_in"] for row in rows) == 24_000
    seen = fake_server.reply

    def shorten(number, path, body, headers):
        said = body["messages"][-1]["content"]
        if isinstance(said, str):
            assert place.text(int(re.search(r"number (\d+)", said)[1])) in said
            return fake_server.chat("a boat and a lamp", tokens=(100, 5))
        return seen(number, path, body, headers)

    model(place)
    seen, fake_server.reply = fake_server.reply, shorten
    place.caption(brief_of="text")
    rows = place.rows(brief_of="text")
    assert {row["text"] for row in rows if row["kind"] == "brief"} == {"a boat and a lamp"}
    assert sum(row["tokens_in"] for row in rows) == 24 * 1100
    model(
        place, lambda number, times: None if "60 to 300" in json.dumps(fake_server.seen[-1][2]) else "a photo of a boat"
    )
    place.caption(kinds=("mixed",), concurrency=1)
    kinds = collections.Counter(row["kind"] for row in place.rows(kinds=("mixed",)))
    assert kinds.total() == 24
    assert min(kinds["dense"], kinds["brief"]) >= 4


def test_budget_and_forecast(site, model, fake_server, capsys):
    """1,000 tokens in and 100 out at 2 and 10 dollars a million cost 0.003: of 0.1 dollars 33 are paid, in all runs."""
    place = site(50, unit_rows=20)
    priced = {"usd_per_million": (2.0, 10.0), "concurrency": 4}
    model(place)
    forecast = place.caption(dry_run=True, **priced)
    assert not fake_server.seen
    assert (forecast.images, forecast.calls, forecast.image_tokens) == (50, 50, 50 * (85 + 170))
    assert forecast.usd(place.changed(**priced).caption) == pytest.approx(
        (2 * forecast.tokens_in + 10 * 50 * 145) / 1e6
    )
    assert "50" in capsys.readouterr().out
    with pytest.raises(LensError, match=r"max_usd is 0.05, and 0.0480 are spent; raise it to go on"):
        place.caption(**priced, max_usd=0.05)
    assert len(fake_server.seen) == 16
    assert place.caption(dry_run=True, **priced).images == 50 - 16
    with pytest.raises(LensError, match=r"max_usd is 0.1, and 0.0990 are spent"):
        place.caption(**priced, max_usd=0.1)
    assert len(fake_server.seen) == 33
    assert place.caption(**priced).counts == {"ok": 50}
    assert len(fake_server.seen) == 50
    assert sum(row["usd"] for row in place.rows()) == pytest.approx(50 * 0.003)
    assert place.caption(dry_run=True).images == 0


def test_same_captions_are_none(site, model, fake_server):
    """In a unit and over units; the answers are kept, so that another limit costs nothing."""
    place = site(30, unit_rows=10)
    model(place, lambda number, times: place.text(1) if number % 2 else place.text(2) if number in (2, 4) else None)
    outcome = place.caption(most_alike=8, accept_losses=True)
    assert outcome.counts == {"ok": 15, "same as others": 15}
    assert [row["status"] for row in place.rows(most_alike=8)] == ["ok", "same as others"] * 15
    assert place.caption(most_alike=8, accept_losses=True).counts == outcome.counts
    assert place.caption(most_alike=4, accept_losses=True).counts == outcome.counts
    assert place.caption(most_alike=1, accept_losses=True).counts == {"ok": 13, "same as others": 17}
    assert len(fake_server.seen) == 30


def test_same_captions_are_counted_over_units_of_all_machines(site, model, fake_server):
    """Nine in the first unit, which refuses them by itself, and three in the second, of another machine."""
    place = site(20, unit_rows=10)
    model(place, lambda number, times: place.text(1) if number < 9 or 10 <= number < 13 else None)
    for host in (0, 1):
        place.caption(most_alike=8, accept_losses=True, host=host, hosts=2)
    same = {*range(9), 10, 11, 12}
    statuses = ["same as others" if number in same else "ok" for number in range(20)]
    assert [row["status"] for row in place.rows(most_alike=8)] == statuses
    assert place.caption(most_alike=8, accept_losses=True).counts == {"ok": 8, "same as others": 12}


def test_losses_stop(site, model, fake_server):
    place = site(30)
    model(place, lambda number, times: "I cannot help with that.")
    with pytest.raises(LensError, match=r"source pictures: stage caption lost 30 of 30 images \(30 refusal\)"):
        place.caption(asks=1)
    with pytest.raises(LensError, match="and --strict"):
        place.caption(asks=2, strict=True)
    silent = dataclasses.replace(place.config, caption=None)
    with pytest.raises(LensError, match="no `caption`"):
        run(silent, CaptionOptions(), place.layout, place.units)


def test_answers_of_any_kind_of_file(tmp_path):
    """A journal is read whatever a killed process or a full disk has left in it, and held by one process at a time."""
    asked = Request((Message("user", ("x",)),), 8, about="u")
    journal = Journal(tmp_path)
    mine = journal.open("u")
    with pytest.raises(Taken):
        UnitAnswers(tmp_path, "u")
    keeper = journal.of_model("m")
    for key in "abc":
        keeper.begin(key, asked)
    keeper.put("a", asked, Answer("one", tokens_in=3, tokens_out=4))
    keeper.fail("b", asked)
    journal.close()
    path = tmp_path / "u.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "d", "model": "m", "answer": {"text": "tw')
    garbage = [b"\xff\xfe", b"[1, 2]", b'{"key": 5}', b'{"key": "e", "answer": []}', b"[" * 100_000, b"", b"{}"]
    journal = Journal(tmp_path)
    mine = journal.open("u")
    mine.begin("c")
    mine.begin("b")
    assert (mine.asked_again, mine.get("a").text, mine.get("d"), mine.get("b")) == (1, "one", None, None)
    mine.put("d", "n", Answer("two", tokens_in=5, tokens_out=6))
    journal.close()
    with open(path, "ab") as file:
        file.write(b"\n".join(garbage))
    assert tokens_spent(tmp_path) == {"m": (3, 4), "n": (5, 6)}
    journal = Journal(tmp_path)
    journal.open("u")
    journal.finish("u")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["u.parquet"]
    assert tokens_spent(tmp_path) == {"m": (3, 4), "n": (5, 6)}
    # The table holds; half of one is not taken for an empty one.
    journal = Journal(tmp_path)
    assert journal.open("u").get("d").text == "two"
    journal.close()
    (tmp_path / "u.parquet").write_bytes((tmp_path / "u.parquet").read_bytes()[:-20])
    with pytest.raises(LensError, match=r"u\.parquet"):
        Journal(tmp_path).open("u")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("dense", "mixed")}, "stands alone"),
        ({"kinds": ("long",)}, "accepted: some of dense, brief, mixed"),
        ({"kinds": ()}, "accepted: some of"),
        ({"short_side": 10}, "short_side is 10"),
        ({"poll_seconds": float("nan")}, "poll_seconds is nan"),
        ({"quality": 101}, "at most 100"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"image_tokens": (85, 170, 0)}, "a side from 1"),
        ({"endpoint": Endpoint(url="http://x/v1", model="m", cache="c")}, "leave it empty"),
    ],
)
def test_config(changes, message):
    with pytest.raises(LensError, match=re.escape(message)):
        Caption(**changes)


CHILD = """
import pickle, sys
from lens_jax.data.engine.captions.command import CaptionOptions, run
config, layout, units = pickle.load(open(sys.argv[1], "rb"))
print(run(config, CaptionOptions(), layout, units).asked_again)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_never_paid_twice(site, model, fake_server, tmp_path, kills):
    """SIGKILL while it asks: what has been answered to it is not asked for again."""
    count = 60 * (kills + 1)
    place = site(count, unit_rows=25)
    pace = lambda number, times: time.sleep(0.02)
    model(place, pace)
    job = tmp_path / "job.pickle"
    job.write_bytes(pickle.dumps((place.config, place.layout, place.units)))
    start = lambda: subprocess.Popen([sys.executable, "-c", CHILD, str(job)], stdout=subprocess.PIPE, text=True)
    answered = tmp_path / "work" / "answers"
    known = set()
    for kill in range(kills):
        child = start()
        while len(fake_server.seen) < 50 * (kill + 1):
            assert child.poll() is None
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        known = set()
        for path in answered.iterdir():
            if path.suffix == ".jsonl":
                lines = path.read_bytes().split(b"\n")
                known |= {json.loads(line)["key"] for line in lines[:-1] if b'"answer"' in line}
            else:
                known |= set(read_table(path)["key"].to_pylist())
        assert len(known) >= len(fake_server.seen) - 8 * (kill + 1) - 8
    out, _ = start().communicate()
    assert [row["text"] for row in place.rows()] == [place.text(i) for i in range(count)]
    # 8 in flight at each kill; all of them, and nothing else, may have been paid for twice, and are counted.
    twice = sum(model.asked.values()) - count
    assert twice <= 8 * kills
    assert twice <= int(out.split()[-1]) <= 8 * kills
