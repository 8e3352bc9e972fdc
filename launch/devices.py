"""Devices that a run can be planned for: nominal figures of their makers, and which of them this machine has. No torch.

Not here: measured rates, whether a device works (`launch.doctor`).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from train.config import Precision

_GIB = 2**30
_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Device:
    """What one rank runs on.

    Attributes:
        name: As people say it.
        tflops: Nominal bfloat16 TFLOP/s, dense.
        float32_tflops: Nominal float32 TFLOP/s.
        memory_bytes: Of its own; None for a CPU, whose ranks share the machine's.
    """

    name: str
    tflops: float
    float32_tflops: float
    memory_bytes: int | None

    def peak(self, precision: Precision) -> float:
        """Nominal TFLOP/s in a run's training type."""
        return self.tflops if precision is Precision.bf16 else self.float32_tflops


DEVICES = {
    "a100-40": Device("NVIDIA A100 40 GB", 312, 19.5, 39 * _GIB),
    "a100-80": Device("NVIDIA A100 80 GB", 312, 19.5, 79 * _GIB),
    "a800": Device("NVIDIA A800 80 GB", 312, 19.5, 79 * _GIB),
    "h100": Device("NVIDIA H100 80 GB", 989, 67, 79 * _GIB),
    "h200": Device("NVIDIA H200 141 GB", 989, 67, 139 * _GIB),
    "b200": Device("NVIDIA B200 180 GB", 2250, 75, 178 * _GIB),
    "l40s": Device("NVIDIA L40S 48 GB", 362, 91.6, 44 * _GIB),
    "rtx4090": Device("NVIDIA RTX 4090 24 GB", 165, 82.6, 23 * _GIB),
    "cpu": Device("CPU, a thread with AVX512-BF16", 0.2, 0.05, None),
}
"""By the name that `--device` takes. GPU memory is what a process sees; the CPU's rate is one that oneDNN reaches."""

_MODELS = {
    r"A100-(SXM4|PCIE)-40GB": "a100-40",
    r"A100-SXM4-80GB|A100 80GB PCIe": "a100-80",
    r"A800-SXM4-80GB|A800 80GB PCIe": "a800",
    r"H100 80GB HBM3|H100 PCIe": "h100",
    r"H200": "h200",
    r"B200": "b200",
    r"L40S": "l40s",
    r"GeForce RTX 4090": "rtx4090",
}
"""By the whole name that the driver gives, less the maker's: a GH200, or a laptop's RTX 4090, is another device."""


def device_here(driver: Path = _DRIVER) -> tuple[str, int]:
    """Return the name in `DEVICES` of this machine's device and how many there are: GPUs, else cores.

    A GPU that `DEVICES` does not know goes by the name that its driver gives it.
    """
    models = [
        re.sub(r"^NVIDIA ", "", _model(path.read_text(errors="replace")))
        for path in sorted(driver.glob("*/information"))
    ]
    if not models:
        return "cpu", os.cpu_count() or 1
    return next((name for names, name in _MODELS.items() if re.fullmatch(names, models[0])), models[0]), len(
        models
    )


def device_memory_here(driver: Path = _DRIVER) -> int | None:
    """Return the memory of one of this machine's GPUs, also of one that `DEVICES` does not know; None without any."""
    if not list(driver.glob("*/information")):
        return None
    name, _ = device_here(driver)
    known = DEVICES[name].memory_bytes if name in DEVICES else None
    return known if known is not None else max(device.memory_bytes or 0 for device in DEVICES.values())


def _model(information: str) -> str:
    """The line of a driver's file that names the GPU's model."""
    found = re.search(r"^Model:\s*(.+?)\s*$", information, re.MULTILINE)
    return found[1] if found else "GPU of unknown model"


def memory_here(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the bytes of this machine's memory, or of the container's share."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(limit.read_text()))
    except (OSError, ValueError):  # none, or "max"
        return physical


def available_here() -> int:
    """Return the bytes of memory that are free, or can be freed, on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
