"""The table of what runs of reinforcement learning changed: read from their journals, by hand here."""

import json

import pytest

from lens_jax.cli import main
from lens_jax.evaluation import claims
from lens_jax.posttraining.judging import mark_of
from lens_jax.posttraining.prompts.prompt import Prompt, write_prompts

# (category, of each prompt whether its images pass, before and after), in two runs.
PASSES = {
    0: {"learnt": ([[1, 0], [0, 0], [1, 0]], [[1, 1], [1, 0], [1, 1]]), "kept": ([[1, 1], [0, 0]], [[1, 1], [0, 0]])},
    1: {"learnt": ([[0, 0], [0, 0], [1, 0]], [[0, 1], [1, 0], [1, 1]]), "kept": ([[1, 1], [0, 1]], [[1, 1], [0, 0]])},
}


def write_run(folder, seed: int, steps=(0, 80)) -> str:
    run = folder / f"run_{seed}"
    (run / "rewards").mkdir(parents=True)
    rewards = {"train": [], "evaluation": []}
    found = PASSES[seed]
    ids = [(f"{category}/{i}", category) for category, (before, _) in found.items() for i in range(len(before))]
    write_prompts(run / "held_out.jsonl", [Prompt(id=id, prompt=id, category=category) for id, category in ids])
    write_prompts(run / "prompts.jsonl", [Prompt(id="x", prompt="x", category="learnt")])
    config = {"seed": seed, "prompts": str(run / "prompts.jsonl"), "rewards": rewards}
    (run / "config.json").write_text(json.dumps(config | {"evaluation": {"prompts": str(run / "held_out.jsonl")}}))
    for number, step in enumerate(steps):
        lines = []
        for group, (id, category) in enumerate(ids):
            images = found[category][number][int(id[-1])]
            scores = [{"scene": 0.0, "scene/all": float(value)} for value in images]
            line = {"mark": mark_of([[], []]), "group": group, "prompt": id, "digests": ["a", "b"]}
            lines.append(
                {**line, "scores": scores, "errors": [None, None], "guards": {"dark": 0.5 + number}, "seconds": 0}
            )
        (run / "rewards" / f"evaluation_{step:06d}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(run)


def test_table(tmp_path, capsys):
    runs = [write_run(tmp_path, seed) for seed in PASSES]
    with pytest.raises(SystemExit) as stop:
        main(["claims", *runs])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split(" | ")[0].lstrip("| "): line.strip("| ").split(" | ")[1:] for line in lines if "±" in line}
    assert list(cells) == [
        "learnt from, seed 0 (run_0)",
        "learnt from, seed 1 (run_1)",
        "**learnt from, all 2 runs**",
        "learnt",
        "kept (not learnt from)",
    ]
    # Of run 0 prompts' means 1/2, 0, 1/2 became 1, 1/2, 1: half an interval is 1.96 sqrt(1/12 / 3) both times.
    assert cells["learnt from, seed 0 (run_0)"] == ["3", "33.3 ± 32.7 %", "83.3 ± 32.7 %", "+50.0 ± 0.0", "no"]
    # Of both, prompts' means are of four images: 1/4, 0, 1/2 became 3/4, 1/2, 1.
    assert cells["**learnt from, all 2 runs**"][:3] == ["3", "25.0 ± 28.3 %", "75.0 ± 28.3 %"]
    assert cells["kept (not learnt from)"][3:] == ["-12.5 ± 24.5", "no"]
    # Over both runs the second prompt was never right, and then half of the times.
    assert lines[-1].startswith("Evaluated at steps 0 and 80.")
    assert "right before: never 1 (0 to 50 %), sometimes 2 (38 to 88 %), always 0." in lines[-1]
    assert lines[-1].endswith("Guards, after over before: dark 3.00.")


def test_intervals_apart():
    row = claims.Row("", 9, (0.4, 0.1), (0.61, 0.1), (0.21, 0.05))
    assert row.apart
    assert not claims.Row("", 9, (0.4, 0.1), (0.59, 0.1), (0.19, 0.05)).apart


def test_what_cannot_be_compared_is_one_line(tmp_path):
    run = write_run(tmp_path, 0)
    for change, words in (
        (lambda: None, "no reward 'scene/al'; accepted: scene, scene/all"),
        (lambda: (tmp_path / "run_0/rewards/evaluation_000080.jsonl").unlink(), "1 evaluations, and two are compared"),
        (lambda: (tmp_path / "run_0/config.json").write_text("[]"), "not the config of a run of lens-jax rl"),
        (lambda: (tmp_path / "run_0/config.json").unlink(), "give the folder of a run of lens-jax rl"),
    ):
        change()
        with pytest.raises(claims.LensError, match=words):
            claims.claims(claims.ClaimsConfig((run,), "scene/al"))
    with pytest.raises(claims.LensError, match="at least one run"):
        claims.ClaimsConfig(())
