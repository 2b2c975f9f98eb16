"""What can be rented: memory, speed and networks of a device, with where each number is from.

The peak rates are those of `flops.peak`. Bandwidths are what one device sends while it receives as much; makers' sheets
often add both directions.
"""

import dataclasses
from typing import Literal

from lens_jax import flops

Name = Literal["h100", "h200", "a100-80", "a100-40", "v4", "v5e", "v5p", "v6e"]
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device."""

    # As `flops.peak` knows it.
    kind: str
    # What programs are lowered for.
    platform: Literal["cuda", "tpu"]
    # Bytes of memory, and the share that XLA's pool gets.
    memory: float
    pool: float
    # Devices that the fast network joins: a node of GPUs, a whole pod of TPUs.
    domain: int
    # Bytes a second that a device sends: within the domain, and to other domains.
    fast: float
    slow: float
    # Bytes a second to the memory of the host, and as many back.
    host: float

    @property
    def peak(self) -> float:
        """Dense bfloat16 operations a second."""
        return flops.peak(self.kind)

    @property
    def usable(self) -> float:
        """Bytes that a program can have."""
        return self.pool * self.memory


# launch/with_flags.sh leaves 8 % of a GPU to NCCL and cuDNN.
_GPU_POOL = 0.92
# The smallest share in the compiler's own messages: 30.75 of 32 GiB on v4, 15.75 of 16 on v5e, 31.25 of 32 on v6e.
_TPU_POOL = 0.96

# To the host: PCIe 5.0 x16 (H100, H200) and 4.0 x16 (A100); of TPUs, which Google does not state, what the JAX scaling
# book (jax-ml.github.io/scaling-book/tpus) has.
HARDWARE: dict[Name, Hardware] = {
    # nvidia-smi shows 81,559 MiB. NVLink 900 GB/s both ways (H100 data sheet); one 400 Gb/s ConnectX-7 a GPU (DGX H100
    # user guide).
    "h100": Hardware("h100", "cuda", 79.6 * _GIB, _GPU_POOL, 8, 450e9, 50e9, 64e9),
    # nvidia-smi shows 143,771 MiB; networks as the H100's (H200 and DGX H200 data sheets).
    "h200": Hardware("h200", "cuda", 140.4 * _GIB, _GPU_POOL, 8, 450e9, 50e9, 64e9),
    # NVLink 600 GB/s both ways (A100 data sheet); one 200 Gb/s ConnectX-6 a GPU (DGX A100 user guide).
    "a100-80": Hardware("a100", "cuda", 80 * _GIB, _GPU_POOL, 8, 300e9, 25e9, 32e9),
    "a100-40": Hardware("a100", "cuda", 40 * _GIB, _GPU_POOL, 8, 300e9, 25e9, 32e9),
    # cloud.google.com/tpu/docs/v4: 32 GiB, 4,096 chips a pod, whose all-reduce moves 1.1 PB/s. The data centre's share
    # of a chip is not stated; v5p's is taken.
    "v4": Hardware("v4", "tpu", 32 * _GIB, _TPU_POOL, 4096, 1.1e15 / 4096, 50e9 / 8, 16e9),
    # cloud.google.com/tpu/docs/v5e: 16 GB, 256 chips a pod, 400 GB/s both ways, 6.4 Tb/s to the data centre a pod.
    "v5e": Hardware("v5e", "tpu", 16 * _GIB, _TPU_POOL, 256, 200e9, 6.4e12 / 8 / 256, 16e9),
    # cloud.google.com/tpu/docs/v5p: 95 GiB, 8,960 chips a pod, 1,200 GB/s both ways, 50 Gb/s to the data centre a chip.
    "v5p": Hardware("v5p", "tpu", 95 * _GIB, _TPU_POOL, 8960, 600e9, 50e9 / 8, 16e9),
    # cloud.google.com/tpu/docs/v6e: 32 GB, 256 chips a pod, 800 GB/s both ways, 25.6 Tb/s to the data centre a pod.
    "v6e": Hardware("v6e", "tpu", 32 * _GIB, _TPU_POOL, 256, 400e9, 25.6e12 / 8 / 256, 32e9),
}
