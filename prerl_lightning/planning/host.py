"""What memory this host has. Nothing heavy is imported with this module."""

from pathlib import Path


def available_memory() -> int:
    """Bytes of host memory that this process may still take: of the machine, or of its container if that has less."""
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(info["MemAvailable"].split()[0]) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        files = [Path(limit), Path(used), Path(limit).with_name("memory.stat")]
        if all(f.is_file() for f in files) and (most := files[0].read_text().strip()) != "max":
            stat = dict(line.split() for line in files[2].read_text().splitlines())
            cached = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
            free = min(free, int(most) - int(files[1].read_text()) + cached)
    return free
