"""The report's figures, as worked out in numbers by hand."""

import json

import pytest

from lens_jax import cli
from lens_jax.planning.figures import figures


def test_figures():
    found = {figure.name: figure for figure in figures()}
    forward = 3_606_141_861_888, 8_455_596_146_688, 16_868_329_783_296
    first = 400_000 * 3072 * 3 * forward[0]
    second = 400_000 * 128 * (24 * forward[0] + 10 * forward[1] + 6 * forward[2])
    assert found["stage 1, 512²"].value == first
    assert found["stage 2, mixed areas"].value == second
    assert found["pre-training"].value == first + second
    shown = {name: figure.shown for name, figure in found.items()}
    assert shown["pre-training"] == "2.72e+22 FLOP"
    assert (shown["MFU"], shown["HFU"], shown["share of Z-Image"]) == ("12.6%", "16.8%", "19.3%")
    assert found["MFU"].value == pytest.approx((first + second) / (192_000 * 3600 * 312e12), rel=1e-12)
    assert found["share of Z-Image"].value == pytest.approx(192 * 312 / (314 * 989.4), rel=1e-12)
    assert found["at 40 % MFU"].value == pytest.approx(60_622, abs=1)


def test_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--report", "--json", str(tmp_path / "figures.json")])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "pre-training: 2.72e+22 FLOP" in text
    assert text.count("caveat") == text.count("formula") == text.count("inputs") == 8
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [one["name"] for one in written] == [figure.name for figure in figures()]
