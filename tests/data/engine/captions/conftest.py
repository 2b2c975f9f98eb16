"""A vision model behind the fake server that describes what it is shown, and runs of units of small images for it."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lens_jax.data.engine.captions.command import CaptionOptions, run
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.stage import CaptionStage
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.readers import read
from lens_jax.data.engine.readers import units as find_units
from lens_jax.data.engine.stage import fingerprints
from lens_jax.data.engine.tables import DECISION, PROBE, image_id, read_table, write_table
from lens_jax.llm.endpoint import Endpoint

WORDS = ("wooden", "stone", "glass", "iron", "paper", "silver", "copper", "velvet")
THINGS = ("table", "boat", "lamp", "horse", "bridge", "kettle", "tower", "guitar")


def describe(number: int) -> str:
    """An English caption that only this image has."""
    word = lambda k: WORDS[(number >> (3 * k)) % 8]
    thing = lambda k: THINGS[(number >> (3 * k)) % 8]
    return (
        f"A {word(0)} {thing(1)} stands beside a {word(1)} {thing(0)} on a gravel path, while a {word(2)} {thing(2)} "
        f"leans against the wall behind them and number {number} is lit from the left by a low evening sun."
    )


@dataclasses.dataclass
class Site:
    """A folder of images, all of them probed and kept, and the run that captions them."""

    config: EngineConfig
    layout: Layout
    units: list
    # Of the files, by the colour that the model sees: the number of the image.
    numbers: dict[tuple[int, int, int], int]

    @staticmethod
    def text(number: int) -> str:
        """What the model says of an image."""
        return describe(number)

    def caption(self, **changes):
        options = {name: changes.pop(name) for name in list(changes) if name in CaptionOptions.__dataclass_fields__}
        config = self.changed(**changes)
        return run(config, CaptionOptions(**options), self.laid_out(config), self.units)

    def changed(self, **changes) -> EngineConfig:
        fields = Endpoint.__dataclass_fields__
        endpoint = {name: changes.pop(name) for name in list(changes) if name in fields and name != "model"}
        caption = self.config.caption
        caption = dataclasses.replace(caption, endpoint=dataclasses.replace(caption.endpoint, **endpoint), **changes)
        return dataclasses.replace(self.config, caption=caption)

    def laid_out(self, config: EngineConfig) -> Layout:
        found = fingerprints({"probe": _Given("probe"), "select": _Given("select"), "caption": CaptionStage()}, config)
        return Layout(self.layout.work, found)

    def rows(self, **changes) -> list[dict]:
        """All rows of the tables, in the order of the units."""
        layout = self.laid_out(self.changed(**changes))
        tables = [read_table(layout.table("caption", unit.id)) for unit in self.units]
        return pa.concat_tables(tables).to_pylist()


class _Given:
    """A stage whose tables the test has written."""

    version, reads = 1, ()

    def __init__(self, name):
        self.name = name

    def settings(self, config):
        return {}


@pytest.fixture
def site(tmp_path, fake_server):
    """Makes a site: `site(12, unit_rows=5)` has twelve images in three units. Their model is on the fake server."""

    def make(count: int, unit_rows: int = 1000, **changes) -> Site:
        images, numbers = tmp_path / "images [1]", {}
        images.mkdir()
        for number in range(count):
            colour = tuple(int(c) for c in hashlib.sha256(b"%d" % number).digest()[:3])
            numbers[colour] = number
            Image.new("RGB", (24, 16), colour).save(images / f"{number:05d}.png")
        endpoint = Endpoint(
            url=fake_server.url, model="m", wait_seconds=(0.01, 0.05), timeout_seconds=300, concurrency=8,
        )  # fmt: skip
        config = EngineConfig(
            sources=(Source("pictures", "folder", str(images)),), work=str(tmp_path / "work"), unit_rows=unit_rows,
            caption=Caption(endpoint=endpoint, **changes),
        )  # fmt: skip
        layout = Layout(tmp_path / "work", {"probe": "0", "select": "0"})
        one = Site(config, layout, find_units(config.sources[0], unit_rows), numbers)
        one.layout = one.laid_out(config)
        for unit in one.units:
            probe, select = [], []
            for index, item in enumerate(read(config.sources[0], unit)):
                row = {"id": image_id("pictures", item.key), "index": index, "key": item.key}
                probe.append(row | {"sha256": hashlib.sha256(item.data).digest(), "width": 24, "height": 16})
                select.append({"id": row["id"], "kept": True, "bucket": "16x24", "split": "train"})
            write_table(one.layout.table("probe", unit.id), pa.Table.from_pylist(probe, PROBE))
            write_table(one.layout.table("select", unit.id), pa.Table.from_pylist(select, DECISION))
        return one

    return make


@pytest.fixture
def seen_number():
    """`seen_number(site, body)`: which image of the site a request shows."""

    def find(site: Site, body: dict) -> int:
        (part,) = [p for p in body["messages"][-1]["content"] if p["type"] == "image_url"]
        data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
        colour = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int).mean((0, 1))
        known = np.array(list(site.numbers))
        return site.numbers[tuple(known[np.abs(known - colour).sum(1).argmin()].tolist())]

    return find


@pytest.fixture
def model(fake_server, seen_number):
    """`model(site, script)`: answers with the caption of the image shown, or as `script(number, time asked)` says: a
    reply, a text, or None for the caption. `model.asked` counts what each image was asked."""

    def install(site: Site, script=lambda number, times: None):
        install.asked.clear()

        def reply(_, path, body, headers):
            number = seen_number(site, body)
            with fake_server.lock:
                install.asked[number] = install.asked.get(number, 0) + 1
                times = install.asked[number]
            said = script(number, times)
            said = describe(number) if said is None else said
            return fake_server.chat(said, tokens=(1000, 100)) if isinstance(said, str) else said

        fake_server.reply = reply

    install.asked = {}
    return install


class FakeBatches:
    """The batch API on the fake server. `answer(body)` is the (status, body) of a question; `ends(batch number, lines)`
    says how a batch ends: its status, and how many of its lines are answered."""

    def __init__(self, server, answer):
        self.server, self.answer = server, answer
        self.ends = lambda number, lines: ("completed", lines)
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.uploaded: list[int] = []
        self.answered: list[str] = []
        # Calls that take effect and whose reply is lost, or does not come: by path.
        self.cut: set[str] = set()
        server.reply, server.other = self.post, self.other

    def post(self, number, path, body, headers):
        assert path == "/v1/batches"
        with self.server.lock:
            id = f"batch_{len(self.batches)}"
            self.batches[id] = {"id": id, "status": "in_progress", "created_at": time.time(), **body}
        return None if "create" in self.cut and not self.cut.discard("create") else _json(200, self.batches[id])

    def other(self, method, path, data):
        with self.server.lock:
            if method == "POST" and path == "/v1/files":
                content = re.search(rb'filename="[^"]*"\r\n(?:[^\r\n]+\r\n)*\r\n(.*?)\r\n--', data, re.DOTALL)[1]
                id = f"file_{len(self.uploaded)}"
                self.files[id] = content
                self.uploaded.append(len(content))
                return _json(200, {"id": id, "object": "file", "bytes": len(content), "purpose": "batch",
                                   "created_at": 0, "filename": "x", "status": "processed"})  # fmt: skip
            if path.startswith("/v1/batches?"):
                return _json(200, {"data": list(self.batches.values())[::-1], "has_more": False})
            if path.startswith("/v1/batches/"):
                batch = self.batches[path.rpartition("/")[2]]
                self._end(batch)
                return _json(200, batch)
            id = path.split("/")[3]
            if id not in self.files:
                return _json(404, {"error": {"message": "no such file"}})
            if method == "DELETE":
                del self.files[id]
                return _json(200, {"id": id, "deleted": True})
            return 200, {"Content-Type": "application/octet-stream"}, self.files[id]

    def _end(self, batch):
        if batch["status"] != "in_progress":
            return
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        number = int(batch["id"].partition("_")[2])
        status, count = self.ends(number, len(lines))
        batch["status"] = status
        if status == "failed":
            batch["errors"] = {"data": [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}]}
            return
        good, bad = [], []
        for line in lines[:count]:
            self.answered.append(line["custom_id"])
            code, body = self.answer(line["body"])
            values = {"custom_id": line["custom_id"], "response": {"status_code": code, "body": body}, "error": None}
            (good if code == 200 else bad).append(values)
        late = lines[count:] if status == "expired" else ()
        bad += [{"custom_id": line["custom_id"], "response": None, "error": {"code": "batch_expired"}} for line in late]
        for name, found in (("output_file_id", good), ("error_file_id", bad)):
            if found:
                batch[name] = f"file_{name}_{number}"
                self.files[batch[name]] = b"".join(json.dumps(values).encode() + b"\n" for values in found)


def _json(status, values):
    return status, {}, json.dumps(values).encode()


@pytest.fixture
def batches(fake_server, seen_number):
    """`batches(site, script)`: the batch API with a model as that of `model`."""

    def install(site: Site, script=lambda number: None) -> FakeBatches:
        def answer(body):
            number = seen_number(site, body)
            said = script(number)
            if isinstance(said, tuple):
                return said
            reply = fake_server.chat(describe(number) if said is None else said, tokens=(1000, 100))
            return 200, json.loads(reply[2])

        return FakeBatches(fake_server, answer)

    return install
