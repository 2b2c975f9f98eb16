"""Several rewards as one, a user's function, and a reward behind HTTP."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from lens_jax import config as config_files
from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.combine import Judging, RewardsConfig, Weighted, combine
from lens_jax.posttraining.rewards.function import Function, FunctionReward
from lens_jax.posttraining.rewards.reward import Score
from lens_jax.posttraining.rewards.rubric import RubricJudge
from lens_jax.posttraining.rewards.service import Service

PROMPT = Prompt("p", "two cats", texts=("MEOW",))
IMAGES = [np.full((4, 6, 3), value, np.uint8) for value in (0, 100, 200)]


def test_weighted_mean_by_hand():
    """(2 x 0.5 + 1 x 0.2) / 3. What has nothing to say is left out, what failed leaves none, what is only measured has
    no part in it."""
    weights = {"a": 2.0, "b": 1.0}
    a, b, watched = Score({"a": 0.5, "a/x": 0.1}), Score({"b": 0.2}), Score({"c": 9.0})
    assert combine({"a": a, "b": b, "c": watched}, weights) == Score(
        {"a": 0.5, "a/x": 0.1, "b": 0.2, "c": 9.0, "reward": (2 * 0.5 + 0.2) / 3}
    )
    assert combine({"a": Score(), "b": b}, weights).values["reward"] == 0.2
    failed = combine({"a": Score({"a/x": 0.1}, "down"), "b": b}, weights)
    assert (dict(failed.values), failed.error) == ({"a/x": 0.1, "b": 0.2}, "a: down")
    assert combine({"a": Score(), "b": Score()}, weights).error == "no reward has anything to say to this prompt"
    assert combine({"a": a, "b": b, "c": Score(error="gone")}, weights).values["reward"] == (2 * 0.5 + 0.2) / 3
    with pytest.raises(ValueError, match="must be finite"):
        Score({"a": math.nan})


def brightness(images, prompts):
    return [float(image.mean()) / 255 for image in images]


def test_functions_of_a_user(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def odd(images, prompts):\n"
        "    return [None if i == 0 else {'odd': i, 'half': i / 2} if i == 1 else float('nan') for i in range(3)]\n"
        "def few(images, prompts):\n    return [1.0]\n"
        "def broken(images, prompts):\n    return 1 / 0\n"
        "def words(images, prompts):\n    return ['a'] * 3\n"
    )
    monkeypatch.chdir(tmp_path)
    none, both, nan = Function("my_rewards:odd", "odd").load().score(IMAGES, [PROMPT] * 3)
    assert (none.values, none.error) == ({}, "my_rewards:odd gave None")
    assert dict(both.values) == {"odd": 1.0, "odd/half": 0.5}
    assert nan.error == "my_rewards:odd gave no finite 'odd'"
    for name, message in {
        "few": "gave 1 values for 3 images",
        "broken": "ZeroDivisionError: division by zero",
        "words": "gave 'a'; expected a number",
    }.items():
        with pytest.raises(LensError, match=message):
            Function(f"my_rewards:{name}").load().score(IMAGES, [PROMPT] * 3)
    for name, message in {"my_rewards": "expected package.module:function", "my_rewards:odds": "AttributeError",
                          "nothing_here:x": "ModuleNotFoundError", "math:pi": "is no function"}.items():  # fmt: skip
        with pytest.raises(LensError, match=message):
            Function(name).load()


def test_held_out_rewards_are_measured_and_not_learnt_from():
    shown = FunctionReward("shown", "test", brightness)
    hidden = FunctionReward("hidden", "test", lambda images, prompts: [1 - x for x in brightness(images, prompts)])
    judging = Judging([(shown, 2.0)], [hidden], max_failed=0.0, at_once=2)
    training = judging.submit(IMAGES, [PROMPT] * 3)
    testing = judging.submit(IMAGES, [PROMPT] * 3, held_out=True)
    bright = brightness(IMAGES, None)
    assert [dict(score.values) for score in training.result()] == [{"shown": x, "reward": x} for x in bright]
    assert [score.values["hidden"] for score in testing.result()] == [1 - x for x in bright]
    assert [score.values["reward"] for score in testing.result()] == bright
    judging.close()


def test_config_goes_through_json():
    config = RewardsConfig(
        (Weighted(RubricJudge(min_valid=3), 2.0), Weighted(Function("a:b"))), (Service(url="http://x"),)
    )
    values = json.loads(json.dumps(config_files.to_dict(config)))
    assert config_files.from_dict(RewardsConfig, values, "here") == config
    for wrong, message in {
        "two have the name 'function'": (Weighted(Function()), Weighted(Function())),
        "name 'reward' cannot be used": (Weighted(Function(name="reward")),),
        "name 'a/b' cannot be used": (Weighted(Function(name="a/b")),),
    }.items():
        with pytest.raises(LensError, match=wrong):
            RewardsConfig(message)
    with pytest.raises(LensError, match="weight of 'function' is 0"):
        Weighted(Function(), 0.0)
    with pytest.raises(LensError, match=r"rewards.train needs at least one"):
        Judging.load(RewardsConfig())


@pytest.fixture
def service(fake_server):
    return lambda **changes: Service(**{"url": fake_server.url.removesuffix("/v1"), "reward": "taste", "name": "http",
                                        "wait_seconds": (0.01, 0.02), "batch": 2, **changes})  # fmt: skip


def test_service(fake_server, service, tmp_path):
    """A bad start heals; scores and errors go to their own image; a second run asks only for what failed."""
    flaky = [(500, {}, b"oh"), (429, {"Retry-After": "0.05"}, b""), (200, {}, b'{"results": [')]

    def reply(number, path, body, headers):
        if number < len(flaky):
            return flaky[number]
        results, errors = [], []
        for sample in body:
            text, image = sample["history"]
            value = int(np.asarray(Image.open(io.BytesIO(base64.b64decode(image["image_b64"])))).mean())
            assert (text, sample["metadata"]["texts"], path) == ({"text": "two cats"}, ["MEOW"], "/score")
            results.append({} if value == 100 else {"taste": {"salt": value / 200, "sweet": 0.5}})
            errors.append({"taste": "not\nhungry"} if value == 100 else {})
        return 200, {}, json.dumps({"results": results, "errors": errors}).encode()

    fake_server.reply = reply
    reward = service(part="salt", cache=str(tmp_path / "cache")).load()
    reward.check()
    scores = reward.score(IMAGES, [PROMPT] * 3)
    assert dict(scores[0].values) == {"http": 0.0, "http/salt": 0.0, "http/sweet": 0.5}
    assert scores[1] == Score(error="taste: not hungry")
    assert scores[2].values["http"] == 1.0
    assert [len(body) for _, _, body in fake_server.seen] == [2, 2, 2, 2, 1]
    assert service(part="salt", cache=str(tmp_path / "cache")).load().score(IMAGES, [PROMPT] * 3) == scores
    assert [len(body) for _, _, body in fake_server.seen[5:]] == [1]
    with pytest.raises(LensError, match="taste gives salt, sweet; name one in `part`"):
        service().load().score(IMAGES[:1], [PROMPT])


def test_service_that_fails(fake_server, service):
    fake_server.reply = lambda *_: (500, {}, b"oh")
    (score,) = service(tries=2).load().score(IMAGES[:1], [PROMPT])
    assert score.error == "taste: HTTP 500: /score: oh (tried 2 times)"
    for reply, message in {
        (200, b"[]"): "no results for 1 images",
        (200, b'{"results": [1, 2]}'): "2 results for 1 images",
        (404, b"no"): "HTTP 404: /score: no",
    }.items():
        fake_server.reply = lambda *_, reply=reply: (reply[0], {}, reply[1])
        with pytest.raises(LensError, match=message):
            service().load().score(IMAGES[:1], [PROMPT])
    for parts in (b"null", b"0.5", b"{}", b'{"a": "b"}', b'{"a": NaN}', b'{"a": true}'):
        fake_server.reply = lambda *_, parts=parts: (200, {}, b'{"results": [{"taste": %s}]}' % parts)
        (score,) = service().load().score(IMAGES[:1], [PROMPT])
        assert not score.values
        assert score.error.startswith("taste: ")
    with pytest.raises(LensError, match=r"no reward 'tasty' \(did you mean 'taste'\?\); it has taste"):
        service(reward="tasty").load().check()
    with pytest.raises(LensError, match="cannot be reached"):
        service(url="http://127.0.0.1:9").load().check()
    for changes, message in {"url": "expected http://HOST:PORT", "reward": "name the reward"}.items():
        with pytest.raises(LensError, match=message):
            service(**{changes: ""}).load()
