"""The command: what it prints and writes, and what it says where a run does not fit."""

import json

import pytest

from lens_jax import cli


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


SMALL = ("quickstart", "--data.path", "nowhere", "--data.buckets", "48x48", "56x40", "--data.batch-size", "32")


def test_plan(capsys, tmp_path):
    """The quickstart on 16 A100s, its numbers against each other."""
    path = tmp_path / "plan.json"
    code, out, err = plan(
        capsys, *SMALL, "--hardware", "a100-40", "--devices", "16", "--mesh.data", "2", "--mesh.fsdp", "8",
        "--price", "2", "--mfu", "0.5", "--caption-tokens", "3", "--json", str(path),
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "16 a100-40: data 2 x fsdp 8; no data set at nowhere yet" in out
    found = json.loads(path.read_text())
    assert found["fits"]
    assert found["options"]["price"] == 2
    assert found["peak_bytes"] == sum(found["resident"].values()) + sum(found["working"].values())
    assert [(one["name"], one["kernel"]) for one in found["programs"]] == [
        ("train step", "xla"),
        ("codec", None),
        ("text encoder", None),
    ]
    # The linear codec's product is not the model's work, and next to nothing: a 600th.
    seconds = found["seconds"]
    assert seconds == pytest.approx(found["work"]["model"] / (0.5 * 16 * 312e12), rel=3e-3)
    assert found["device_hours"] == pytest.approx(1500 * seconds * 16 / 3600, rel=1e-9)
    assert found["cost"] == pytest.approx(2 * found["device_hours"], rel=1e-9)
    assert found["mfu"] == pytest.approx(0.5, rel=3e-3)
    # Of 35 or 36 image tokens none is padding; of seven text slots 3 are used, less the tenth that is dropped.
    assert [one["image_waste"] for one in found["buckets"]] == [0, 0]
    assert found["areas"][0]["text_waste"] == pytest.approx(1 - 0.9 * 3 / 7)
    kinds = {(one["what"], one["kind"], one["axes"]) for one in found["traffic"]}
    assert {("weights", "all-gather", "fsdp"), ("gradients", "reduce-scatter", "fsdp")} <= kinds


@pytest.mark.slow
def test_offloading(capsys, tmp_path):
    """12 bytes a parameter, and two counters, go to the host and come back, also where the mesh cuts them."""
    found = []
    for more in ((), ("--offload",)):
        path = tmp_path / "plan.json"
        mesh = ("--devices", "8", "--mesh.fsdp", "8", "--accumulation", "2", "--json", str(path))
        assert plan(capsys, *SMALL, *mesh, *more)[0] == 0
        found.append(json.loads(path.read_text()))
    kept, offloaded = found
    size = kept["resident"]["average"] + kept["resident"]["optimiser"]
    assert (kept["offloaded"], offloaded["offloaded"]) == (0, size)
    assert offloaded["resident"] == kept["resident"] | {"average": 0, "optimiser": 0}
    assert kept["traffic"] == [one for one in offloaded["traffic"] if one["axes"] != "host"]
    assert [one["bytes"] for one in offloaded["traffic"] if one["axes"] == "host"] == [2 * size]
    # They are on the devices in the update, but not in the micro-step.
    peaks = [{one["name"]: sum(one["bytes"].values()) for one in plan["programs"]} for plan in found]
    assert peaks[1]["micro-step"] == peaks[0]["micro-step"]
    assert peaks[1]["update"] >= peaks[0]["update"] + size - 8


# More blocks than a small memory holds, on 8 devices that each have a copy of them.
LARGE = (
    "pretrain_512", "--hardware", "a100-40", "--devices", "8", "--data.batch-size", "64", "--no-lower",
    "--data.path", "nowhere",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*LARGE, "--mesh.data", "8", "--mesh.fsdp", "1"), r"most is optimiser, 32\.8 GB\); mesh\.fsdp 1 -> 4, "
         r"mesh\.data 8 -> 2, would \(\d+\.\d GB\)"),
        ((*LARGE, "--model.remat", "none", "--data.batch-size", "96"), r"do not fit into the 39\.5 GB of a100-40 "
         r"\(micro-step of 512x512; most is "
         r"saved activations, \d+\.\d GB\); model\.remat none -> mlp would \(\d+\.\d GB\)"),
        ((*SMALL, "--devices", "3"), "a batch of 32 images cannot be split .*; give a multiple of 3"),
        ((*SMALL, "--devices", "6", "--mesh.fsdp", "4"), r"mesh .* does not fit 6 devices; mesh\.fsdp 6 would"),
        ((*SMALL, "--devices", "2", "--mesh.tensor", "2", "--mesh.fsdp", "1"), r"does not divide the 3 heads of the "
         r"model; mesh\.tensor 1 would"),
        (("quickstart", "--data.path", "nowhere"), r"no data set at nowhere and no data\.buckets"),
        ((*SMALL, "--hardware", "v6e", "--devices", "24"), "no slice of v6e has 24 chips; there are some of 16 and 32"),
        ((*SMALL, "--hardware", "h10"), "invalid choice|h100"),
        ((*SMALL, "--mfu", "40"), r"--mfu is 40\.0; it must be above 0 and at most 1"),
        (("--devices", "8"), "the config comes first"),
    ],
)  # fmt: skip
def test_what_does_not_fit(capsys, arguments, message):
    import re

    code, _, err = plan(capsys, *arguments)
    assert code == 2
    assert err.startswith("lens-jax: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
