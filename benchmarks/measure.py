"""What the benchmarks measure with: clocks and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Seconds passed, or of processor time of this process.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def waited(call: Callable[[], Any], clock: str, device: torch.device) -> tuple[Any, float]:
    """What a call gives, and its seconds once the device has done it."""
    start = CLOCKS[clock]()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, CLOCKS[clock]() - start


def memory(*, reset: bool = False) -> tuple[float, float]:
    """Resident memory now and at its peak, in MB; the peak since the last reset, on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        return peak, peak
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, peak = (float(lines[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM"))
    return now, peak
