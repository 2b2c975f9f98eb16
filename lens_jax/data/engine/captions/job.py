"""The captioning of one image: what is asked next, and what has come of it so far. Knows nothing of how it is asked."""

from collections import Counter
from dataclasses import dataclass, field

from lens_jax.data.engine.captions import checks, contract
from lens_jax.data.engine.captions.checks import Rejected
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.journal import UnitAnswers
from lens_jax.llm.request import Answer, Image, Request, Result

# What a server calls an answer that it holds back, among the codes of its errors.
_FILTERED = ("content_filter", "content_policy_violation", "moderation_blocked", "data_inspection_failed")
# Statuses of an image.
OK, REFUSED, NOT_ANSWERED, UNDECODABLE = "ok", "refusal", "not answered", "cannot be decoded"
# Of a text that is no caption, as much is kept for whoever looks at what went wrong.
_KEPT = 2000


@dataclass
class Job:
    """An image that captions are asked for."""

    caption: Caption
    unit: str
    index: int
    id: bytes
    sha256: bytes
    tasks: tuple[contract.Task, ...]
    # The file, until it is prepared; then what is sent.
    data: bytes = b""
    image: Image | None = None
    # Whether the second model is asked, since the first refused.
    second: bool = False
    # Texts by kind, and where there is none why.
    texts: dict[str, str] = field(default_factory=dict)
    status: str = ""
    detail: str = ""
    # Of all answers, and of each task: (tokens in, tokens out, US dollars, answers, the last one's finish_reason).
    spent: list[list] = field(default_factory=list)
    # Answers that were turned down, by reason, and what was put right in others.
    rejected: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    refused: bool = False
    _task: int = 0
    # The last answer that was turned down, and why.
    _last: str = ""
    _reason: str = ""

    @property
    def endpoint(self):
        """Who is asked now."""
        return self.caption.second if self.second else self.caption.endpoint

    @property
    def finished(self) -> bool:
        return bool(self.status)

    def fresh(self) -> "Job":
        """The same job, not begun, without its image."""
        return Job(self.caption, self.unit, self.index, self.id, self.sha256, self.tasks)

    def request(self, image: Image | None = None) -> Request:
        """What is asked now; with this image in place of its own, where the answer is known."""
        dense = self.texts.get("dense", "")
        return contract.request(self.caption, self.tasks[self._task], image or self.image, dense, self.unit)

    def read(self, answer: Answer) -> dict[str, str] | None:
        """The captions in an answer; None for a refusal that the second model is asked about instead."""
        self._account(answer)
        try:
            return checks.read(answer, self.tasks[self._task].kinds, self.repaired)
        except Rejected as rejected:
            self.rejected[rejected.reason] += 1
            self._last, self._reason = _storable(answer.text), rejected.reason
            if rejected.reason == REFUSED and self._another_is_there():
                return None
            raise

    def take(self, result: Result) -> None:
        """Go on by what became of the request: to the next task, to the second model, or to the end."""
        if result.value is not None:
            self.texts.update(result.value)
            self._task += 1
            if self._task == len(self.tasks):
                self.status = OK
            return
        reason, self._reason = self._reason, ""
        if result.code in _FILTERED:
            self.rejected[REFUSED] += 1
        refused = result.code in _FILTERED or (result.answer is not None and reason == REFUSED)
        self.refused = self.refused or refused
        if refused and self._another_is_there():
            self.second = True
            return
        if refused:
            self.fail(REFUSED)
        elif result.answer is not None:
            self.fail(reason)
        else:
            self.fail(NOT_ANSWERED, result.error or "")

    def replay(self, answers: UnitAnswers, image: Image) -> Request | None:
        """Take all that is known already; the first question without an answer, or None where the job is finished."""
        while not self.finished:
            endpoint, request, result = self.endpoint, self.request(image), None
            for _ in range(self.caption.asks):
                answer = answers.get(request.key(endpoint.model, endpoint.extra()))
                if answer is None:
                    return request
                try:
                    result = Result(self.read(answer), answer)
                    break
                except Rejected:
                    request, result = request.reseeded(), Result(answer=answer)
            self.take(result)
        return None

    def fail(self, status: str, detail: str = "") -> None:
        """There will be no caption, or none of the kinds that are missing."""
        self.status, self.detail = status, detail

    def rows(self) -> list[dict[str, object]]:
        """Of the table CAPTION: one for each kind that was wanted."""
        rows = []
        for i, task in enumerate(self.tasks):
            tokens_in, tokens_out, usd, attempts, finish_reason = self.spent[i] if i < len(self.spent) else _NOTHING
            for kind in task.kinds:
                text = self.texts.get(kind)
                rows.append(
                    {
                        "id": self.id,
                        "language": "en",
                        "kind": kind,
                        "text": text if text is not None else (self._last or None) if i == self._task else None,
                        "status": OK if text is not None else self.status,
                        "model": self.endpoint.model,
                        "prompt_version": contract.PROMPT_VERSION,
                        "attempts": attempts,
                        "finish_reason": finish_reason or self.detail or None,
                        "tokens_in": tokens_in,
                        "tokens_out": tokens_out,
                        "usd": usd,
                    }
                )
                # Two captions of one call: its cost stands with the first.
                tokens_in = tokens_out = attempts = 0
                usd = 0.0
        return rows

    def _another_is_there(self) -> bool:
        return self.caption.second is not None and not self.second

    def _account(self, answer: Answer) -> None:
        while len(self.spent) <= self._task:
            self.spent.append(list(_NOTHING))
        spent = self.spent[self._task]
        spent[0] += answer.tokens_in
        spent[1] += answer.tokens_out
        spent[2] += self.endpoint.usd(answer.tokens_in, answer.tokens_out)
        spent[3] += 1
        spent[4] = _storable(answer.finish_reason)


def _storable(text: str) -> str:
    """The beginning of a text; half of a surrogate pair, which JSON can spell and no table can hold, as "?"."""
    return text[:_KEPT].encode("utf-8", "replace").decode()


_NOTHING = (0, 0, 0.0, 0, "")
