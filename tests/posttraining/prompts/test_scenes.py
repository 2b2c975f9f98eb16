"""Prompt sets of the pictogram world: deterministic, true, and apart from what is held out."""

import dataclasses
import json

import pytest

from lens_jax.cli import main
from lens_jax.data import captions, scene_json
from lens_jax.data.scene_sampler import combinations, held_out
from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.check import CheckPrompts, check_prompts
from lens_jax.posttraining.prompts.prompt import read_prompts
from lens_jax.posttraining.prompts.scenes import ScenePrompts, draw_prompts, make_scene_prompts
from lens_jax.posttraining.prompts.subset import subset

CONFIG = ScenePrompts(tasks=("many", "count_4", "text_4", "text_5", "text_6"), count=40, held_out_count=12)


@pytest.mark.parametrize("seen", ["seen", "unseen", "any"])
def test_captions_are_true_and_what_is_held_out_is_new(concepts, seen):
    concepts = {concept.id: concept for concept in concepts}
    train, test = draw_prompts(dataclasses.replace(CONFIG, combinations=seen))
    assert len(train) == 3 * 40
    assert len(test) == 4 * 12
    scenes = {prompt.id: scene_json.from_json(prompt.scene, concepts, prompt.id) for prompt in (*train, *test)}
    assert len(scenes) == len(train) + len(test)
    for prompt in (*train, *test):
        scene = scenes[prompt.id]
        assert prompt.prompt == captions.caption(scene, "en")
        assert prompt.texts == ((scene.word.text,) if scene.word else ())
        assert prompt.category == {"many": "many", "count_4": "counting", "single": "single object"}.get(
            prompt.subcategory, "text"
        )
    assert len({prompt.prompt for prompt in (*train, *test)}) == len(scenes)
    keys = lambda prompts: {key for prompt in prompts for key in combinations(scenes[prompt.id])}
    assert not keys(train) & keys(test)
    assert all(held_out(scenes[prompt.id]) for prompt in test)
    unseen = {held_out(scenes[prompt.id]) for prompt in train}
    assert unseen == {"seen": {False}, "unseen": {True}, "any": {False, True}}[seen]
    assert {prompt.item for prompt in train} == {"three", "four", "same four", "word", "word and one"}
    assert {len(prompt.texts[0]) for prompt in train if prompt.texts} == {4, 5, 6}


def test_files(tmp_path, capsys):
    """The same bytes again, whole by `prompts check`, and parts of them for the ablations."""
    flags = ["--count", "12", "--held-out-count", "4", "--tasks", "many", "text_3"]
    for name in ("a", "b"):
        main_exits(["prompts", "scenes", "--out", str(tmp_path / name), *flags], 0)
    for file in ("prompts.jsonl", "held_out.jsonl", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert check_prompts(CheckPrompts(str(tmp_path / "a"), strict=True)) == []
    assert check_prompts(CheckPrompts(str(tmp_path / "a" / "held_out.jsonl"), strict=True)) == []
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["categories"] == {"many": 12, "text": 12}
    assert manifest["held_out_categories"] == {"many": 4, "single object": 4, "text": 4}
    train = read_prompts(tmp_path / "a")
    quarter, half = subset(train, 0.25), subset(train, 0.5)
    assert [len(quarter), len(half)] == [6, 12]
    assert {p.id for p in quarter} < {p.id for p in half} < {p.id for p in train}
    assert {prompt.category for prompt in subset(train, without=("text",))} == {"many"}
    capsys.readouterr()
    main_exits(["prompts", "scenes", "--out", str(tmp_path / "a"), *flags], 2)
    assert "there already; pass --overwrite" in capsys.readouterr().err


def test_kinds_that_a_report_finds_neither_easy_nor_hopeless(tmp_path, capsys):
    shares = {"single": 0.9, "colours": 0.5, "size": 0.3, "many": 0.29, "attribution": 0.5, "text_3": 0.0}
    by_task = {task: {"objects": {"share": 1.0}, "everything": {"share": share}} for task, share in shares.items()}
    (tmp_path / "scenes.json").write_text(json.dumps({"scores": {"criteria by task": by_task}}))
    flags = ["--count", "4", "--held-out-count", "2", "--report"]
    main_exits(["prompts", "scenes", "--out", str(tmp_path / "set"), *flags, str(tmp_path)], 0)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["categories"] == {"colours": 4, "size": 4}
    assert manifest["held_out_categories"] == {"colours": 2, "single object": 2, "size": 2}
    # The same as by their names.
    named = [*flags[:-1], "--tasks", "colours", "size"]
    main_exits(["prompts", "scenes", "--out", str(tmp_path / "named"), *named], 0)
    assert (tmp_path / "named" / "manifest.json").read_bytes() == (tmp_path / "set" / "manifest.json").read_bytes()
    rest = json.dumps({"scores": {"criteria by task": {"many": by_task["many"]}}})
    for text, words in (
        (rest, "no task from 0.3 to 0.7; it has many 0.29"),
        ("[]", "no report of `lens-jax evaluate"),
        ("{", "no report of `lens-jax evaluate"),
    ):
        (tmp_path / "scenes.json").write_text(text)
        capsys.readouterr()
        main_exits(["prompts", "scenes", "--out", str(tmp_path / "other"), *flags, str(tmp_path / "scenes.json")], 2)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def main_exits(argv: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert (stop.value.code or 0) == code


def test_bad_input_is_one_line(tmp_path):
    for changes, words in (
        ({"tasks": ("mny",)}, r"tasks 'mny' \(did you mean 'many'\?\); accepted: "),
        ({"tasks": ()}, "tasks needs one"),
        ({"held_out_tasks": ("attribution",)}, "held_out_tasks 'attribution'"),
        ({"language": "xx"}, "language 'xx'"),
        ({"natural": 2.0}, "natural is 2.0; it is a share"),
        ({"between": (0.7, 0.3)}, "between is .*the lower one first"),
    ):
        with pytest.raises(LensError, match=words):
            dataclasses.replace(CONFIG, **changes)
    out, few = tmp_path / "set", {"count": 900, "held_out_count": 0, "concepts": 8}
    with pytest.raises(LensError, match=r"only \d+ of 900 different prompts of count_4 in train with 8 concepts"):
        make_scene_prompts(dataclasses.replace(CONFIG, out=str(out), tasks=("count_4",), **few))
    assert not out.exists()
