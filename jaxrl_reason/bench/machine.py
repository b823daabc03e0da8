"""The machine that times are taken on, and how busy others keep it meanwhile."""

import os
import platform


def describe() -> dict[str, str | int | None]:
    """What times depend on."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(": ")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "cpus": os.cpu_count(), "python": platform.python_version()}


def busy_seconds() -> float | None:
    """CPU seconds of the whole machine since it started; None where the system does not say."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others_share(before: float | None, *, seconds: float, cpu_seconds: float) -> float:
    """The share of the machine that other processes took.

    Args:
        before: `busy_seconds` when the measurement began.
        seconds: that it took.
        cpu_seconds: of the process that was measured.
    """
    now = busy_seconds()
    if before is None or now is None:
        return 0.0
    return max(0.0, now - before - cpu_seconds) / (seconds * (os.cpu_count() or 1))
