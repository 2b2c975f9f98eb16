"""The rubric judge: a vision model says of each rubric of a prompt whether the image meets it (report section 4).

The report asks GPT-4.1-mini once an image and rubric, with the prompt and the criterion, and takes 1 or 0 for an
answer. How the answers of the eleven rubrics become one reward it does not say; here it is their mean (the natural
reading), over those that were answered.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from lens_jax.errors import LensError
from lens_jax.llm.client import Client
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.request import Answer, Image, Message, Request, Result, Unusable, encode_image
from lens_jax.posttraining.prompts.prompt import Prompt, Rubric
from lens_jax.posttraining.rewards.reward import Score

_RULES = """\
You are a strict inspector of generated images. You get the text an image was made from, one criterion, and the image.
Decide by what can be seen in the image alone. Answer with a single character and nothing else: 1 if the image clearly \
and fully meets the criterion, 0 if it does not, or only in part, or if it cannot be told."""
_RULES_ALL = """\
You are a strict inspector of generated images. You get the text an image was made from, a numbered list of criteria, \
and the image. Decide on each criterion by itself, by what can be seen in the image alone: 1 if the image clearly and \
fully meets it, 0 if it does not, or only in part, or if it cannot be told. Answer with one JSON object and nothing \
else: each number of the list as a key, and 1 or 0 as its value, such as {"1": 1, "2": 0}."""
_REPAIR = "Answer with a single character and nothing else: 1 or 0."
_REPAIR_ALL = "Answer with one JSON object and nothing else: the numbers of the criteria as keys, 1 or 0 as values."

# What a model that reasons aloud puts before its answer.
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_DIGIT = re.compile(r"[\"'`*]*([01])[\"'`*.]*")
_FENCE = re.compile(r"\A```\w*\n(.*)\n```\Z", re.DOTALL)
# A judge whose first token is neither 1 nor 0 as often as this was about to say something else.
_SURE = 0.5


@dataclasses.dataclass(frozen=True)
class RubricJudge:
    """A vision model that checks an image against the rubrics of its prompt."""

    # The judge. One that also reports the results must be another than the one that is learnt from.
    endpoint: Endpoint = Endpoint()
    # Of the reward, in logs.
    name: str = "rubric"
    # One call for every image and rubric, as in the report, or one for every image, which costs an eleventh.
    call: Literal["each", "all"] = "each"
    # "strict" takes 1 or 0. "logprobs" takes the probability of 1 against 0 as the first token, which tells images
    # apart whose rubrics are answered alike; the server must give logprobs.
    answer: Literal["strict", "logprobs"] = "strict"
    # An image has a reward if so many of its rubrics were answered (all, where a prompt has fewer).
    min_valid: int = 6
    # Weight of the rubrics of a family, where it is not 1: (("OCR Alignment", 2.0),).
    family_weights: tuple[tuple[str, float], ...] = ()
    # Longest answer in tokens, and in a call with all rubrics 16 more for each. Models that reason need 1000 and more.
    max_tokens: int = 16
    # None leaves it to the server: some models refuse any.
    temperature: float | None = 0.0
    # Times that an answer is asked for until one can be read.
    asks: int = 3
    # The image is sent with a short side of at most so many pixels; 0 sends it as it is.
    short_side: int = 768
    # As a JPEG of this quality; 0 sends a PNG.
    quality: int = 90

    def __post_init__(self):
        if self.call == "all" and self.answer == "logprobs":
            raise LensError('rubric judge: answer="logprobs" needs call="each": one answer, one token')
        if self.min_valid < 1 or self.asks < 1 or self.max_tokens < 1:
            raise LensError("rubric judge: min_valid, asks and max_tokens must be at least 1")
        if any(weight < 0 for _, weight in self.family_weights):
            raise LensError("rubric judge: family_weights must not be below 0")

    def load(self) -> "RubricReward":
        return RubricReward(self)


class RubricReward:
    """`<name>` is the mean of the valid answers, `<name>/<family>` that of a family's."""

    def __init__(self, config: RubricJudge):
        self.config = config
        self.name = config.name
        self._client = Client(config.endpoint, "the rubric judge")

    def check(self) -> None:
        self._client.check()

    def counts(self) -> Mapping[str, float]:
        """Calls, tokens, money and latency so far, for the log."""
        return dataclasses.asdict(self._client.counts)

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        each = self.config.call == "each"
        answers: list[dict[str, float]] = [{} for _ in images]
        errors: list[list[str]] = [[] for _ in images]
        # What each request is about, in their order: an image, and one rubric or all of them.
        asked: list[tuple[int, tuple[Rubric, ...]]] = []
        for i, prompt in enumerate(prompts):
            together = [(rubric,) for rubric in prompt.rubrics] if each else [prompt.rubrics]
            asked += [(i, rubrics) for rubrics in together if rubrics]
        requests = self._requests(asked, images, prompts)
        read = read_probability if self.config.answer == "logprobs" else read_digit if each else read_digits
        for index, result in self._client.ask_each(requests, lambda _, answer: read(answer), self.config.asks):
            i, rubrics = asked[index]
            _enter(result, rubrics, answers[i], errors[i])
        return [self._score(prompt, *found) for prompt, *found in zip(prompts, answers, errors)]

    def close(self) -> None:
        self._client.close()

    def _requests(self, asked, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Iterator[Request]:
        """Made as they are sent: an image is encoded when its turn comes, and forgotten after it."""
        last, image = -1, None
        for i, rubrics in asked:
            if i != last:
                last, image = i, encode_image(images[i], self.config.short_side, self.config.quality)
            yield self.request(image, prompts[i], rubrics)

    def request(self, image: Image, prompt: Prompt, rubrics: Sequence[Rubric]) -> Request:
        """The question about one rubric, or several where one call asks them all."""
        config = self.config
        if config.call == "each":
            rules, criteria, longest = _RULES, f"Criterion: {rubrics[0].name}: {rubrics[0].check}", config.max_tokens
        else:
            lines = [f"{i + 1}. {rubric.name}: {rubric.check}" for i, rubric in enumerate(rubrics)]
            rules, criteria = _RULES_ALL, "Criteria:\n" + "\n".join(lines)
            longest = config.max_tokens + 16 * len(rubrics)
        said = Message("user", (f"Text the image was made from: {prompt.prompt}", criteria, image))
        logprobs = 5 if config.answer == "logprobs" else 0
        return Request((Message("system", (rules,)), said), longest, config.temperature, logprobs)

    def _score(self, prompt: Prompt, answers: dict[str, float], errors: list[str]) -> Score:
        if not prompt.rubrics:
            return Score()  # the prompt asks nothing that this could answer
        weights = dict(self.config.family_weights)
        pairs = [(r.family, weights.get(r.family, 1.0), answers[r.name]) for r in prompt.rubrics if r.name in answers]
        needed = min(self.config.min_valid, len(prompt.rubrics))
        values = {}
        for family in dict.fromkeys(family for family, *_ in pairs):
            found = [value for other, _, value in pairs if other == family]
            values[f"{self.name}/{family}"] = sum(found) / len(found)
        total = sum(weight for _, weight, _ in pairs)
        if len(pairs) >= needed and total > 0:
            values[self.name] = sum(weight * value for _, weight, value in pairs) / total
            return Score(values)
        missing = len(prompt.rubrics) - len(pairs)
        first = errors[0] if errors else "their weights are all 0"
        return Score(values, f"{missing} of {len(prompt.rubrics)} rubrics without an answer: {first}")


def _enter(result: Result, rubrics: Sequence[Rubric], answers: dict[str, float], errors: list[str]) -> None:
    """A result among the answers by rubric name; what is missing stays missing."""
    if result.error is not None:
        errors.append(result.error)
        return
    for i, rubric in enumerate(rubrics):
        if i in result.value:
            answers[rubric.name] = result.value[i]
        else:
            errors.append(f"no answer to criterion {i + 1}")


def read_digit(answer: Answer) -> dict[int, float]:
    """{0: 1.0} or {0: 0.0} of an answer that is 1 or 0, in quotes perhaps; anything else is no answer."""
    match = _DIGIT.fullmatch(_said(answer))
    if match is None:
        raise Unusable(_why(answer, "neither 1 nor 0"), _REPAIR)
    return {0: float(match[1])}


def read_probability(answer: Answer) -> dict[int, float]:
    """{0: p(1) / (p(1) + p(0))} of the first token, which is the sigmoid of the difference of the log-probabilities."""
    if not answer.top_logprobs:
        raise Unusable("the server gave no logprobs", _REPAIR)
    chance = {"0": 0.0, "1": 0.0}
    for token, logprob in answer.top_logprobs[0]:
        if (word := token.strip()) in chance:
            chance[word] += math.exp(min(logprob, 0.0))
    total = chance["0"] + chance["1"]
    if total < _SURE:
        raise Unusable(_why(answer, "the first token is hardly 1 or 0"), _REPAIR)
    return {0: chance["1"] / total}


def read_digits(answer: Answer) -> dict[int, float]:
    """{rubric: 1.0 or 0.0} of a JSON object {"1": 1, "2": 0}. A value that is neither is missing, not zero."""
    text = _said(answer)
    if fence := _FENCE.match(text):
        text = fence[1]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise Unusable(_why(answer, "not JSON"), _REPAIR_ALL) from None
    if not isinstance(values, dict):
        raise Unusable("not a JSON object", _REPAIR_ALL)
    found = {}
    for key, value in values.items():
        if key.strip().isdecimal() and key.isascii() and str(value) in ("0", "1"):
            found[int(key) - 1] = float(value)
    if not found:
        raise Unusable("a JSON object without a 1 or 0", _REPAIR_ALL)
    return found


def _said(answer: Answer) -> str:
    return _THOUGHT.sub("", answer.text).strip()


def _why(answer: Answer, otherwise: str) -> str:
    if answer.finish_reason == "length":
        return "cut off by max_tokens"
    return "refused" if answer.refusal or answer.finish_reason == "content_filter" else otherwise
