"""What `deterministic` asks for, on a backend that is not there."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

from lens_jax.errors import LensError
from lens_jax.pretraining import determinism


def test_a_cpu_needs_nothing(tiny_config):
    config = dataclasses.replace(tiny_config, deterministic=True)
    assert determinism.settle(config) is config


def test_on_a_gpu(tiny_config, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert determinism.settle(tiny_config) is tiny_config
    config = dataclasses.replace(tiny_config, deterministic=True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true")
    with pytest.raises(LensError, match="XLA has started without its flag; set XLA_FLAGS=--xla_gpu_deterministic_ops"):
        determinism.settle(config)
    determinism.set_flag()
    assert os.environ["XLA_FLAGS"].endswith("true --xla_gpu_deterministic_ops=true")
    assert determinism.settle(config).model.attention == "xla"
    cudnn = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="cudnn"))
    with pytest.raises(LensError, match=r"model\.attention cudnn adds in any order"):
        determinism.settle(cudnn)


def test_the_flag_is_one_that_xla_knows():
    """An unknown flag ends the process."""
    environ = os.environ | {"XLA_FLAGS": determinism.FLAG, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environ, check=True, timeout=120)
