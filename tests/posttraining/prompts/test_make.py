"""Prompt sets written by a model: a real server that writes well, badly and twice the same, killed in between."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from lens_jax import cli
from lens_jax.errors import LensError
from lens_jax.llm.endpoint import Endpoint
from lens_jax.llm.request import Answer, Unusable
from lens_jax.posttraining.prompts import taxonomy, writer
from lens_jax.posttraining.prompts.check import find_remarks
from lens_jax.posttraining.prompts.duplicates import find_duplicates
from lens_jax.posttraining.prompts.make import MakePrompts, make_prompts, plan_tasks
from lens_jax.posttraining.prompts.prompt import Prompt, Rubric, read_prompts, write_prompts
from lens_jax.posttraining.prompts.subset import subset

WORDS = ("stone", "river", "amber", "lantern", "copper", "meadow", "window", "silver", "ladder", "basket", "violet")


def paragraph(subject: str, number: int, text: str = "") -> str:
    """40 words that no other subject has in this order."""
    digest = hashlib.sha256(f"{subject}{number}".encode()).digest()
    body = " ".join(WORDS[b % len(WORDS)] for b in digest) + " beside it"
    place = f'under the sign "{text}"' if text else "alone"
    return f"A {subject} stands {place} with {body}."


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.toml"
    path.write_text(
        '[Animal]\n"Birds" = ["owl", "crow", "wren", "hen"]\n[Text]\n"Signs" = ["neon sign", "shop sign"]\n'
    )
    return path


@pytest.fixture
def writing_server(fake_server):
    """Writes prompts and rubrics; "wren" in a list of markup first, and for the "hen" what it wrote for the crow."""
    pytest.importorskip("openai", reason="pip install 'lens-jax[llm]'")
    lock, count = threading.Lock(), Counter()

    def reply(number, path, body, headers):
        system, user = (message["content"] for message in body["messages"][:2])
        with lock:
            count[len(count)] += 1
        if "Subject: " in user:
            subject = user.partition("Subject: ")[2].partition(" (")[0]
            text = "OPEN 9" if "double quotes" in user else ""
            if subject == "wren" and len(body["messages"]) == 2:
                return fake_server.chat("- a wren\n- a stone")
            prompt = paragraph("crow" if subject == "hen" else subject, 0, text)
            return fake_server.chat(json.dumps({"prompt": prompt, "texts": [text] if text else []}))
        assert "criteria" in system
        rubrics = {f"Attribute Accuracy ({i})": f"The {i}th word is seen." for i in range(4)}
        if "OPEN 9" in user:
            rubrics["OCR Alignment (sign)"] = 'The sign reads "OPEN 9".'
        return fake_server.chat(f"```json\n{json.dumps(rubrics)}\n```")

    fake_server.reply = reply
    return fake_server


def config(server, items, out, **changes) -> MakePrompts:
    endpoint = Endpoint(url=server.url, model="m", wait_seconds=(0.01, 0.02), concurrency=4)
    return MakePrompts(out=str(out), endpoint=endpoint, taxonomy=str(items), **changes)


def test_a_set_is_written_once(writing_server, items, tmp_path, capsys):
    out = make_prompts(config(writing_server, items, tmp_path / "set"))
    prompts = {prompt.item: prompt for prompt in read_prompts(out)}
    assert list(prompts) == ["owl", "crow", "wren", "neon sign", "shop sign"]
    assert all(prompt.rubrics[-1] == writer.STRUCTURAL_INTEGRITY for prompt in prompts.values())
    assert (len(prompts["owl"].rubrics), len(prompts["neon sign"].rubrics)) == (5, 6)
    assert (prompts["owl"].texts, prompts["neon sign"].texts) == ((), ("OPEN 9",))
    assert prompts["owl"].id == "animal/birds/owl/0"
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert dropped == [{"id": "animal/birds/hen/0", "reason": "duplicate of animal/birds/crow/0"}]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["prompts"], manifest["categories"], manifest["with_texts"]) == (5, {"Animal": 3, "Text": 2}, 2)
    assert manifest["sha256"] == hashlib.sha256((out / "prompts.jsonl").read_bytes()).hexdigest()
    assert manifest["families"] == {"Attribute Accuracy": 20, "OCR Alignment": 2, "Structural Integrity": 5}
    # Six prompts, one of them twice, and rubrics for the five that are kept.
    asked = len(writing_server.seen)
    assert asked == 7 + 5
    assert manifest["spent"] == {"usd": 0.0, "tokens": 101 * asked}
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    # Complete, it needs no server; without the manifest it is made of the answers again, byte for byte.
    gone = dataclasses.replace(
        config(writing_server, items, out), endpoint=Endpoint(url="http://127.0.0.1:9", model="m")
    )
    make_prompts(gone)
    (out / "manifest.json").unlink()
    make_prompts(config(writing_server, items, out))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert len(writing_server.seen) == asked
    with pytest.raises(LensError, match="holds a set with seed 0, not 1; choose another --out"):
        make_prompts(config(writing_server, items, tmp_path / "set", seed=1))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["prompts", "check", str(out), "--strict"])
    assert stop.value.code == 0
    assert "Attribute Accuracy 20" in capsys.readouterr().out
    (out / "prompts.jsonl").write_bytes(before["prompts.jsonl"].splitlines(True)[0])
    with pytest.raises(SystemExit) as stop:
        cli.main(["prompts", "check", str(out)])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.err.count("\n")) == (2, 1)
    assert "1 prompts that are not the 5 of" in captured.err


def test_killed_in_between(writing_server, items, tmp_path):
    """SIGKILL while rubrics are written: the set of an uninterrupted run, and nothing answered is asked again."""
    whole = make_prompts(config(writing_server, items, tmp_path / "whole"))
    calls = len(writing_server.seen)
    out = tmp_path / "set"
    script = "import sys; from lens_jax.cli import main; main(sys.argv[1:])"
    argv = [sys.executable, "-c", script, "prompts", "make", "--out", str(out), "--taxonomy", str(items),
            "--endpoint.url", writing_server.url, "--endpoint.model", "m", "--endpoint.concurrency", "1"]  # fmt: skip
    answer = writing_server.reply

    def slowly(*request):
        time.sleep(0.1)
        return answer(*request)

    writing_server.reply = slowly
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(writing_server.seen) < calls + 9:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (out / "prompts.jsonl").exists()
    writing_server.reply = answer
    make_prompts(config(writing_server, items, out))
    assert (out / "prompts.jsonl").read_bytes() == (whole / "prompts.jsonl").read_bytes()
    assert len(writing_server.seen) - calls <= calls + 1


def test_a_model_that_cannot_write_stops(writing_server, items, tmp_path):
    writing_server.reply = lambda *_: writing_server.chat("I cannot help with that.")
    with pytest.raises(LensError) as stop:
        make_prompts(config(writing_server, items, tmp_path / "set", max_failed=0.4))
    assert str(stop.value).startswith("prompts make: 3 of 6 prompts could not be written, more than --max-failed 0.4")
    assert "not JSON; the answer was 'I cannot help with that.' (asked 3 times)" in str(stop.value)
    assert not (tmp_path / "set" / "prompts.jsonl").exists()


def read(task, text: str) -> writer.Written:
    return writer.read_prompt(task, Answer(text))


def test_what_counts_as_a_prompt():
    plain, texted = (taxonomy.Task("a", taxonomy.Item("A", "B", "owl"), d) for d in (("Count",), ("Count", "Text")))
    good, sign = paragraph("owl", 0), paragraph("owl", 0, "OPEN 9")
    dump = lambda prompt, *texts: json.dumps({"prompt": prompt, "texts": list(texts)})
    assert read(plain, dump(good)) == writer.Written(good, ())
    assert read(plain, f"<think>hm</think>\n```\n{dump(good)}\n```").prompt == good
    assert read(texted, dump(sign, "OPEN 9")) == writer.Written(sign, ("OPEN 9",))
    for task, text, message in [
        (plain, "I cannot", "not JSON"),
        (plain, dump(good)[:-9], "not JSON"),
        (plain, "[]", "not a JSON object"),
        (plain, '{"text": "x"}', "no text under prompt"),
        (plain, dump("an owl"), "2 words"),
        (plain, dump(good * 3), "words"),
        (plain, dump(f"{good}\n{good}"), "more than one paragraph"),
        (plain, dump(f"- {good}"), "markup"),
        (plain, dump(sign, "OPEN 9"), "1 texts"),
        (plain, dump(sign), "quotes"),
        (texted, dump(good), "0 texts"),
        (texted, dump(sign, "OPEN"), r"quotes \['OPEN 9'\] and lists \['OPEN'\]"),
        (plain, dump(good + "\ud800"), "markup"),
    ]:
        with pytest.raises(Unusable, match=message):
            read(task, text)
    with pytest.raises(Unusable, match="cut off"):
        writer.read_prompt(plain, Answer(dump(good), finish_reason="length"))


def test_what_counts_as_rubrics():
    written = writer.Written("x", ("OPEN",))
    base = {"Attribute Accuracy (a)": "x.", "attribute accuracy: (b )": "y\n z", "OCR Alignment": 'It reads "OPEN".'}
    rubrics = writer.read_rubrics(written, Answer(json.dumps(base)))
    assert [rubric.name for rubric in rubrics] == [
        "Attribute Accuracy (a)", "Attribute Accuracy (b)", "OCR Alignment", "Structural Integrity (Overall)",
    ]  # fmt: skip
    assert rubrics[1].check == "y z"
    for change, message in [
        ({"Beauty (all)": "x"}, "the family 'Beauty'"),
        ({"Structural Integrity (Overall)": "x"}, "the family 'Structural Integrity'"),
        ({"Action Accuracy": 1}, "no sentence"),
        ({"Attribute Accuracy ( a )": "x"}, "two of the name"),
        ({f"Action Accuracy ({i})": "x" for i in range(8)}, "11 rubrics"),
        ({"OCR Alignment": "It reads OPE"}, "no OCR Alignment of 'OPEN'"),
    ]:
        with pytest.raises(Unusable, match=message):
            writer.read_rubrics(written, Answer(json.dumps(base | change)))
    with pytest.raises(Unusable, match="2 rubrics"):
        writer.read_rubrics(writer.Written("x", ()), Answer(json.dumps(dict(list(base.items())[:2]))))


def test_tasks_follow_from_seed_and_item_alone(tmp_path):
    items = taxonomy.read_taxonomy()
    assert len(items) == 1180
    assert list(dict.fromkeys(item.category for item in items)) == [
        "Human", "Object", "Animal", "Plant", "Scene", "Food", "Event", "Fictional World", "Text",
        "UI and Graphic Design",
    ]  # fmt: skip
    tasks = taxonomy.make_tasks(items, 7, seed=0)
    assert len({task.id for task in tasks}) == len(tasks) == 8260
    fewer = taxonomy.make_tasks(items[3:], 2, seed=0)
    by_id = {task.id: task for task in tasks}
    assert all(by_id[task.id] == task for task in fewer)
    counts = Counter(len(set(task.dimensions) - {"Text"}) for task in tasks)
    assert all(abs(counts[n] - 2065) < 200 for n in (1, 2, 3, 4))
    assert sum("Text" in task.dimensions for task in tasks) == 7 * 212
    per_item = {tuple(task.dimensions for task in tasks[i : i + 7]) for i in range(0, len(tasks), 7)}
    assert all(len(set(sets)) == 7 for sets in per_item)
    assert taxonomy.make_tasks(items, 1, seed=1)[0].dimensions != tasks[0].dimensions
    limited = plan_tasks(MakePrompts(limit=20))
    assert Counter(task.item.category for task in limited) == dict.fromkeys({item.category for item in items}, 2)
    path = tmp_path / "t.toml"
    for text, message in {
        "x": "not TOML",
        "a = 1": "'a' is no table",
        "[A]\nb = 1": r"\[A\] 'b': expected a list of texts",
        '[A]\nb = ["c", "c"]': "'c' is there twice",
        "": "no items",
    }.items():
        path.write_text(text)
        with pytest.raises(LensError, match=message):
            taxonomy.read_taxonomy(path)


def test_duplicates():
    """Of 38 rows of three words each, a changed word takes three away on either side: 35 of 41 remain."""
    first = " ".join(f"word{i}" for i in range(40))
    one, far = first.replace("word20", "other"), " ".join(f"word{i}" for i in range(20, 60))
    shout = first.upper().replace(" ", ",  ") + "!"
    found = find_duplicates(
        [("a", first), ("b", far), ("c", one), ("d", shout), ("e", "a cat"), ("f", "A cat."), ("g", "cat")]
    )
    assert found == {"c": "a", "d": "a", "f": "e"}


def test_subsets_lie_within_each_other(tmp_path):
    prompts = [Prompt(f"{c}/{i}", "x", category=c) for i in range(40) for c in ("Text", "Food", "Animal")]
    quarter, half = subset(prompts, 0.25), subset(prompts, 0.5)
    assert Counter(p.category for p in quarter) == {"Text": 10, "Food": 10, "Animal": 10}
    assert {p.id for p in quarter} < {p.id for p in half}
    assert [p for p in prompts if p in half] == half
    assert subset(prompts, 0.25, seed=1) != quarter
    # What else is in the set does not matter.
    rest = subset(prompts, 0.25, without=("Text",))
    assert rest == [p for p in quarter if p.category != "Text"]
    assert subset([p for p in prompts if p.category != "Text"], 0.25) == rest
    for changes, message in [({"fraction": 0.0}, "above 0"), ({"without": ("Txt",)}, "did you mean 'Text'"),
                             ({"fraction": 0.001}, "no prompts left")]:  # fmt: skip
        with pytest.raises(LensError, match=message):
            subset(prompts, **changes)
    write_prompts(tmp_path / "all.jsonl", prompts)
    argv = ["prompts", "subset", str(tmp_path / "all.jsonl"), str(tmp_path / "q.jsonl"), "--fraction", "0.25"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--without", "Text"])
    assert stop.value.code == 0
    assert read_prompts(tmp_path / "q.jsonl") == rest


def test_remarks():
    good = Prompt("a", 'a sign "OPEN"', "Text", texts=("OPEN",), rubrics=(writer.STRUCTURAL_INTEGRITY,))
    assert find_remarks([good]) == {}
    bare = Prompt("b", "A sign, open!", "Text", rubrics=(Rubric("x", "y"),), texts=("SHUT",))
    assert find_remarks([good, bare, Prompt("c", "d")]) == {
        "with the words of an earlier prompt": ["b (a)"],
        "whose texts are not in the prompt": ["b"],
        "without the rubric of structural integrity": ["b"],
        "with neither rubrics nor texts nor a scene to judge by": ["c"],
        "without a category": ["c"],
    }
