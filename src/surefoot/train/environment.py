"""Where a run ran."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from surefoot._version import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, processor and threads as a flat JSON object."""
    info: dict[str, Any] = {
        "surefoot": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        info["accelerator"] = torch.cuda.get_device_name(device)
    return info


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
