"""What the benchmarks measure with: clocks and memory."""

from __future__ import annotations

import time
from pathlib import Path

#: Seconds passed, or of processor time of this process.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
