"""Every answer that was paid for, a file a unit: what is here is never asked again, whatever the run was killed by.

work/answers/<unit>.jsonl is appended to while a unit is asked about, and becomes <unit>.parquet when it is finished.
Answers are found by the hash of their question (model, prompt, parameters, image), so a change of thresholds, checks or
prices asks nothing again, and one of the prompt finds the old answers again when it is undone. No key is written.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa

from lens_jax.atomic import writing
from lens_jax.data.engine.layout import names
from lens_jax.data.engine.tables import read_table, write_table
from lens_jax.errors import LensError
from lens_jax.llm.request import Answer, Request, answer_from_json, answer_to_json

# Seconds after which an answer is on the disk and survives a power cut; a killed process loses none at all.
SYNC_SECONDS = 1.0
_TABLE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        ("model", pa.string()),
        ("tokens_in", pa.int64()),
        ("tokens_out", pa.int64()),
        ("answer", pa.string()),  # as JSON
    ]
)


def folder_of(work: str | os.PathLike) -> Path:
    """The folder of all answers of a run."""
    return Path(work) / "answers"


class Taken(LensError):
    """Another process asks about this unit."""


class UnitAnswers:
    """The answers about one unit, held by one process at a time."""

    def __init__(self, folder: Path, unit: str):
        """`Taken` where another process has it."""
        self.unit = unit
        self._journal, self._table = folder / f"{unit}.jsonl", folder / f"{unit}.parquet"
        self._file = _locked(self._journal, unit)
        self._lock = threading.Lock()
        self._dirty = self._grown = self._torn = False
        try:
            self._answers = {key: (model, answer) for key, model, answer in _read_table(self._table)}
        except LensError:
            os.close(self._file)
            raise
        # Questions that were begun by a process that was killed, perhaps paid for though no answer came; and how many
        # of these were asked again.
        self._begun: set[str] = set()
        self.asked_again = 0
        # Lines that are no answers: questions that were begun, and notes of files of questions.
        self.notes: list[dict] = []
        for line in _lines(self._journal):
            if "key" in line and (answer := answer_from_json(line.get("answer"))):
                self._answers[line["key"]] = (str(line.get("model", "")), answer)
                self._grown = True
                self._begun.discard(line["key"])
            elif "asked" in line:
                self.asked_again += line["asked"] in self._begun
                self._begun.add(line["asked"])
            elif "failed" in line:
                self._begun.discard(line["failed"])
            else:
                self.notes.append(line)

    def get(self, key: str) -> Answer | None:
        entry = self._answers.get(key)
        return entry[1] if entry else None

    def begin(self, key: str) -> None:
        self.asked_again += key in self._begun
        self._begun.discard(key)
        self.write({"asked": key})

    def put(self, key: str, model: str, answer: Answer) -> None:
        self._answers[key] = (model, answer)
        self._grown = True
        self.write({"key": key, "model": model, "answer": answer_to_json(answer)})

    def fail(self, key: str) -> None:
        self.write({"failed": key})

    def write(self, *lines: dict) -> None:
        """Append lines; one call of the system, so that none is ever mixed with another's."""
        data = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines).encode()
        with self._lock, writing(self._journal):
            if self._torn:
                data = b"\n" + data
            self._torn = True  # until all of it is written: a disk that is full may take the half of a line
            while data:
                data = data[os.write(self._file, data) :]
            self._torn, self._dirty = False, True

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        with self._lock:
            if not self._dirty or self._file is None:
                return
            self._dirty, file = False, os.dup(self._file)
        try:
            os.fsync(file)  # not under the lock: a disk may take a second
        finally:
            os.close(file)

    def finish(self) -> None:
        """All is answered: the journal becomes a table."""
        if self._grown:
            rows = [
                {"key": key, "model": model, "tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out,
                 "answer": json.dumps(answer_to_json(answer), separators=(",", ":"))}
                for key, (model, answer) in sorted(self._answers.items())
            ]  # fmt: skip
            write_table(self._table, pa.Table.from_pylist(rows, _TABLE))
            # On the disk before the journal is gone: they were paid for.
            for path in (self._table, self._table.parent):
                file = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        self._journal.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        self.sync()
        with self._lock:
            if self._file is not None:
                os.close(self._file)  # gives up the lock
                self._file = None


class Journal:
    """The answers of all units that are open, for the client: `Request.about` says of which unit."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._units: dict[str, UnitAnswers] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # Why the disk takes no more, found by the thread that syncs.
        self._error: LensError | None = None

    def open(self, unit: str) -> UnitAnswers:
        """`Taken` where another process has the unit."""
        answers = UnitAnswers(self.folder, unit)
        with self._lock:
            self._units[unit] = answers
            if self._thread is None:
                self._thread = threading.Thread(target=self._sync, daemon=True, name="journal")
                self._thread.start()
        return answers

    def finish(self, unit: str) -> None:
        with self._lock:
            answers = self._units.pop(unit)
        answers.finish()

    def close(self) -> None:
        """Sync and let go of all."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for answers in self._units.values():
            answers.close()
        self._units.clear()

    def of_model(self, model: str) -> "ModelAnswers":
        return ModelAnswers(self, model)

    def __getitem__(self, unit: str) -> UnitAnswers:
        if self._error:
            raise self._error
        return self._units[unit]

    def _sync(self) -> None:
        while not self._stop.wait(SYNC_SECONDS):
            with self._lock:
                units = list(self._units.values())
            try:
                for answers in units:
                    with contextlib.suppress(FileNotFoundError):
                        answers.sync()
            except OSError as error:
                self._error = LensError(f"{self.folder}: cannot be written: {error.strerror}")


class ModelAnswers:
    """The journal as a client of one model sees it (`llm.answers.Answers`)."""

    def __init__(self, journal: Journal, model: str):
        self._journal, self._model = journal, model

    def get(self, key: str, request: Request) -> Answer | None:
        return self._journal[request.about].get(key)

    def begin(self, key: str, request: Request) -> None:
        self._journal[request.about].begin(key)

    def put(self, key: str, request: Request, answer: Answer) -> None:
        self._journal[request.about].put(key, self._model, answer)

    def fail(self, key: str, request: Request) -> None:
        self._journal[request.about].fail(key)


def tokens_spent(folder: Path) -> dict[str, tuple[int, int]]:
    """{model: (tokens in, tokens out)} of all answers there are."""
    total_in: Counter[str] = Counter()
    total_out: Counter[str] = Counter()
    files = names(folder)
    for name in files:
        unit, _, kind = name.rpartition(".")
        found = {}
        if kind == "jsonl" and f"{unit}.parquet" in files:
            # Both, of a unit that is asked about again, or whose process was killed between writing and removing.
            found = dict.fromkeys(key for key, *_ in _read_table(folder / f"{unit}.parquet"))
        if kind == "parquet":
            for row in read_table(folder / name, ["model", "tokens_in", "tokens_out"]).to_pylist():
                total_in[row["model"]] += row["tokens_in"]
                total_out[row["model"]] += row["tokens_out"]
        elif kind == "jsonl":
            for line in _lines(folder / name):
                if "key" in line and line["key"] not in found and (answer := answer_from_json(line.get("answer"))):
                    found[line["key"]] = None
                    total_in[str(line.get("model", ""))] += answer.tokens_in
                    total_out[str(line.get("model", ""))] += answer.tokens_out
    return {model: (total_in[model], total_out[model]) for model in total_in}


def known_keys(folder: Path, unit: str) -> set[str]:
    """Keys of the answers about a unit, whoever has it open."""
    keys = {key for key, *_ in _read_table(folder / f"{unit}.parquet")}
    return keys | {line["key"] for line in _lines(folder / f"{unit}.jsonl") if "key" in line}


def _read_table(path: Path) -> list[tuple[str, str, Answer]]:
    if not path.is_file():
        return []
    rows = read_table(path).to_pylist()
    try:
        found = [(row["key"], row["model"], answer_from_json(json.loads(row["answer"]))) for row in rows]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise LensError(f"{path}: not a table of answers; they were paid for, so move it away to go on") from None
    return [entry for entry in found if entry[2] is not None]


def _lines(path: Path) -> list[dict]:
    """What stands in a journal. Half a line, of a process that was killed or a disk that was full, counts for none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and all(
                isinstance(value.get(name, ""), str) for name in ("key", "asked", "failed")
            ):
                found.append(value)
    return found


def _locked(path: Path, unit: str) -> int:
    """The journal of a unit, open to append to and locked; `Taken` where it is locked already."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise LensError(f"{path}: cannot be written: {error.strerror}") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(file)
                if status.st_nlink:
                    size = status.st_size
                    if size and os.pread(file, 1, size - 1) != b"\n":
                        os.write(file, b"\n")  # ends the half line of a process that was killed
                    return file
                os.close(file)  # whoever had it has finished and removed it in between
            except BlockingIOError:
                os.close(file)
                raise Taken(f"unit {unit}: another process asks about it") from None
            except OSError as error:
                os.close(file)
                raise LensError(f"{path}: cannot be locked or written: {error.strerror}") from None
