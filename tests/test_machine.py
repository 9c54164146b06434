"""Free memory of a machine, of a container and of a batch job."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunetv2_e2enet import machine
from nnunetv2_e2enet.machine import free_bytes

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 5\ntotal_active_file 10\nactive_file 999\n")
V2 = ("memory.max", "memory.current", "inactive_file 5\nactive_file 10\nanon 999\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 1,024,000 free bytes and no control groups."""
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 1000 kB\n")
    return tmp_path


def add_group(folder: Path, files: tuple[str, str, str], limit: str, used: int) -> None:
    folder.mkdir(parents=True)
    (folder / files[0]).write_text(f"{limit}\n")
    (folder / files[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(files[2])


def test_a_system_without_groups(system: Path) -> None:
    assert free_bytes() == 1_024_000
    (system / "meminfo").write_text("MemTotal: 4000 kB\nMemFree: 1000 kB\n")
    assert free_bytes() == float("inf")
    (system / "meminfo").unlink()
    assert free_bytes() == float("inf")


@pytest.mark.parametrize(("files", "line", "root"), [(V1, "4:memory:/slurm/job", "memory"), (V2, "0::/slurm/job", "")])
def test_the_lowest_limit_of_all_groups_counts(system: Path, files: tuple[str, str, str], line: str, root: str) -> None:
    """Pages of files are free."""
    (system / "cgroup").write_text(f"9:name=systemd:/\n8:pids:/slurm/job\n{line}\n")
    job = system / "groups" / root / "slurm" / "job"
    add_group(job, files, "2000", 300)
    assert free_bytes() == 2000 - 300 + 15
    add_group(job.parent / "another", files, "100", 99)
    assert free_bytes() == 1715
    for name, value in zip((*files[:2], "memory.stat"), ("1800", "400", files[2]), strict=True):
        (job.parent / name).write_text(value)
    assert free_bytes() == 1800 - 400 + 15
    (job / files[0]).write_text("max")
    (job.parent / files[0]).write_text("9223372036854771712")
    assert free_bytes() == 1_024_000


def test_a_group_that_a_container_does_not_see(system: Path) -> None:
    """The container's own limit is that of the root that it sees."""
    (system / "cgroup").write_text("0::/docker/0123\n")
    add_group(system / "groups", V2, "2000", 300)
    assert free_bytes() == 1715
