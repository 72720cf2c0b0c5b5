"""What this CPU can do, as far as kernels are chosen by it."""

from __future__ import annotations

import platform

import torch


def cpu_features() -> str:
    """What of this CPU selects kernels: vendor and vector extensions, as the system names them."""
    features = {platform.machine(), torch.backends.cpu.get_cpu_capability()}
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:  # noqa: PTH123 - a stream of the kernel, not a file
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "vendor_id":
                    features.add(value.strip())
                elif key.strip() in {"flags", "Features"}:
                    prefixes = ("avx", "fma", "amx", "sse4", "asimd", "sve", "i8mm", "bf16")
                    features.update(flag for flag in value.split() if flag.startswith(prefixes))
                elif not line.strip():
                    break  # the first processor speaks for all
    except FileNotFoundError:  # not Linux: torch's own word for the CPU has to do
        features.add(platform.processor())
    return " ".join(sorted(features))
