"""The captions of one unit: which images are asked about, and the table of what came of it."""

import json
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from lens_jax import __version__
from lens_jax.data.engine.captions import contract
from lens_jax.data.engine.captions.alike import ALIKE
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.job import OK, Job
from lens_jax.data.engine.captions.journal import UnitAnswers
from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import Problem
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.tables import CAPTION


def kinds_of(caption: Caption, source: Source) -> tuple[str, ...]:
    """The kinds of captions that are asked for of a source's images."""
    return ("brief",) if source.caption == "brief" else caption.kinds


class UnitCaptions:
    """Takes finished jobs, gives the table. `given` has the tables probe and select."""

    def __init__(self, caption: Caption, given: UnitInput, answers: UnitAnswers):
        self.caption, self.given, self.answers = caption, given, answers
        self.name = given.unit.id
        self.counts: Counter[str] = Counter({OK: 0})
        self.rejected: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        # Jobs that were given out and are not back.
        self._open = 0
        self._all_out = False
        self._rows: dict[int, list[dict[str, object]]] = {}
        self.refused = self.routed = 0

    @property
    def finished(self) -> bool:
        return self._all_out and not self._open

    def jobs(self) -> Iterator[Job]:
        """Of every kept image, in order, with its file."""
        kinds = kinds_of(self.caption, self.given.source)
        probe = self.given.tables["probe"]
        kept = self.given.tables["select"]["kept"].to_pylist()
        if any(kept):
            ids, digests = probe["id"].to_pylist(), probe["sha256"].to_pylist()
            left = sum(kept)
            for row, (index, item) in enumerate(self.given.items()):
                if not kept[row]:
                    continue
                left -= 1
                job = Job(self.caption, self.name, index, ids[row], digests[row] or b"",
                          contract.tasks(self.caption, kinds, ids[row]))  # fmt: skip
                if isinstance(item, Problem):
                    job.fail(item.reason, item.detail)
                    self._open += 1
                    self.take(job)
                else:
                    job.data = item.data
                    self._open += 1
                    yield job
                if not left:
                    break
        self._all_out = True

    def take(self, job: Job) -> None:
        """A job that has come to its end."""
        self._open -= 1
        self._rows[job.index] = job.rows()
        self.counts[job.status] += 1
        self.rejected.update(job.rejected)
        self.repaired.update(job.repaired)
        self.refused += job.refused
        self.routed += job.refused and job.second and job.status == OK

    def table(self) -> pa.Table:
        """The table CAPTION, in the order of the images."""
        rows = [row for index in sorted(self._rows) for row in self._rows[index]]
        self._refuse_alike(rows, self.caption.most_alike)
        return pa.Table.from_pylist(rows, CAPTION)

    def metadata(self) -> dict[str, str]:
        """What is kept beside the table."""
        noted = {
            "counts": self.counts, "rejected": self.rejected, "repaired": self.repaired, "refused": self.refused,
            "routed": self.routed, "asked_again": self.answers.asked_again,
        }  # fmt: skip
        about = {"unit": self.name, "source": self.given.source.name, "stage": "caption", "version": __version__}
        return about | {name: json.dumps(value, sort_keys=True) for name, value in noted.items()}

    def _refuse_alike(self, rows: list[dict[str, object]], most: int) -> None:
        """Those that more images of this unit have: see alike.py."""
        often = Counter(row["text"] for row in rows if row["status"] == OK and row["kind"] == "dense")
        for row in rows:
            if row["status"] == OK and row["kind"] == "dense" and often[row["text"]] > most:
                row["status"] = ALIKE
                self.counts[OK] -= 1
                self.counts[ALIKE] += 1
