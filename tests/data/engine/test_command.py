"""`lens-jax data` from its command line: bad input is one line."""

import pytest
from PIL import Image

from lens_jax import cli

CONFIG = """
from lens_jax.data.engine.config import EngineConfig, Models, Source, Thresholds

config = EngineConfig(
    (Source("pics", "folder", "pics", caption="keep"),), work="work", out="out", models=Models(nsfw=""),
    thresholds=Thresholds(area=16), buckets=("16x16",),
)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    (tmp_path / "mine.py").write_text(CONFIG)
    return tmp_path


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", *argv])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bild"], "no action 'bild' (did you mean 'build'?); accepted: build"),
        (["build"], "the config comes first: lens-jax data build CONFIG"),
        (["build", "quickstart"], "it must define `config`, a lens_jax.data.engine.config.EngineConfig"),
        (["build", "mine.py", "--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["build", "mine.py", "--thresholds.nsfw", "2"], "thresholds.nsfw is 2.0; it must lie within 0 to 1"),
        (["build", "mine.py"], "source pics: pics: no images in it"),
        (["build", "mine.py", "--buckets", "1x"], "1x"),
        (["run", "mine.py", "probe", "--host", "3", "--hosts", "3"], "hosts count from 0"),
        (["run", "mine.py", "probe", "--", "--runner=X"], "options after -- are Beam's: give --beam too"),
        (["run", "mine.py", "select", "--beam"], "stage select is not for Beam"),
        (["caption", "mine.py", "--dry-run"], "the config has no `caption`"),
        (["status", "mine.py"], "no run of the data engine there yet"),
        (["why", "mine.py", "abc"], "no run of the data engine there yet"),
        (["plan", "mine.py", "--images", "0"], "--images is 0.0; it must be at least 1"),
        (["remove", "pics", "--ids", "nowhere.txt"], "nowhere.txt: not a text file that can be read"),
    ],
)
def test_bad_input_is_one_line(capsys, here, argv, message):
    if "caption" in argv:
        Image.new("RGB", (20, 20)).save(here / "pics" / "a.png")
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith("lens-jax: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_help_and_what_follows_it(capsys, here):
    for action in ("build", "run", "plan", "caption", "status", "report", "why"):
        code, out, _ = run(capsys, action, "mine.py", "--help")
        assert code == 0, action
        assert "--thresholds.cosine" in out
    code, out, _ = run(capsys, "remove", "--help")
    assert (code, "--ids" in out) == (0, True)
