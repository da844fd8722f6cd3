"""How much memory a process may take: the files of control groups are written as kernels and containers write them."""

from pathlib import Path

import psutil
import pytest

from actors.memory import MemoryLimit, available_memory, memory_limits, total_memory

GIB = 1 << 30
NO_LIMIT = 9223372036854771712  # what version 1 writes where there is none


class Machine:
    """A machine with 2,000 GiB, of which 1,500 are free."""

    total, available = 2000 * GIB, 1500 * GIB


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", Machine)


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_a_container_of_version_2_sees_its_own_limit_at_the_root(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    root = write(tmp_path, {
        "proc/self/cgroup": "0::/", f"{group}/memory.max": 256 * GIB, f"{group}/memory.current": 100 * GIB,
        f"{group}/memory.stat": f"anon {50 * GIB}\nfile {50 * GIB}\ninactive_file {40 * GIB}\nactive_file 0",
    })  # fmt: skip
    assert memory_limits(root) == [MemoryLimit(256 * GIB, 60 * GIB)]
    assert (available_memory(root), total_memory(root)) == (196 * GIB, 256 * GIB)


def test_the_tightest_of_the_groups_around_a_process_counts(tmp_path: Path) -> None:
    outer, inner = "sys/fs/cgroup/system.slice", "sys/fs/cgroup/system.slice/job"
    root = write(tmp_path, {
        "proc/self/cgroup": "0::/system.slice/job", f"{inner}/memory.max": "max", f"{inner}/memory.current": 10 * GIB,
        f"{inner}/memory.stat": "inactive_file 0", f"{outer}/memory.max": 64 * GIB, f"{outer}/memory.current": 60 * GIB,
        f"{outer}/memory.stat": "anon 0",
    })  # fmt: skip
    assert memory_limits(root) == [MemoryLimit(64 * GIB, 60 * GIB)]
    assert (available_memory(root), total_memory(root)) == (4 * GIB, 64 * GIB)


def test_a_container_of_version_1_is_found_though_its_name_is_that_of_the_host(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    root = write(tmp_path, {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/kubepods/pod7\n0::/", f"{group}/memory.limit_in_bytes": 32 * GIB,
        f"{group}/memory.usage_in_bytes": 20 * GIB, f"{group}/memory.stat": f"inactive_file 7\ntotal_inactive_file {4 * GIB}",
    })  # fmt: skip
    assert (available_memory(root), total_memory(root)) == (16 * GIB, 32 * GIB)


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    root = write(tmp_path, {
        "proc/self/cgroup": "4:memory:/", f"{group}/memory.limit_in_bytes": NO_LIMIT, f"{group}/memory.usage_in_bytes": GIB,
        f"{group}/memory.stat": "total_inactive_file 0",
    })  # fmt: skip
    assert (available_memory(root), total_memory(root)) == (1500 * GIB, 2000 * GIB)
    assert memory_limits(tmp_path / "nothing") == []
    assert available_memory(tmp_path / "nothing") == 1500 * GIB


def test_a_group_that_holds_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    root = write(tmp_path, {
        "proc/self/cgroup": "0::/", f"{group}/memory.max": GIB, f"{group}/memory.current": 2 * GIB, f"{group}/memory.stat": "",
    })  # fmt: skip
    assert available_memory(root) == 0


def test_this_process_reads_its_own_files() -> None:
    assert 0 < available_memory() <= total_memory() <= Machine.total
