"""The hosted reasoner against a real server that fails in every way: what is sent, and what becomes of each prompt."""

import dataclasses
import json
import threading
import time

import pytest

from lens_jax.errors import LensError
from lens_jax.llm.endpoint import Endpoint
from lens_jax.reasoner import api
from lens_jax.reasoner.api import ApiReasoner
from lens_jax.reasoner.instructions import INSTRUCTIONS, digest

pytest.importorskip("openai", reason="pip install 'lens-jax[llm]'")

WELL = "A ginger cat with long fur sleeps on a blue cushion in the morning sun."
LONG = WELL + " Behind it stands an old oak table." * 100
KEY = "sk-that-nobody-may-see"


@pytest.fixture
def reasoner(fake_server):
    made = []

    def make(at: dict | None = None, **changes) -> ApiReasoner:
        """`at` changes the endpoint."""
        fast = {"url": fake_server.url, "model": "m", "wait_seconds": (0.01, 0.05), "timeout_seconds": 30.0}
        made.append(ApiReasoner(api.default_endpoint(**{**fast, **(at or {})}), **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def prompt_of(body: dict) -> str:
    return body["messages"][1]["content"]


def error(status: int, code: str = "", message: str = "no", **headers):
    body = {"error": {"message": message, "code": code or None}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


def refusal(chat) -> tuple:
    status, headers, data = chat("")
    body = json.loads(data)
    body["choices"][0]["message"] |= {"content": None, "refusal": "I can't help with that."}
    return status, headers, json.dumps(body).encode()


# By prompt: what the server says, the last of it for ever, and what becomes of the prompt.
CASES = {
    "a cat": (lambda chat: [chat(WELL)], "used", ""),
    "a cat asleep": (lambda chat: [error(429, Retry_After="0.05"), error(500), chat(WELL)], "used", ""),
    "a  cat\n on a mat": (lambda chat: [chat("a cat on a mat")], "kept", ""),
    "a cat, broken": (lambda chat: [error(500)], "raw", "unreachable"),
    "a cat, half": (lambda chat: [(200, {}, chat(WELL)[2][:40])], "raw", "bad_reply"),
    "a cat, nothing": (lambda chat: [(200, {}, b'{"choices": []}')], "raw", "bad_reply"),
    "a cat, odd": (lambda chat: [chat("A cat \ud83d.")], "raw", "bad_reply"),
    "a cat, no field": (lambda chat: [error(400, "unsupported_value")], "raw", "bad_reply"),
    "a cat, slow": (lambda chat: [error(408)], "raw", "timeout"),
    "a cat, policy": (lambda chat: [error(400, "content_policy_violation")], "raw", "refused"),
    "a cat, azure": (lambda chat: [error(400, "content_filter")], "raw", "refused"),
    "a cat, refused": (lambda chat: [refusal(chat)], "raw", "refused"),
    "a cat, filtered": (lambda chat: [chat("A ginger", finish_reason="content_filter")], "raw", "refused"),
    "a cat, empty": (lambda chat: [chat(" \n")], "raw", "empty"),
    "a cat, thought about": (lambda chat: [chat(f"<think>Cats?\nYes.</think>\n\n{WELL}")], "used", ""),
    "a cat, only thought": (lambda chat: [chat("<think>Cats are")], "raw", "empty"),
    "a cat, cut": (lambda chat: [chat("A ginger cat with", finish_reason="length")], "raw", "truncated"),
    "a cat, other letters": (lambda chat: [chat("Рыжая кошка спит на синей подушке под солнцем.")], "raw", "language"),
    'a cat, "MIAU"': (lambda chat: [chat("A ginger cat with a sign that says MIAOW.")], "raw", "lost_text"),
    "17 cats": (lambda chat: [chat("Many ginger cats sleep on blue cushions.")], "raw", "lost_number"),
    "a cat, long": (lambda chat: [chat(LONG), chat(WELL)], "used", ""),
    "a cat, longer": (lambda chat: [chat(LONG)], "raw", "too_long"),
}


def test_what_becomes_of_each_prompt_in_their_order(fake_server, reasoner):
    scripts = {prompt: script(fake_server.chat) for prompt, (script, *_) in CASES.items()}

    def reply(number, path, body, headers):
        with fake_server.lock:
            script = scripts[prompt_of(body)]
            return script.pop(0) if len(script) > 1 else script[0]

    fake_server.reply = reply
    # A blank one, and one that is there twice.
    prompts = ["", *CASES, " \n", "a cat"]
    found = reasoner().rewrite(prompts)
    assert [made.prompt for made in found] == prompts
    expected = [("kept", ""), *(case[1:] for case in CASES.values()), ("kept", ""), ("used", "")]
    assert [(made.status, made.reason) for made in found] == expected
    # Only what is used is another text than the prompt.
    assert all(made.text == (WELL if made.status == "used" else made.prompt) for made in found)
    assert all(bool(made.detail) == (made.status == "raw") and "\n" not in made.detail for made in found)
    named = {(made.model, made.instructions) for made in found if made.prompt.strip()}
    assert named == {("m", digest(INSTRUCTIONS))}
    used = found[prompts.index("a cat")]
    assert (used.tokens_in, used.tokens_out) == (100, 1)
    assert used.seconds > 0
    asked = [prompt_of(body) for *_, body in fake_server.seen]
    tries = {prompt: asked.count(prompt) for prompt in CASES}
    # What the server failed at is asked three times, what is too long twice, and all else once.
    three = ("a cat asleep", "a cat, broken", "a cat, half", "a cat, nothing", "a cat, slow")
    assert tries == {p: 3 if p in three else 2 if p in ("a cat, long", "a cat, longer") else 1 for p in CASES}
    assert len(asked) == sum(tries.values())


def test_what_is_sent(fake_server, reasoner):
    """The instructions and the prompt, and nothing else; a seed is not sent, so it asks nothing anew."""
    fake_server.reply = lambda *_: fake_server.chat(WELL)
    one = reasoner(instructions="Rewrite it.", max_tokens=77)
    one.check()
    one.rewrite(["a cat"], seed=3)
    messages = [{"role": "system", "content": "Rewrite it."}, {"role": "user", "content": "a cat"}]
    sent = {"model": "m", "messages": messages, "max_completion_tokens": 77}
    assert [(path, body) for _, path, body in fake_server.seen] == [("/v1/chat/completions", sent)]
    reasoner(temperature=0.5).rewrite(["a cat"])
    assert fake_server.seen[-1][2]["temperature"] == 0.5


@pytest.mark.parametrize("count", [lambda text: 7 * len(text.split()), None], ids=["counted", "guessed"])
def test_too_long_is_told_the_count(fake_server, reasoner, count):
    fake_server.reply = lambda number, *_: fake_server.chat(WELL if number else LONG)
    (made,) = reasoner(count=count, most_tokens=300).rewrite(["a cat"])
    assert (made.status, made.text) == ("used", WELL)
    first, second = (body["messages"] for *_, body in fake_server.seen)
    assert second[:2] == first
    assert [message["role"] for message in second[2:]] == ["assistant", "user"]
    tokens = (count or api.about)(LONG)
    assert f"has {tokens} tokens" in second[3]["content"]
    assert "no more than 300" in second[3]["content"]


def test_a_guess_refuses_little_that_fits():
    """Texts of 67, 71 and 92 tokens of the real vocabulary."""
    english = (
        "A weathered wooden rowing boat rests on a pebble beach at low tide, its red paint flaking in long strips. "
        "Behind it, grey-green waves roll in beneath a heavy overcast sky, and two herring gulls stand on the gunwale "
        "facing left. Soft, diffuse light, shallow depth of field, muted colours."
    )
    russian = (
        "Старая деревянная лодка лежит на галечном пляже во время отлива, её красная краска отслаивается длинными "
        "полосами. За ней под тяжёлым пасмурным небом катятся серо-зелёные волны, а две чайки стоят на борту и смотрят "
        "влево."
    )
    chinese = (
        "一艘饱经风霜的木制划艇在退潮时停在卵石海滩上，红色油漆一条条剥落。在它身后，灰绿色的海浪在厚重的阴云下翻滚而来，"
        "两只银鸥站在船舷上面朝左侧。柔和的漫射光，浅景深，色调柔和。"
    )
    for text, tokens in ((english, 67), (russian, 71), (chinese, 92)):
        assert 0.4 * tokens < api.about(text) <= 1.05 * tokens


def test_cached_answers_are_not_asked_again(fake_server, reasoner, tmp_path):
    fake_server.reply = lambda number, *_: fake_server.chat(WELL if number else LONG)
    folder = str(tmp_path / "answers")
    first = reasoner({"cache": folder}).rewrite(["a cat"], seed=1)
    assert len(fake_server.seen) == 2
    assert reasoner({"cache": folder}).rewrite(["a cat"], seed=2) == first
    assert len(fake_server.seen) == 2
    reasoner({"cache": folder}, instructions="Otherwise.").rewrite(["a cat"])
    assert len(fake_server.seen) == 3


def test_a_hang_is_a_time_out(fake_server, reasoner):
    held = threading.Event()
    fake_server.reply = lambda *_: held.wait(30) and fake_server.chat(WELL)
    try:
        (made,) = reasoner({"timeout_seconds": 0.2}).rewrite(["a cat"])
        assert (made.status, made.reason, made.text) == ("raw", "timeout", "a cat")
        assert "no answer within 0.2 s" in made.detail
        with pytest.raises(LensError, match=r"no rewrite of 'a cat': no answer in time \(no answer within 0.2 s"):
            reasoner({"timeout_seconds": 0.2}, strict=True).rewrite(["a cat"])
    finally:
        held.set()
    assert len(fake_server.seen) <= 2 * 3


@pytest.mark.parametrize(
    ("reply", "reason", "detail"),
    [
        (error(429), "rate_limited", "HTTP 429: no (tried "),
        (error(500), "unreachable", "HTTP 500: no (tried 3 times)"),
        ((200, {}, b"{"), "bad_reply", "the reply is not JSON"),
    ],
    ids=["busy", "broken", "no JSON"],
)
def test_strict_names_the_prompt_and_the_reason(fake_server, reasoner, reply, reason, detail):
    def answer(number, path, body, headers):
        if "dog" not in prompt_of(body):
            return reply
        # The server is not given up for one prompt while it answers others.
        time.sleep(0.6 if reason == "rate_limited" else 0)
        return fake_server.chat(WELL)

    fake_server.reply = answer
    strict = reasoner({"give_up_seconds": 1.2}, strict=True)
    with pytest.raises(LensError) as stop:
        strict.rewrite(["a dog", "a cat " + "that sleeps " * 20])
    begin = f"{fake_server.url}: no rewrite of 'a cat that sleeps that sleeps that sl...': {api.REASONS[reason]} ("
    assert str(stop.value).startswith(begin + detail)
    # What the model wrote badly is no fault of the server.
    fake_server.reply = lambda *_: fake_server.chat("")
    assert strict.rewrite(["a mouse"])[0].reason == "empty"


def test_a_server_that_is_gone_and_comes_back(fake_server, reasoner):
    """What had been answered is used, what had not is drawn as it was written, and the next call asks again."""
    fake_server.reply = lambda *_: error(503)
    one = reasoner({"give_up_seconds": 0.5})
    found = one.rewrite(["a cat", "", "a dog"])
    assert [(made.text, made.status, made.reason) for made in found] == [
        ("a cat", "raw", "unreachable"),
        ("", "kept", ""),
        ("a dog", "raw", "unreachable"),
    ]
    assert "HTTP 503: no" in found[0].detail
    both = threading.Barrier(2)

    def reply(number, path, body, headers):
        both.wait(30)
        if "cat" in prompt_of(body):
            return error(429, Retry_After="3600")
        time.sleep(0.3)  # still in flight when the server is given up
        return fake_server.chat(WELL)

    fake_server.reply = reply
    found = one.rewrite(["a cat", "a dog"])
    assert [(made.text, made.reason) for made in found] == [("a cat", "unreachable"), (WELL, "")]
    fake_server.reply = lambda *_: fake_server.chat(WELL)
    assert [made.status for made in one.rewrite(["a cat", "a dog"])] == ["used"] * 2


def test_a_budget_outlives_a_server_that_is_gone(fake_server, reasoner):
    one = reasoner({"give_up_seconds": 0.2, "max_tokens": 250})
    replies = {"one": fake_server.chat(WELL), "two": error(503), "three": fake_server.chat(WELL)}
    fake_server.reply = lambda number, path, body, headers: replies[prompt_of(body)]
    assert [one.rewrite([prompt])[0].status for prompt in replies] == ["used", "raw", "used"]
    with pytest.raises(LensError, match="max_tokens is 250, and 202 are spent"):
        one.rewrite(["one"])


def test_several_threads_share_what_is_given_up(fake_server, reasoner):
    fake_server.reply = lambda *_: error(503)
    one = reasoner({"give_up_seconds": 0.5})
    found = {}
    ask = lambda i: found.update({i: one.rewrite([f"cat {i} of many"])[0].reason})
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), "unreachable")


def test_nobody_listens(reasoner):
    gone = {"url": "http://127.0.0.1:9/v1", "give_up_seconds": 0.3}
    (made,) = reasoner(gone).rewrite(["a cat"])
    assert (made.text, made.status, made.reason) == ("a cat", "raw", "unreachable")
    assert "127.0.0.1" not in made.detail
    strict = reasoner(gone, strict=True)
    for ask in (lambda: strict.rewrite(["a cat"]), strict.check):
        with pytest.raises(LensError, match=r"^http://127.0.0.1:9/v1: .*cannot be reached"):
            ask()
    assert reasoner(gone).rewrite(["", "  "])[1].status == "kept"


def test_the_key_is_seen_nowhere(fake_server, reasoner, monkeypatch, caplog):
    """A server that repeats it, in what stops all and in what fails one prompt."""
    caplog.set_level("INFO")
    monkeypatch.setenv("MINE", KEY)
    fake_server.reply = lambda number, path, body, headers: error(401, message=f"wrong: {headers['Authorization']}")
    one = reasoner({"key_env": "MINE"})
    with pytest.raises(LensError, match=r"HTTP 401: wrong: Bearer \[key\]") as stop:
        one.rewrite(["a cat"])
    assert len(fake_server.seen) == 1
    fake_server.reply = lambda number, path, body, headers: error(400, message=f"odd: {headers['Authorization']}")
    (made,) = reasoner({"key_env": "MINE"}).rewrite(["a cat"])
    assert made.detail == "HTTP 400: odd: Bearer [key]"
    assert KEY not in f"{stop.value} {dataclasses.asdict(made)} {caplog.text} {vars(one)}"


def test_default_endpoint(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    expected = Endpoint(
        "https://api.openai.com/v1", "gpt-5.5", concurrency=8, timeout_seconds=60.0, tries=3, give_up_seconds=60.0
    )
    assert api.default_endpoint() == expected
    assert api.default_endpoint(tries=1) == dataclasses.replace(expected, tries=1)
    with pytest.raises(LensError, match="OPENAI_API_KEY is not set"):
        ApiReasoner(expected)


def test_nothing_else_is_sent(fake_server, reasoner, monkeypatch):
    """Neither what variables of the environment mean for OpenAI, nor anything to a place that a server points to."""
    for name, value in {
        "OPENAI_ORG_ID": "org-secret", "OPENAI_PROJECT_ID": "proj-secret", "OPENAI_CUSTOM_HEADERS": "X-Custom: hush",
        "OPENAI_API_KEY": KEY,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    sent = []
    fake_server.reply = lambda number, path, body, headers: sent.append(dict(headers)) or fake_server.chat(WELL)
    assert reasoner().rewrite(["a cat"])[0].status == "used"
    known = {"host", "accept", "accept-encoding", "connection", "content-type", "content-length", "authorization"}
    assert {name.lower() for name in sent[0]} <= known | {"user-agent"}
    assert not any(word in str(sent) for word in ("secret", "hush", KEY))

    there = {"Location": f"{fake_server.url}/elsewhere"}
    fake_server.reply = lambda number, path, body, headers: (307, there, b"")
    before = len(fake_server.seen)
    with pytest.raises(LensError, match="HTTP 307"):
        reasoner().rewrite(["a cat"])
    assert [path for _, path, _ in fake_server.seen[before:]] == ["/v1/chat/completions"]


def test_one_refused_by_the_server_stops_no_other(fake_server, reasoner):
    """A 403 about a prompt, even the first; and a server that was wrong is asked again at the next call."""

    def reply(number, path, body, headers):
        return error(403, "content_policy_violation") if prompt_of(body) == "a bomb" else fake_server.chat(WELL)

    fake_server.reply = reply
    one = reasoner({"concurrency": 1})
    assert [made.reason for made in one.rewrite(["a bomb", "a cat"])] == ["refused", ""]
    fake_server.reply = lambda *_: error(404)
    with pytest.raises(LensError, match="404"):
        one.rewrite(["a cat on a mat"])
    fake_server.reply = reply
    assert one.rewrite(["a cat on a mat"])[0].status == "used"
    before = len(fake_server.seen)
    with pytest.raises(LensError, match="prompt 1 holds bytes that are not text"):
        one.rewrite(["a cat", "a\0cat"])
    assert len(fake_server.seen) == before


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://localhost:abc/v1", "http://a:99999/v1", "http://é/v1", "http://a b/v1", "a\t"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(LensError, match=r"expected http://HOST:PORT/v1"):
        ApiReasoner(Endpoint(url, "m"))


def test_the_key_of_openai_is_not_sent_in_the_clear(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(LensError, match="by https"):
        ApiReasoner(Endpoint("http://api.openai.com/v1", "m"))
