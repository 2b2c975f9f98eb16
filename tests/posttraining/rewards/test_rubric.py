"""The rubric judge against a real server: which answers count, what is missing, and what ends a run."""

import base64
import io
import json
import math
import threading
import time

import numpy as np
import pytest
from PIL import Image

from lens_jax.errors import LensError
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.request import Answer, Unusable
from lens_jax.posttraining.prompts.prompt import Prompt, Rubric
from lens_jax.posttraining.rewards.combine import Judging, RewardsConfig, Weighted
from lens_jax.posttraining.rewards.rubric import RubricJudge, read_digit, read_digits, read_probability

pytest.importorskip("openai", reason="pip install 'lens-jax[llm]'")

FAMILIES = ("Object Count Consistency", "Attribute Accuracy (left)", "Attribute Accuracy (right)", "OCR Alignment")
PROMPT = Prompt("p", "two cats", rubrics=tuple(Rubric(name, f"check {i}") for i, name in enumerate(FAMILIES)))


def judge(server, **changes) -> RubricJudge:
    fast = {"wait_seconds": (0.01, 0.02), "timeout_seconds": 20.0, "tries": 3, **changes.pop("endpoint", {})}
    return RubricJudge(Endpoint(url=server.url, model="m", **fast), **changes)


def grey(value: int) -> np.ndarray:
    return np.full((32, 48, 3), value, np.uint8)


def asked(body: dict) -> tuple[str, int]:
    """The criterion's text and the grey of the image in a call."""
    *texts, image = body["messages"][1]["content"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    return texts[1]["text"], int(np.asarray(Image.open(io.BytesIO(data))).mean().round())


def test_mean_of_families_and_missing_is_not_zero(fake_server):
    """Of four images one gets all, one half, one an answer too few, and one only refusals."""

    def reply(number, path, body, headers):
        criterion, value = asked(body)
        rubric = int(criterion[-1])
        if (value == 200 and rubric == 3) or (value == 150 and rubric > 1) or value == 100:
            return fake_server.chat("I cannot judge this.")
        return fake_server.chat("1" if value == 250 or rubric % 2 == 0 else "0")

    fake_server.reply = reply
    reward = judge(fake_server, min_valid=3, asks=1, quality=0).load()
    reward.check()
    full, half, few, none = reward.score([grey(v) for v in (250, 200, 150, 100)], [PROMPT] * 4)
    reward.close()
    assert dict(full.values) == {
        "rubric": 1.0, "rubric/Object Count Consistency": 1.0, "rubric/Attribute Accuracy": 1.0,
        "rubric/OCR Alignment": 1.0,
    }  # fmt: skip
    assert dict(half.values) == {
        "rubric": 2 / 3, "rubric/Object Count Consistency": 1.0, "rubric/Attribute Accuracy": 0.5,
    }  # fmt: skip
    assert "rubric" not in few.values
    assert few.error.startswith("2 of 4 rubrics without an answer: neither 1 nor 0; the answer was 'I cannot judge")
    assert not none.values
    assert none.error.startswith("4 of 4")
    assert full.error is half.error is None
    assert len(fake_server.seen) == 16


def test_an_epoch_with_a_bad_day(fake_server, tmp_path):
    """429, 500, half a reply, a late one and a refusal, on the way to the rewards that a good day would have given."""
    lock, tried = threading.Lock(), {}

    def reply(number, path, body, headers):
        key = asked(body)
        with lock:
            tries = tried[key] = tried.get(key, 0) + 1
        good = fake_server.chat(str((key[1] // 10 + int(key[0][-1])) % 2))
        if tries > 1:
            return good
        # Each question fails the first time, in one of five ways.
        match (key[1] // 10 * 4 + int(key[0][-1])) % 5:
            case 0:
                return 429, {"Retry-After": "0.1"}, b"{}"
            case 1:
                return 500, {}, b"oh"
            case 2:
                return 200, {}, good[2][:60]
            case 3:
                # Later than anyone waits for, which costs a test its time, so only the first of them.
                late, tried["late"] = "late" not in tried, 1
                time.sleep(7 if late else 0)
                return good if late else fake_server.chat("10")
            case _:
                return fake_server.chat("I cannot")

    fake_server.reply = reply
    images = [grey(10 * i) for i in range(12)]
    config = judge(
        fake_server,
        quality=0,
        endpoint={"timeout_seconds": 6.0, "tries": 8, "concurrency": 4, "cache": str(tmp_path / "cache")},
    )
    judging = Judging.load(RewardsConfig((Weighted(config),)))
    judging.check()
    judging.start_epoch(12)
    groups = [judging.submit(images[i : i + 4], [PROMPT] * 4) for i in (0, 4, 8)]
    scores = [score for group in groups for score in group.result()]
    judging.close()
    assert [score.values["reward"] for score in scores] == [0.5] * 12
    assert [score.values["rubric/Object Count Consistency"] for score in scores] == [float(i % 2) for i in range(12)]
    assert all(score.error is None for score in scores)
    # Killed and started again: the same rewards, and nothing is asked.
    before = len(fake_server.seen)
    again = Judging.load(RewardsConfig((Weighted(config),)))
    repeated = again.submit(images, [PROMPT] * 12).result()
    counts = again.counts()
    again.close()
    assert repeated == scores
    assert len(fake_server.seen) == before
    assert (counts["rubric/answered"], counts["rubric/failed"]) == (0, 0)


def test_failing_for_good_stops_with_one_line(fake_server):
    def reply(number, path, body, headers):
        return fake_server.chat("I cannot") if asked(body)[1] < 40 else fake_server.chat("1")

    fake_server.reply = reply
    judging = Judging.load(RewardsConfig((Weighted(judge(fake_server, asks=2, quality=0)),), max_failed=0.1))
    judging.start_epoch(30)
    # 3 of 30 may fail, the fourth may not.
    first = judging.submit([grey(10 * i) for i in range(1, 21)], [PROMPT] * 20).result()
    assert sum("reward" not in score.values for score in first) == judging.failed == 3
    with pytest.raises(LensError) as stop:
        judging.submit([grey(5)], [PROMPT]).result()
    judging.close()
    assert str(stop.value).startswith("rewards: 4 of the 30 images of this epoch have none, more than")
    assert "I cannot" in str(stop.value)
    assert "\n" not in str(stop.value)


def test_all_rubrics_in_one_call(fake_server):
    """Half a JSON is asked again; a value that is neither 1 nor 0 is missing."""
    answers = iter(['{"1": 1, "2"', '```json\n{"1": 1, "2": 0, "3": "maybe", "4": 1}\n```'])
    fake_server.reply = lambda *_: fake_server.chat(next(answers))
    reward = judge(fake_server, call="all", min_valid=3, family_weights=(("OCR Alignment", 2.0),)).load()
    (score,) = reward.score([grey(9)], [PROMPT])
    reward.close()
    assert score.values["rubric"] == (1 * 1 + 1 * 0 + 2 * 1) / 4
    assert score.values["rubric/Attribute Accuracy"] == 0.0
    assert len(fake_server.seen) == 2
    assert [line for line in asked(fake_server.seen[0][2])[0].splitlines() if line[0].isdigit()] == [
        f"{i + 1}. {name}: check {i}" for i, name in enumerate(FAMILIES)
    ]
    assert fake_server.seen[0][2]["max_completion_tokens"] == 16 + 16 * 4


def test_prompts_without_rubrics_are_left_to_others(fake_server):
    reward = judge(fake_server).load()
    (score,) = reward.score([grey(9)], [Prompt("a", "b")])
    reward.close()
    assert (dict(score.values), score.error, fake_server.seen) == ({}, None, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1.0), (" 0\n", 0.0), ('"1"', 1.0), ("**1**", 1.0), ("0.", 0.0), ("<think>0? no.</think>\n1", 1.0)],
)
def test_what_is_a_digit(text, value):
    assert read_digit(Answer(text)) == {0: value}


@pytest.mark.parametrize("text", ["", "yes", "10", "1 0", "The answer is 1", "I cannot", "2", "01", "1.0", "<think>1"])
def test_what_is_none(text):
    with pytest.raises(Unusable):
        read_digit(Answer(text))


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"a": 1}', '{"1": 2}', '{"1": 0.5}', '{"1": null}', "[" * 10_000])
def test_what_is_no_object_of_digits(text):
    with pytest.raises(Unusable):
        read_digits(Answer(text))


def test_probability_is_the_sigmoid():
    """0.6 against 0.2, of which a part stands for " 1" with a blank; the rest of the tokens do not count."""
    top = (("1", math.log(0.5)), ("0", math.log(0.2)), (" 1", math.log(0.1)), ("I", math.log(0.1)))
    (value,) = read_probability(Answer("1", top_logprobs=(top, (("x", 0.0),)))).values()
    difference = math.log(0.6) - math.log(0.2)
    assert math.isclose(value, 1 / (1 + math.exp(-difference)), rel_tol=1e-12)
    assert read_probability(Answer("1", top_logprobs=((("1", 0.0),),))) == {0: 1.0}
    for top in ((("I", math.log(0.6)), ("1", math.log(0.4))), ()):
        with pytest.raises(Unusable):
            read_probability(Answer("1", top_logprobs=(top,) if top else ()))


def test_logprobs_are_asked_for(fake_server):
    content = [{"token": "1", "logprob": -0.1, "top_logprobs": [
        {"token": "1", "logprob": math.log(0.75)}, {"token": "0", "logprob": math.log(0.25)}]}]  # fmt: skip
    fake_server.reply = lambda *_: fake_server.chat("1", logprobs={"content": content})
    reward = judge(fake_server, answer="logprobs").load()
    (score,) = reward.score([grey(9)], [PROMPT])
    reward.close()
    assert math.isclose(score.values["rubric"], 0.75, rel_tol=1e-12)
    body = fake_server.seen[0][2]
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    assert json.dumps(body).count("data:image/jpeg") == 1
    with pytest.raises(LensError, match='answer="logprobs" needs call="each"'):
        judge(fake_server, answer="logprobs", call="all")
