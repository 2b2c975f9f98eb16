"""The command line: bad input is one line and exit code 2; sample writes images that say how they were made."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from lens_jax import cli
from lens_jax import config as config_files
from lens_jax import contact_sheet as images
from lens_jax.data.engine.config import EngineConfig
from lens_jax.posttraining.distill_config import DistillConfig
from lens_jax.posttraining.rl_config import RlConfig
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.job import train


def run(capsys, *argv) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    train(dataclasses.replace(tiny_config, out=str(out), steps=2, samples=quiet))
    return out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no command 'trian' (did you mean 'train'?)"),
        (["train", "quikstart"], "no config 'quikstart' (did you mean 'quickstart'?)"),
        (["train", "absent.py"], "absent.py: no such config file"),
        (["train", "quickstart", "--optimizer.learning-rat", "1"], "did you mean --optimizer.learning-rate"),
        (["train", "quickstart", "--batchsize", "1"], "did you mean --data.batch-size"),
        (["train", "quickstart", "--ofload"], "did you mean --offload?"),
        (["train", "quickstart", "--steps", "many"], "Error parsing --steps"),
        (["train", "quickstart", "--model.dtype", "float8"], "invalid choice 'float8'"),
        (["train", "quickstart", "--model.heads", "0"], "model.heads is 0; it must be at least 1"),
        (["train", "quickstart", "--codec.components", "48"], "model.latent_channels is 64, but the codec gives 48"),
        (["train", "quickstart", "--data.path", "nowhere"], "no data set at nowhere"),
        (["sample"], "give at least one prompt"),
        (["sample", "cat", "--checkpoint", "nowhere"], "no such file or folder"),
        (["info", "nowhere"], "no such file or folder"),
        (["prepare", "openmojis"], "did you mean 'openmoji'?"),
        (["prepare", "folder", "--path", "nowhere"], "nowhere"),
        (["bench", "trian"], "did you mean 'train'?"),
        (["prompts", "mak"], "no action 'mak' (did you mean 'make'?)"),
        (["prompts", "make"], "writing prompts needs endpoint.url"),
        (["prompts", "check", "nowhere"], "nowhere: no such file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(capsys, argv, message, tmp_path, monkeypatch, pictograms):
    monkeypatch.chdir(tmp_path)
    if "--codec.components" in argv:
        argv = [*argv, "--data.path", str(pictograms)]
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith("lens-jax: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_config_file_errors(capsys, tmp_path):
    path = tmp_path / "broken.py"
    for text, message in {
        "config = (": "broken.py:1:",
        "config = 3": "it must define `config`",
        "import nothing_like_this": "ModuleNotFoundError",
        "from lens_jax.models.denoiser import *\nDenoiserConfig(layers=0)": "model.layers is 0",
    }.items():
        path.write_text(text)
        code, _, err = run(capsys, "train", str(path))
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_truncated_shard(capsys, pictograms, tiny_config, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictograms, data)
    shard = sorted(data.glob("train-*/*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    small = ["--codec.patch", "4", "--codec.components", "48", "--model.latent-channels", "48"]
    code, _, err = run(capsys, "train", "quickstart", "--data.path", str(data), "--out", str(tmp_path / "run"), *small)
    assert (code, err.count("\n")) == (2, 1)
    assert shard.name in err
    assert "truncated" in err


def test_sample_writes_images_that_say_how_they_were_made(capsys, trained, tmp_path):
    argv = ["sample", "red apple", "ein Löwe", "--checkpoint", str(trained), "--out", str(tmp_path / "out"),
            "--seed", "5", "--num-inference-steps", "2", "--num-images-per-prompt", "2",
            "--height", "12", "--width", "20"]  # fmt: skip
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "4 images" in out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-red-apple.png", "0001-red-apple.png", "0002-ein-löwe.png", "0003-ein-löwe.png", "sheet.png"]
    path = tmp_path / "out" / names[2]
    assert Image.open(path).size == (20, 12)
    metadata = images.read_png_metadata(path)
    assert metadata["prompt"] == "ein Löwe"
    assert (metadata["seed"], metadata["index"], metadata["num_inference_steps"]) == (5, 2, 2)


def test_sample_errors(capsys, trained, tmp_path):
    for extra, message in {
        ("--height", "10", "--width", "16"): "size 10x16 cannot be tiled",
        ("--batch-size", "-1"): "--batch-size is -1",
        ("--height", "400000", "--width", "400000"): "has 10,000,000,000 tokens and needs at least ",
        ("bad\udcff",): "prompt 1 holds bytes that are not text",
    }.items():
        code, _, err = run(capsys, "sample", "cat", *extra, "--checkpoint", str(trained), "--out", str(tmp_path / "o"))
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert not (tmp_path / "o").exists()


def test_damaged_checkpoint(capsys, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    metadata = copy / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    values = json.loads(metadata.read_text())
    ours = values["custom_metadata"]
    ours["config"]["modle"] = 1
    metadata.write_text(json.dumps(values))
    code, _, err = run(capsys, "info", str(copy))
    assert (code, err.count("\n")) == (2, 1)
    assert "damaged, or not the metadata of a lens-jax checkpoint" in err
    # Whole, but of another version of the config: readable all the same.
    rest = {name: value for name, value in ours.items() if name != "checksum"}
    ours["checksum"] = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    metadata.write_text(json.dumps(values))
    assert run(capsys, "info", str(copy))[0] == 0
    metadata.write_text("{")
    code, _, err = run(capsys, "sample", "cat", "--checkpoint", str(copy))
    assert (code, err.count("\n")) == (2, 1)
    assert "not the metadata of a lens-jax checkpoint" in err


def test_info(capsys, trained, pictograms):
    code, out, _ = run(capsys, "info", str(trained))
    assert code == 0
    assert "2 blocks, width 32" in out
    code, out, _ = run(capsys, "info", str(pictograms))
    assert code == 0
    assert "CC BY-SA 4.0" in out
    code, out, _ = run(capsys, "info", "small/turbo")
    assert code == 0
    assert "adapter beside lens.safetensors" in out
    assert "guidance_scale 1.0, num_inference_steps 4" in out


def test_config_round_trip_through_json(tiny_config):
    values = json.loads(json.dumps(config_files.to_dict(tiny_config)))
    assert config_files.from_dict(TrainConfig, values, "x") == tiny_config


def test_every_config_loads_and_its_help_teaches(capsys):
    for name in config_files.available():
        kinds = {"rl": RlConfig, "distill": DistillConfig, "data": EngineConfig}
        kind = kinds.get(name.partition("_")[0], TrainConfig)
        assert isinstance(config_files.load(name, kind), kind)
    code, out, _ = run(capsys, "train", "quickstart", "--help")
    assert code == 0
    assert "--optimizer.learning-rate" in out
    assert "Peak learning rate" in out
    code, out, _ = run(capsys, "rl", "rl_lens", "--help")
    assert code == 0
    assert "--rollout.groups" in out
    assert "Report: 48" in out
    code, out, _ = run(capsys, "distill", "distill_lens", "--help")
    assert code == 0
    assert "--matching.guidance-scale" in out
    assert "--no-gan" in out


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer.learning-rate", "nan", "optimizer.* finite|must be positive"),
        ("flow.mu-256", "inf", "flow.mu_256 is inf; it must be a finite number"),
        ("ema-decay", "nan", "ema_decay is nan; it must be a finite number"),
        ("samples.guidance-scale", "nan", "samples.guidance_scale is nan; it must be a finite number"),
        ("data.source-weights", "nan", "data.source_weights"),
        ("validation.batches", "0", "validation.batches is 0; it must be at least 1"),
        ("optimizer.warmup-steps", "1000000000000", "optimizer.warmup_steps is 1000000000000; it must be 0 or more"),
        ("optimizer.beta2", "1", "optimizer.beta2 is 1.0; it must be at least 0 and below 1"),
        ("data.batch-size", "3000000000", "data.batch_size is 3000000000; it must be below 2\\^31"),
        ("seed", "18446744073709551615", "seed is 18446744073709551615; it must be below 2\\^32"),
        ("data.seed", "99999999999999999999", "data.seed is 99999999999999999999; it must be below 2\\^32"),
        ("seed", "-1", "seed is -1; it must be at least 0"),
    ],
)
def test_every_number_is_checked_before_work_starts(capsys, tmp_path, field, value, message):
    code, _, err = run(capsys, "train", "quickstart", f"--{field}", value, "--out", str(tmp_path / "run"))
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(message, err)
    assert not (tmp_path / "run").exists()


def test_numbers_of_other_commands_are_checked(capsys):
    code, _, err = run(capsys, "sample", "cat", "--guidance-scale", "nan")
    assert (code, err) == (2, "lens-jax: error: guidance_scale is nan; it must be a finite number\n")


def test_where_a_config_is_looked_for(tmp_path, monkeypatch):
    """A folder or file of the name of a packaged config does not hide it; a module beside a config is seen."""
    (tmp_path / "finetune").mkdir()
    (tmp_path / "quickstart").write_text("notes")
    monkeypatch.chdir(tmp_path)
    for name in ("finetune", "quickstart"):
        kind = RlConfig if name.startswith("rl_") else TrainConfig
        assert isinstance(config_files.load(name, kind), kind)
    (tmp_path / "beside_a_config.py").write_text("steps = 7")
    (tmp_path / "mine.py").write_text(
        "from beside_a_config import steps\nfrom lens_jax.pretraining.config import TrainConfig\n"
        "config = TrainConfig(steps=steps)"
    )
    before = list(sys.path)
    assert config_files.load("mine.py", TrainConfig).steps == 7
    assert sys.path == before


def test_home_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = cli.parse(TrainConfig, ["--out=~/run", "--data.sources", "~/a", "/b", "--samples.prompts", "~/x"], "train")
    assert config.out == f"{tmp_path}/run"
    assert config.data.sources == (f"{tmp_path}/a", "/b")
    assert config.samples.prompts == ("~/x",)


def test_images_are_not_overwritten_and_out_is_checked_first(capsys, trained, tmp_path, monkeypatch):
    """What is in brackets is printed as it is."""
    out = tmp_path / "my [run] [/old]"
    command = ("sample", "cat", "--checkpoint", str(trained), "--num-inference-steps", "1", "--out")
    for _ in range(2):
        code, said, _ = run(capsys, *command, str(out))
        assert code == 0
        assert str(out) in said
    assert sorted(path.name for path in out.iterdir()) == [
        "0000-cat.png", "0001-cat.png", "sheet-0001.png", "sheet.png",
    ]  # fmt: skip
    monkeypatch.setattr("lens_jax.inference.pipeline.LensPipeline.__call__", None)
    for place in (out / "sheet.png", out / "sheet.png" / "below"):
        code, _, err = run(capsys, *command, str(place))
        assert (code, err.count("\n")) == (2, 1)
        assert "cannot be written" in err


@pytest.mark.parametrize("name", ["cuda", "cdua"])
def test_no_such_devices(name, tmp_path):
    environ = os.environ | {"JAX_PLATFORMS": name}
    command = [sys.executable, "-m", "lens_jax", "train", "quickstart", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"JAX_PLATFORMS is {name!r}, which JAX cannot use here" in done.stderr
