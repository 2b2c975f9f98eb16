"""The files of launch/ and the guide: syntax, compiler flags jaxlib takes, and commands that exist.

No cluster runs here: stand-ins for srun and gcloud show what the scripts start, and what they do when it ends.
"""

import dataclasses
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lens_jax import cli
from lens_jax import config as config_files
from lens_jax.parallel.processes import Cluster, detect
from lens_jax.pretraining.config import TrainConfig

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("kubernetes/*.yaml"))
FLAG = re.compile(r"#?(--[a-z0-9_]+=\S+)")


def flags(name: str, off: bool = False) -> list[str]:
    """The flags of a file that are on; with `off`, also those that are commented out."""
    lines = (LAUNCH / "flags" / name).read_text().splitlines()
    return [line.lstrip("#") for line in lines if line.startswith("--") or (off and line.startswith("#--"))]


# ---- compiler flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu.txt", "tpu.txt"])
def test_flags_are_well_formed_and_explained(name):
    lines = (LAUNCH / "flags" / name).read_text().splitlines()
    for line in lines:
        assert not line or line.startswith("# ") or FLAG.fullmatch(line), line
    for before, line in itertools.pairwise(lines):
        assert before or not line or line.startswith("# "), f"{line} is not explained"
    names = [flag.split("=")[0] for flag in flags(name, off=True)]
    assert names
    assert len(names) == len(set(names))


def test_jaxlib_takes_the_gpu_flags():
    # Two jaxlibs start at once; the second shows that a flag that is wrong would be noticed, and is named.
    starts = [_start_jax(flags("gpu.txt", off=True)), _start_jax(["--xla_gpu_no_such_flag=true"])]
    (_, said), (_, refused) = (start.communicate(timeout=120) for start in starts)
    assert starts[0].returncode == 0, said[-2000:]
    assert starts[1].returncode != 0
    assert "xla_gpu_no_such_flag" in refused


def _start_jax(xla_flags: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(xla_flags)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# ---- syntax ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_agree_with_themselves(manifest):
    jobset = yaml.safe_load(manifest.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for each in pod["containers"] + pod.get("initContainers", []):
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
    exits = [
        rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert exits == [container["name"]]
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        # What Kubernetes adds itself.
        environ = {entry["name"]: entry["value"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
        name = jobset["metadata"]["name"]
        address = f"{name}-{job['name']}-0-0.{name}:55527"
        assert detect(environ) == Cluster("environment", address, spec["completions"], 1)


def test_dockerfile_copies_what_exists_and_what_installing_needs():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [path for line in lines if line.startswith("COPY") for path in line.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied)
    # The folders of the packages, and what pyproject.toml refers to.
    assert {"lens_jax", "convert", "configs", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    assert [line for line in lines if line.startswith("USER")] == ["USER lens"]


# ---- commands --------------------------------------------------------------------------------------------------------

TEXTS = [*SCRIPTS, *MANIFESTS, LAUNCH / "Dockerfile", LAUNCH / "README.md", ROOT / "docs" / "clusters.md"]
# The launchers pass their arguments on to `lens-jax train`.
COMMAND = re.compile(r"(?:lens-jax|(launch/slurm\.sh|launch/tpu_vm\.sh train)) +([^\n`]+)")


def commands(path: Path) -> list[list[str]]:
    """Every lens-jax command line of a file, as arguments."""
    text = path.read_text()
    if path.suffix == ".yaml":
        jobset = yaml.safe_load(text)
        (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        # A shell script is one argument, and holds line breaks; a plain command is many.
        text = " ".join(container["args"])
    found = []
    for launcher, rest in COMMAND.findall(text.replace("\\\n", " ")):
        # Up to what the shell takes for itself.
        rest = re.split(r"(?:^|\s)(?:[|&;]|\d?[<>])", rest)[0]
        found.append(["train"] * bool(launcher) + shlex.split(rest, comments=True))
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_exist(path):
    for words in commands(path):
        if words and re.fullmatch(r"[a-z]+", words[0]):
            assert words[0] in cli.COMMANDS, words


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_train_options_exist(path):
    lines = [words[1:] for words in commands(path) if words[:1] == ["train"]]
    if path.name in ("slurm.sh", "gke_h100.yaml", "gke_tpu.yaml", "tpu_vm.sh", "with_flags.sh", "clusters.md"):
        assert lines, "no train command found"
    for words in lines:
        if not words or words[0].startswith(("$", "...", "CONFIG")):
            words = ["quickstart", *words[1:]]
        name = "quickstart" if words[0].endswith(".py") else words[0]
        # What the caller passes on.
        options = [word for word in words[1:] if word not in ("$@", "$arguments", "...")]
        if "mesh" not in {field.name for field in dataclasses.fields(TrainConfig)}:
            options = [option for option in options if not option.startswith("--mesh.")]
        cli.parse(TrainConfig, options, "lens-jax train", default=config_files.load(name, TrainConfig))


# ---- what the scripts do ---------------------------------------------------------------------------------------------


def stand_in(folder: Path, name: str, script: str) -> None:
    """A program that stands in for one of the cluster's."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def run_script(tmp_path: Path, *words: str, **environ: str) -> subprocess.CompletedProcess:
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)} | environ
    return subprocess.run(list(words), cwd=ROOT, env=environ, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("platform", "variable"), [("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")])
def test_with_flags(tmp_path, platform, variable):
    cache = str(tmp_path / "cache")
    script = str(LAUNCH / "with_flags.sh")
    show = f'printf "%s\\n" "${variable}" "$JAX_COMPILATION_CACHE_DIR"'
    given = {variable: "--mine=1", "JAX_COMPILATION_CACHE_DIR": cache}
    done = run_script(tmp_path, script, platform, "bash", "-c", show, **given)
    assert done.returncode == 0, done.stderr
    used, folder = done.stdout.splitlines()
    assert used.split() == [*flags(f"{platform}.txt"), "--mine=1"]
    assert folder == cache
    assert Path(cache).is_dir()
    assert run_script(tmp_path, script, "abacus", "true").returncode == 2


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (130, False), (143, True)])
def test_slurm_queues_again_what_was_stopped(tmp_path, code, requeued):
    stand_in(tmp_path, "srun", f'printf "%s\\n" "$@" >"{tmp_path}/srun.log"; exit {code}')
    stand_in(tmp_path, "scontrol", f'echo "$@" >"{tmp_path}/scontrol.log"')
    arguments = ["my/run.py", "--steps", "7"]
    done = run_script(tmp_path, "bash", str(LAUNCH / "slurm.sh"), *arguments, SLURM_JOB_ID="42", LENS_DATA="d")
    assert done.returncode == code, done.stderr
    started = (tmp_path / "srun.log").read_text().split()
    assert started[2:] == [
        "launch/with_flags.sh", "gpu", "lens-jax", "train", "my/run.py", "--out", "runs/run", "--data.path", "d",
        "--steps", "7",
    ]  # fmt: skip
    log = tmp_path / "scontrol.log"
    assert log.exists() == requeued
    if requeued:
        assert log.read_text() == "requeue 42\n"


def test_tpu_vm_starts_and_stops_the_same_process(tmp_path):
    # A host: the command of `gcloud ... ssh --command` runs in a home with lens-jax in it.
    host = tmp_path / "home" / "lens-jax"
    (host / ".venv" / "bin").mkdir(parents=True)
    (host / ".venv" / "bin" / "activate").write_text("")
    shutil.copytree(LAUNCH, host / "launch")
    stand_in(
        tmp_path, "gcloud",
        f'cd "{host.parent}"; for word in "$@"; do [[ $word == --command=* ]] && bash -c "${{word#--command=}}"; done',
    )  # fmt: skip
    stand_in(
        tmp_path, "lens-jax",
        'trap "echo saved; exit 143" TERM; printf "%s\\n" "$LENS_DISTRIBUTED" "$@"; while :; do sleep 0.05; done',
    )  # fmt: skip
    script = str(LAUNCH / "tpu_vm.sh")
    place = {"TPU_NAME": "lens", "ZONE": "z"}
    done = run_script(tmp_path, script, "train", "quickstart", "--out", "a folder", **place)
    assert done.returncode == 0, done.stderr
    log = host / "train.log"
    _until(lambda: "a folder" in log.read_text())
    assert log.read_text().splitlines() == ["1", "train", "quickstart", "--out", "a folder"]
    assert run_script(tmp_path, script, "stop", **place).returncode == 0
    _until(lambda: log.read_text().endswith("saved\n"))
    assert run_script(tmp_path, script, "fly", **place).returncode == 2


def _until(condition) -> None:
    """Another process needs its time; a minute is far more than it takes."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")
