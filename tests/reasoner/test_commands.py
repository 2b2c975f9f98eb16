"""The reasoner in the pipeline and on the command line: what is drawn, what is said, and what leaves the machine."""

import json
import socket

import pytest

from lens_jax import cli
from lens_jax.contact_sheet import read_png_metadata
from lens_jax.errors import LensError
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.reasoner import api, conversation
from lens_jax.reasoner.local import LocalReasoner
from lens_jax.reasoner.rewrite import Rewrite


def run(capsys, *argv) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, argv)])
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


class Shouting:
    """Rewrites in capitals, and refuses dogs."""

    def __init__(self):
        self.asked = []

    def rewrite(self, prompts, seed=0):
        self.asked.append((list(prompts), seed))
        answer = lambda p: Rewrite(p, p, "raw", "refused") if p == "dog" else Rewrite(p, p.upper(), "used")
        return [answer(prompt) for prompt in prompts]

    def close(self):
        """Nothing is open."""


def test_pipeline_draws_the_rewrites():
    pipe = LensPipeline.from_pretrained("small", reasoner=Shouting())
    small = {"num_inference_steps": 1, "guidance_scale": 2.0, "height": 64, "width": 64, "output_type": "latent"}
    output = pipe(["fox", "dog"], negative_prompt="rain", seed=5, num_images_per_prompt=2, **small)
    assert pipe.reasoner.asked == [(["fox", "dog"], 5)]  # once, and never of the negative prompt
    assert output.prompts == ["FOX", "dog"]
    assert [one.status for one in output.rewrites] == ["used", "raw"]
    plain = pipe(["FOX", "dog"], negative_prompt="rain", seed=5, num_images_per_prompt=2, reasoner=False, **small)
    assert (plain.images == output.images).all()
    assert (plain.prompts, plain.rewrites) == (["FOX", "dog"], None)
    features = pipe.text_encoder.encode(["fox"])
    assert pipe(prompt_embeds=features, **small).prompts is None
    assert len(pipe.reasoner.asked) == 1
    pipe.reasoner = None
    with pytest.raises(LensError, match="no reasoner"):
        pipe("fox", reasoner=True, **small)
    for bad, said in (("local", "not GPT-OSS"), ("gpt", "accepted")):
        with pytest.raises(LensError, match=said):
            LensPipeline.from_pretrained("small", reasoner=bad)


def test_sample_says_both_texts(capsys, tmp_path, fake_server):
    pytest.importorskip("openai", reason="pip install 'lens-jax[llm]'")
    answers = {"a fox": "A red fox on a pink background.", 'the word "TEA"': "A word on paper."}
    fake_server.reply = lambda number, path, body, headers: fake_server.chat(answers[body["messages"][-1]["content"]])
    flags = ("--reasoner", "api", "--reasoner-url", fake_server.url, "--reasoner-model", "m")
    drawn = ("--num-inference-steps", 1, "--guidance-scale", 1, "--out", tmp_path / "out")
    code, out, err = run(capsys, "sample", *answers, *flags, *drawn)
    assert (code, err) == (0, "")
    assert "'a fox': rewritten: A red fox on a pink background." in out
    assert '"TEA" is not in the rewrite' in out
    first, second = (read_png_metadata(tmp_path / "out" / name) for name in ("0000-a-fox.png", "0001-the-word-tea.png"))
    assert (first["prompt"], first["revised_prompt"], first["reasoner"]) == (
        "a fox", "A red fox on a pink background.", "used",
    )  # fmt: skip
    assert (second["prompt"], second["reasoner"], second["reasoner_reason"]) == ('the word "TEA"', "raw", "lost_text")
    assert "revised_prompt" not in second

    # What is wrong with the rest of the call is found before anything is asked.
    before = len(fake_server.seen)
    for bad in (("--height", 65, "--width", 64), ("--seed", -1), ("--num-inference-steps", -1)):
        code, _, err = run(capsys, "sample", "a fox", *flags, *drawn, *bad)
        assert (code, err.count("\n")) == (2, 1), err
    code, _, err = run(capsys, "rewrite", "a fox", *flags, "--json", tmp_path)
    assert (code, len(fake_server.seen)) == (2, before)
    assert "is a folder" in err

    fake_server.reply = lambda *_: fake_server.chat("I'm sorry, but I can't help with that.")
    code, _, err = run(capsys, "sample", "a bomb", *flags, *drawn, "--reasoner-refusal", "block")
    assert (code, err.count("\n")) == (2, 1)
    assert "a bomb" in err
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    code, out, err = run(capsys, "rewrite", "a bomb", *flags, "--json", tmp_path / "rewrites.jsonl")
    assert (code, out) == (0, "a bomb\n")
    assert "the model would not answer" in err
    (kept,) = map(json.loads, (tmp_path / "rewrites.jsonl").read_text().splitlines())
    assert (kept["status"], kept["reason"], kept["model"]) == ("raw", "refused", "m")


def test_a_server_that_is_gone_stops_nothing_but_by_strict(capsys, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="pip install 'lens-jax[llm]'")
    endpoint = api.default_endpoint
    monkeypatch.setattr(api, "default_endpoint", lambda *names, **more: endpoint(*names, give_up_seconds=0.3, **more))
    flags = ("a fox", "--reasoner", "api", "--reasoner-url", "http://127.0.0.1:9/v1", "--reasoner-model", "m")
    code, out, err = run(capsys, "rewrite", *flags)
    assert (code, out) == (0, "a fox\n")
    assert "warning: http://127.0.0.1:9/v1: the prompt reasoner cannot be asked" in err
    assert "drawn as it is: the server cannot be reached" in err
    code, out, err = run(capsys, "rewrite", *flags, "--reasoner-strict")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_nothing_leaves_the_machine(monkeypatch, capsys, release_with_vocabulary):
    """Without a reasoner and with the local one no socket is opened."""

    def refuse(*args, **options):
        raise AssertionError("a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    # 12 tokens instead of 768, of a vocabulary of 201,088 on a CPU.
    opening = conversation.opening
    monkeypatch.setattr(conversation, "opening", lambda tokenizer, before, limit: opening(tokenizer, 4, 8))
    code, out, err = run(capsys, "rewrite", "a red fox", "", "--checkpoint", release_with_vocabulary)
    assert code == 0, err
    lines = out.split("\n")
    assert (lines[0], lines[1:]) == ("a red fox", ["", ""])  # an untrained model writes nothing of use
    assert err.startswith("'a red fox': drawn as it is: ")
    pipe = LensPipeline.from_pretrained(release_with_vocabulary, reasoner="local")
    assert isinstance(pipe.reasoner, LocalReasoner)
    # The head is loaded for it alone.
    assert "unembed" in pipe.text_encoder.model
    assert "unembed" not in LensPipeline.from_pretrained(release_with_vocabulary).text_encoder.model


def test_bad_flags_are_one_line(capsys, tmp_path, fake_server):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for argv, said in (
        (("rewrite", "a fox"), "needs --checkpoint"),
        (("rewrite", "--reasoner", "api"), "at least one prompt"),
        (("rewrite", "a fox", "--checkpoint", tmp_path), "no weights"),
        (("rewrite", "a fox", "--reasoner", "api", "--reasoner-url", "nonsense"), "http://HOST:PORT/v1"),
        (("rewrite", "a fox", "--reasoner", "api", "--reasoner-args", "[1]"), "JSON object"),
        (("rewrite", "a fox", "--reasoner", "api", "--reasoner-instructions", empty), "is empty"),
        (("sample", "a fox", "--reasoner", "local", "--out", tmp_path / "o"), "not GPT-OSS"),
        (("sample", "a fox", "--reasoner", "api", "--reasoner-url", fake_server.url, "--reasoner-key-env", "NO_KEY",
          "--out", tmp_path / "o"), "NO_KEY is not set"),
    ):  # fmt: skip
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), (argv, err)
        assert said in err, (said, err)
    assert not (tmp_path / "o").exists()
