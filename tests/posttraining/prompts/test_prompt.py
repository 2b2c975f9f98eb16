"""Prompt files: what is written is read back, and each kind of damage is one line that names the place."""

import json

import pytest

from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt, Rubric, read_prompts, write_prompts

FULL = Prompt(
    id="text/poster/0007",
    prompt='A poster that says "ÖFFNUNG 9 Uhr",\nin blue.',
    category="Text",
    subcategory="Poster",
    item="opening hours",
    dimensions=("Attribute", "Color"),
    rubrics=(
        Rubric("OCR Alignment (title)", "The poster reads ÖFFNUNG 9 Uhr."),
        Rubric("Structural Integrity", "Whole."),
    ),
    texts=("ÖFFNUNG 9 Uhr",),
    scene={"objects": [{"what": "cat", "where": "left"}], "background": None},
)


def test_written_is_read_back(tmp_path):
    path = tmp_path / "deep" / "prompts.jsonl"
    prompts = [FULL, Prompt("b", "a cat")]
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts
    first = path.read_bytes()
    write_prompts(path, read_prompts(path))
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["prompts.jsonl"]
    assert [rubric.family for rubric in FULL.rubrics] == ["OCR Alignment", "Structural Integrity"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no prompts in it"),
        ("{", "1: not JSON"),
        ('["a"]', "1: expected an object, got ['a']"),
        ('{"id": "a", "prompt": "x", "promt": 1}', "unknown field 'promt' (did you mean 'prompt'?)"),
        ('{"id": "a"}', "no 'prompt'"),
        ('{"id": "a b", "prompt": "x"}', "id is 'a b'"),
        ('{"id": "a", "prompt": "  "}', "prompt is empty"),
        ('{"id": "a", "prompt": 3}', "prompt: expected text, got 3"),
        ('{"id": "a", "prompt": "x\\u0000"}', "control characters"),
        ('{"id": "a", "prompt": "x\\ud800"}', "half a surrogate pair"),
        ('{"id": "a", "prompt": "x", "rubrics": {"a": "b"}}', "rubrics: expected a list of [name, check] pairs"),
        ('{"id": "a", "prompt": "x", "rubrics": [["a"]]}', "rubrics[0]: expected a pair"),
        ('{"id": "a", "prompt": "x", "rubrics": [["a", ""]]}', "rubrics[0]: name and check must not be empty"),
        ('{"id": "a", "prompt": "x", "rubrics": [["a", "b"], ["a", "c"]]}', "rubrics[1]: the name 'a' is there twice"),
        ('{"id": "a", "prompt": "x", "texts": [""]}', "an empty text"),
        ('{"id": "a", "prompt": "x", "scene": 1}', "scene is 1"),
        ('{"id": "a", "prompt": "x", "scene": {"a": NaN}}', "NaN is no number of JSON"),
        ('{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}', "3: id 'a' is there already"),
        ('{"id": "a", "prompt": "x", "scene": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        (json.dumps({"id": "a", "prompt": "x" * (1 << 20)}), "longer than"),
    ],
    ids=lambda text: text[:40],
)
def test_damage_is_one_line(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(LensError) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_not_text(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "\xff"}')
    with pytest.raises(LensError, match="1: not UTF-8"):
        read_prompts(path)
    with pytest.raises(LensError, match="no such file"):
        read_prompts(tmp_path / "absent")
