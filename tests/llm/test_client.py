"""The client against a real server that fails in every way: what is asked, how often, when, and what comes of it."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lens_jax.errors import LensError
from lens_jax.llm.client import Client
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.request import Message, Request, Unusable

pytest.importorskip("openai", reason="pip install 'lens-jax[llm]'")


def question(text: str) -> Request:
    return Request((Message("user", (text,)),), max_tokens=8, temperature=0.0)


def questions(count: int) -> list[Request]:
    return [question(f"number {i}") for i in range(count)]


def endpoint(server, **changes) -> Endpoint:
    fast = {"wait_seconds": (0.01, 0.05), "timeout_seconds": 30, "concurrency": 8}
    return Endpoint(url=server.url, model="m", **{**fast, **changes})


@pytest.fixture
def client(fake_server):
    made = []

    def make(**changes) -> Client:
        made.append(Client(endpoint(fake_server, **changes), "the test"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def text_of(body: dict) -> str:
    return body["messages"][-1]["content"]


def one_or_zero(index, answer) -> int:
    if answer.text not in ("0", "1"):
        raise Unusable("neither 0 nor 1", "Answer 0 or 1.")
    return int(answer.text)


def error(status: int, code: str = "", **headers):
    body = {"error": {"message": f"says {status}", "code": code or None}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


def test_every_failure_then_well(fake_server, client):
    """429 with Retry-After, 500, half a JSON, no choices, a reply too late, and "I cannot": each heals."""
    ok = fake_server.chat("1")
    failures = {
        "a": [error(429, Retry_After="0.1"), ok],
        "b": [error(500), error(503), ok],
        "c": [(200, {}, ok[2][: len(ok[2]) // 2]), ok],
        "d": [(200, {}, b'{"choices": null}'), (200, {}, b"[]"), (200, {}, b'"x"'), ok],
        "e": ["late", ok],
        "f": [fake_server.chat("I cannot"), ok],
    }

    def reply(number, path, body, headers):
        script = failures[body["messages"][0]["content"]]
        with fake_server.lock:
            step = script.pop(0) if len(script) > 1 else script[0]
        if step == "late":
            time.sleep(6)
            return ok
        return step

    fake_server.reply = reply
    asking = client(timeout_seconds=5)
    results = asking.ask([question(text) for text in failures], one_or_zero)
    assert [(result.value, result.error) for result in results] == [(1, None)] * 6
    # The model was shown its own answer and told what is wanted.
    asked_again = [body["messages"] for *_, body in fake_server.seen if len(body["messages"]) > 1]
    assert [[m["content"] for m in messages] for messages in asked_again] == [["f", "I cannot", "Answer 0 or 1."]]
    assert (asking.counts.answered, asking.counts.unusable, asking.counts.failed) == (7, 1, 0)
    # On a machine that is busy more may be too late.
    assert asking.counts.retried >= 1 + 2 + 1 + 3 + 1
    assert asking.counts.tokens_in == 700


def test_retry_after_holds_back_everyone(fake_server, client):
    """The server asks one call to wait for a second: no other comes before that, though others are waiting."""
    fake_server.reply = lambda number, *_: fake_server.chat("1") if number else error(429, Retry_After="1")
    assert all(result.value == "1" for result in client(concurrency=1).ask(questions(5)))
    times = [when for when, *_ in fake_server.seen]
    assert len(times) == 6
    assert min(times[1:]) - times[0] >= 1.0


def test_failing_for_good_is_a_result(fake_server, client):
    fake_server.reply = lambda *_: error(500)
    (result,) = client(tries=3).ask([question("x")])
    assert (result.value, result.error) == (None, "HTTP 500: says 500 (tried 3 times)")
    fake_server.reply = lambda *_: error(400, "content_filter")
    (result,) = client(tries=3).ask([question("x")])
    assert result.error == "HTTP 400 (content_filter): says 400"
    fake_server.reply = lambda *_: fake_server.chat("I cannot")
    (result,) = client().ask([question("x")], one_or_zero)
    assert result.error == "neither 0 nor 1; the answer was 'I cannot' (asked 3 times)"
    assert len(fake_server.seen) == 3 + 1 + 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda *_: error(401), "HTTP 401: says 401"),
        (lambda *_: error(404, "model_not_found"), "HTTP 404 (model_not_found): says 404"),
        (lambda *_: error(429, "insufficient_quota"), "HTTP 429 (insufficient_quota)"),
        (lambda *_: error(429, Retry_After="3600"), "asks to wait 3,600 s, longer than endpoint.give_up_seconds=1"),
        (lambda *_: error(503), "no answer for 1 s: HTTP 503: says 503"),
    ],
    ids=["key", "model", "quota", "an hour", "down"],
)
def test_what_no_request_survives_stops_at_once(fake_server, client, reply, message):
    fake_server.reply = reply
    asking = client(give_up_seconds=1.0)
    with pytest.raises(LensError) as stop:
        asking.ask(questions(300))
    assert str(stop.value).startswith(fake_server.url)
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)
    # Those in flight may have been tried often within the second.
    assert len({str(body["messages"]) for _, _, body in fake_server.seen}) < 300
    with pytest.raises(LensError):
        asking.ask(questions(1))


def test_nobody_listens(fake_server):
    gone = Endpoint(url="http://127.0.0.1:9/v1", model="m", give_up_seconds=0.5, wait_seconds=(0.05, 0.1))
    asking = Client(gone, "the rubric judge")
    with pytest.raises(LensError, match=r"^http://127.0.0.1:9/v1: the rubric judge cannot be asked: cannot be reached"):
        asking.check()
    with pytest.raises(LensError, match=r"no answer for 0.5 s: cannot be reached"):
        asking.ask(questions(5))
    asking.close()
    for wrong, message in {"": "needs endpoint.url", "ftp://x": "expected http", "http://a:b@c/v1": "password"}.items():
        with pytest.raises(LensError, match=message):
            Client(Endpoint(url=wrong, model="m"), "the rubric judge")


def test_keys_go_to_their_own_server_only(fake_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("MINE", "sk-mine")
    sent = []

    def reply(number, path, body, headers):
        sent.append(headers["Authorization"])
        return 400, {}, json.dumps({"error": {"message": f"bad key {headers['Authorization']}"}}).encode()

    fake_server.reply = reply
    errors = []
    for changes in ({}, {"key_env": "MINE"}):
        asking = Client(endpoint(fake_server, **changes), "the test")
        errors.append(asking.ask(questions(1))[0].error)
        asking.close()
    assert sent == ["Bearer none", "Bearer sk-mine"]
    assert errors[1] == "HTTP 400: bad key Bearer [key]"
    with pytest.raises(LensError, match="the environment variable ABSENT is not set"):
        Client(endpoint(fake_server, key_env="ABSENT"), "the test")


def test_concurrency_is_kept_and_lowered(fake_server, client):
    """64 at once and no more; to a server that takes 8 fewer go, and everything is answered."""
    together = threading.Barrier(64)

    def all_at_once(number, path, body, headers):
        if number < 64:
            together.wait(timeout=60)
        return fake_server.chat(text_of(body))

    fake_server.reply = all_at_once
    results = client(concurrency=64).ask(questions(200))
    assert [result.value for result in results] == [f"number {i}" for i in range(200)]
    assert fake_server.most_inside == 64

    def eight(number, path, body, headers):
        crowded = fake_server.inside > 8
        time.sleep(0.02)
        return error(429) if crowded else fake_server.chat("1")

    fake_server.reply = eight
    begun = len(fake_server.seen)
    asking = client(concurrency=64)
    assert all(result.value == "1" for result in asking.ask(questions(200)))
    # With 64 coming back each time, 56 of them would be refused for every 8 that are answered: 1,400.
    assert asking.counts.retried < 500
    assert len(fake_server.seen) - begun == 200 + asking.counts.retried


def test_nothing_is_asked_twice(fake_server, client, tmp_path):
    folder = tmp_path / "answers"
    first = client(cache=str(folder))
    fake_server.reply = lambda number, path, body, headers: fake_server.chat("1" if len(body["messages"]) > 1 else "?")
    # The same question four times at once, and one whose first answer is useless: asked again in its own words.
    asked = [question("x")] * 4 + questions(20)
    assert [result.value for result in first.ask(asked, one_or_zero)] == [1] * 24
    assert len(fake_server.seen) == 2 * 21
    fake_server.reply = lambda *_: error(500)
    again = client(cache=str(folder))
    assert [result.value for result in again.ask(asked, one_or_zero)] == [1] * 24
    assert len(fake_server.seen) == 2 * 21
    # Of the four alike, those that ask while another waits share its answer, and those that come later read it.
    assert again.counts.answered == 0
    assert 2 * 21 <= again.counts.cached <= 2 * 24
    # A damaged file, or one of another question, is no answer.
    files = sorted(path for path in folder.glob("*/*.json") if path.parent.name != "spent")
    assert len(files) == 42
    files[0].write_bytes(files[0].read_bytes()[:-3])
    files[1].write_bytes(files[2].read_bytes())
    fake_server.reply = lambda number, path, body, headers: fake_server.chat("1" if len(body["messages"]) > 1 else "?")
    mended = client(cache=str(folder))
    assert [result.value for result in mended.ask(asked, one_or_zero)] == [1] * 24
    assert mended.counts.answered == 2


def test_budgets_hold_over_restarts(fake_server, client, tmp_path):
    """A call of 1,000 tokens in and 100 out at 2 and 10 dollars a million costs 0.003; of 0.1 dollars 33 are paid."""
    fake_server.reply = lambda *_: fake_server.chat("1", tokens=(1000, 100))
    priced = {"usd_per_million": (2.0, 10.0), "cache": str(tmp_path / "answers"), "concurrency": 16}
    part = client(**priced, max_usd=0.05)
    with pytest.raises(LensError, match=r"max_usd is 0.05, and 0.0480 are spent; raise it to go on"):
        part.ask(questions(100))
    part.close()
    assert len(fake_server.seen) == 16
    rest = client(**priced, max_usd=0.1)
    with pytest.raises(LensError, match=r"max_usd is 0.1, and 0.0990 are spent"):
        rest.ask(questions(100))
    rest.close()
    assert len(fake_server.seen) == 33
    assert rest.counts.cached == 16
    with pytest.raises(LensError, match=r"max_usd needs endpoint.usd_per_million"):
        endpoint(fake_server, max_usd=1.0)
    fake_server.reply = lambda *_: (200, {}, b'{"choices": [{"message": {"content": "1"}}]}')
    with pytest.raises(LensError, match="no budget can be kept"):
        client(max_tokens=1000).ask(questions(1))


def test_tokens_a_minute(fake_server, client):
    """1,100 tokens a call, those of 20 calls a second: what the first took over their guess holds back the others."""
    fake_server.reply = lambda *_: fake_server.chat("1", tokens=(1000, 100))
    paced = client(concurrency=1, tokens_per_minute=20 * 60 * 1100)
    assert all(result.value == "1" for result in paced.ask(questions(14)))
    times = [when for when, *_ in fake_server.seen]
    assert max(times) - min(times) >= 12 / 20
    with pytest.raises(LensError, match="tokens_per_minute is nan"):
        endpoint(fake_server, tokens_per_minute=float("nan"))


def test_other_length_field(fake_server, client):
    """A server that knows only `max_tokens` is asked so from then on, by those too that were refused together."""
    together = threading.Barrier(4)

    def old(number, path, body, headers):
        if "max_completion_tokens" in body:
            together.wait(timeout=60)
            return 400, {}, b'{"error": {"message": "Unrecognized request argument: max_completion_tokens"}}'
        return fake_server.chat(str(body["max_tokens"]))

    fake_server.reply = old
    asking = client(concurrency=4, arguments='{"reasoning_effort": "low"}')
    assert [result.value for result in asking.ask(questions(4))] == ["8"] * 4
    assert [result.value for result in asking.ask([question("later")])] == ["8"]
    assert len(fake_server.seen) == 4 + 4 + 1
    assert fake_server.seen[-1][2]["reasoning_effort"] == "low"


def test_closing_ends_those_who_wait(fake_server, client):
    """A run that stops must not wait for a judge that hangs."""
    hanging, held = threading.Event(), threading.Event()

    def hang(number, path, body, headers):
        hanging.set()
        held.wait(60)
        return fake_server.chat("1")

    fake_server.reply = hang
    asking = client(concurrency=2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asking.ask, questions(10))
        assert hanging.wait(60)
        asking.close()
        assert isinstance(waiting.exception(), concurrent.futures.CancelledError)
    assert len(fake_server.seen) <= 2
    with pytest.raises(concurrent.futures.CancelledError):
        asking.ask(questions(1))
    held.set()


CHILD = """
import sys
from lens_jax.llm.client import Client
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.request import Message, Request

url, cache = sys.argv[1:]
client = Client(Endpoint(url=url, model="m", concurrency=8, cache=cache), "the test")
asked = [Request((Message("user", (f"number {i}",)),), 8, 0.0) for i in range(300)]
print(sum(result.value == "1" for result in client.ask(asked)))
client.close()
"""


def test_two_processes_and_a_kill(fake_server, client, tmp_path):
    """Killed while it asks, and asked by two at once: only what was in flight is asked again."""
    lock, answered = threading.Lock(), {}

    def reply(number, path, body, headers):
        time.sleep(0.01)
        with lock:
            answered[text_of(body)] = answered.get(text_of(body), 0) + 1
        return fake_server.chat("1")

    fake_server.reply = reply
    argv = [sys.executable, "-c", CHILD, fake_server.url, str(tmp_path / "answers")]
    start = lambda: subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    child = start()
    while len(answered) < 100:
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    first = set(answered)
    both = [start(), start()]
    assert [child.communicate()[0] for child in both] == ["300\n", "300\n"]
    assert len(answered) == 300
    # 8 in flight when it was killed, and as many of which the answer was on its way to the disk.
    assert sum(answered[text] > 1 for text in first) <= 16
    # What two ask at the same time is asked twice: nobody waits for another process.
    assert sum(answered.values()) <= 2 * 300
    before = len(fake_server.seen)
    assert [result.value for result in client(cache=str(tmp_path / "answers")).ask(questions(300))] == ["1"] * 300
    assert len(fake_server.seen) == before
