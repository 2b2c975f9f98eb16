"""`lens-jax bench captions`: captions that one core can ask for, of a server that answers at once."""

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lens_jax.bench import measure
from lens_jax.errors import LensError

# Of the made images: a side more than is sent, so that each is made smaller.
_HEIGHT, _WIDTH = 1024, 1280


@dataclasses.dataclass(frozen=True)
class CaptionsBench:
    """What captions cost a core: the whole way from files to tables, the asking alone, and the SDK alone."""

    # Images.
    count: int = 640
    # Calls in flight.
    in_flight: int = 64
    # What the server takes for an answer.
    milliseconds: float = 50.0
    # Timed passes of each, in turn; the median is reported.
    repeats: int = 3
    # Also write the result as JSON here.
    json: str = ""

    def __post_init__(self):
        measure.check_positive(self, "count", "in_flight", "repeats")
        if self.milliseconds < 0:
            raise LensError(f"--milliseconds is {self.milliseconds}; it must be at least 0")


def bench_captions(bench: CaptionsBench) -> dict:
    """Make images, start a server, caption them in three ways; the figures. CPU time is of this process alone."""
    with tempfile.TemporaryDirectory() as folder, _server(bench.milliseconds / 1000) as url:
        site = _Site(bench, Path(folder), url)
        runs = {"whole": site.whole, "asking": site.asking, "sdk": site.sdk}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for repeat in range(bench.repeats + 1):
            for name, run in runs.items():
                found = run(f"{name}-{repeat}")
                if repeat:  # the first warms up
                    seconds[name].append(found)
        result = {
            "images": bench.count,
            "kilobytes_a_request": len(site.bodies[0]["messages"][-1]["content"][-1]["image_url"]["url"]) / 1000,
            "in_flight": bench.in_flight,
            "server_milliseconds": bench.milliseconds,
        }
        for name, found in seconds.items():
            wall, cpu = np.median(found, 0)
            result[f"{name}_captions_a_core_second"] = bench.count / cpu
            result[f"{name}_captions_a_second"] = bench.count / wall
        result["asking_ratio_to_sdk"] = result["asking_captions_a_core_second"] / result["sdk_captions_a_core_second"]
    return measure.report(bench, result)


class _Site:
    """Images in a folder, and what is asked about them."""

    def __init__(self, bench: CaptionsBench, folder: Path, url: str):
        from lens_jax.data.engine.captions import contract, sent
        from lens_jax.data.engine.captions.config import Caption
        from lens_jax.data.engine.config import EngineConfig, Source
        from lens_jax.data.engine.decode import Limits
        from lens_jax.llm.endpoint import Endpoint

        self._folder = folder
        images = folder / "images"
        images.mkdir()
        for number, data in enumerate(_photographs(bench.count)):
            (images / f"{number:06d}.jpg").write_bytes(data)
        endpoint = Endpoint(url=url, model="m", concurrency=bench.in_flight)
        caption = Caption(endpoint=endpoint, most_alike=bench.count)
        self._config = EngineConfig(
            sources=(Source("images", "folder", str(images)),), work=str(folder / "work"), caption=caption
        )
        files = [path.read_bytes() for path in sorted(images.iterdir())]
        prepared = [sent.prepare(caption, data, hashlib.sha256(data).digest(), Limits()) for data in files]
        (task,) = contract.tasks(caption, caption.kinds, b"")
        self._requests = [contract.request(caption, task, image, about="images") for image in prepared]
        self.bodies = [request.body("m", {}, endpoint.length_field) for request in self._requests]

    def whole(self, name: str) -> tuple[float, float]:
        """From files to tables: read, decoded, made smaller, encoded, asked, checked, kept."""
        import pyarrow as pa

        from lens_jax.data.engine.captions.command import CaptionOptions, run
        from lens_jax.data.engine.layout import Layout
        from lens_jax.data.engine.readers import read, units
        from lens_jax.data.engine.tables import DECISION, PROBE, image_id, write_table

        config = dataclasses.replace(self._config, work=str(self._folder / name))
        layout = Layout(Path(config.work), dict.fromkeys(("probe", "select", "caption"), "bench"))
        (source,) = config.sources
        found = units(source, config.unit_rows)
        for unit in found:
            probe, select = [], []
            for index, item in enumerate(read(source, unit)):
                row = {"id": image_id(source.name, item.key), "index": index, "key": item.key}
                size = {"height": _HEIGHT, "width": _WIDTH}
                probe.append(row | size | {"sha256": hashlib.sha256(item.data).digest()})
                select.append({"id": row["id"], "kept": True})
            write_table(layout.table("probe", unit.id), pa.Table.from_pylist(probe, PROBE))
            write_table(layout.table("select", unit.id), pa.Table.from_pylist(select, DECISION))
        with contextlib.redirect_stdout(io.StringIO()):
            return _timed(lambda: run(config, CaptionOptions(), layout, found))

    def asking(self, name: str) -> tuple[float, float]:
        """The questions alone, their images being prepared: asked, checked, kept."""
        from lens_jax.data.engine.captions import checks
        from lens_jax.data.engine.captions.journal import Journal
        from lens_jax.llm.client import Client

        journal = Journal(self._folder / name)
        journal.open("images")
        client = Client(self._config.caption.endpoint, "the benchmark", journal.of_model("m"))
        read = lambda _, answer: checks.read(answer, ("dense",), Counter())

        def ask() -> None:
            for _, result in client.ask_each(self._requests, read):
                if result.error:
                    raise LensError(f"bench captions: {result.error}")
            client.close()
            journal.finish("images")

        return _timed(ask)

    def sdk(self, name: str) -> tuple[float, float]:
        """The same calls by the SDK as its documentation has them."""
        from lens_jax.llm.client import import_openai

        openai, endpoint = import_openai(), self._config.caption.endpoint

        async def ask_all() -> None:
            gate = asyncio.Semaphore(endpoint.concurrency)
            async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="none", max_retries=0) as sdk:

                async def ask(body: dict) -> None:
                    async with gate:
                        await sdk.chat.completions.create(**body)

                await asyncio.gather(*map(ask, self.bodies))

        return _timed(lambda: asyncio.run(ask_all()))


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


@contextlib.contextmanager
def _server(seconds: float) -> Iterator[str]:
    argv = [sys.executable, "-m", "lens_jax.bench.caption_server", str(seconds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


def _photographs(count: int) -> Iterator[bytes]:
    """JPEGs whose smaller copies have some 110 KB, as photographs of that size have: soft patches, and noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    noise = rng.normal(0, 9, (_HEIGHT, _WIDTH, 1)).astype(np.float32)
    for number in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8))
        pixels = np.asarray(patches.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(pixels + np.roll(noise, number, 1), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
        yield buffer.getvalue()
