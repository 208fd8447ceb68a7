"""`--workers auto` under CPU quotas."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.supervisor.cpus import count_cpus

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct"


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))


class System:
    def __init__(self, root: Path, cgroup: str, *mounts: str) -> None:
        self.root = root
        for name, text in (
            ("cgroup", cgroup),
            ("mountinfo", "\n".join(["23 1 8:1 / / rw - ext4 /dev/sda rw", *mounts])),
        ):
            self.write(f"/proc/self/{name}", text + "\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def limit(self, folder: str, quota: str, period: int = 100_000) -> None:
        if "cpu,cpuacct" in folder:
            self.write(f"{folder}/cpu.cfs_quota_us", f"{quota}\n")
            self.write(f"{folder}/cpu.cfs_period_us", f"{period}\n")
        else:
            self.write(f"{folder}/cpu.max", f"{quota} {period}\n")

    def count(self) -> int:
        return count_cpus(str(self.root))


def test_without_control_groups_it_is_the_affinity(tmp_path: Path) -> None:
    assert count_cpus(str(tmp_path)) == 16


def test_a_systemd_unit_with_a_quota(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/system.slice/app.service", V2)
    system.limit("/sys/fs/cgroup/system.slice", "max")
    assert system.count() == 16
    system.limit("/sys/fs/cgroup/system.slice/app.service", "250000")
    assert system.count() == 3
    system.limit("/sys/fs/cgroup/system.slice/app.service", "1000")
    assert system.count() == 1
    system.limit("/sys/fs/cgroup/system.slice/app.service", "6400000")
    assert system.count() == 16


def test_a_quota_of_a_slice_above(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/a.slice/a-b.slice/app.service", V2)
    system.limit("/sys/fs/cgroup/a.slice", "200000")
    system.limit("/sys/fs/cgroup/a.slice/a-b.slice", "max")
    system.limit("/sys/fs/cgroup/a.slice/a-b.slice/app.service", "400000")
    assert system.count() == 2


def test_version_1(tmp_path: Path) -> None:
    system = System(tmp_path, "4:memory:/other\n2:cpu,cpuacct:/system.slice/app.service\n0::/elsewhere", V1)
    folder = "/sys/fs/cgroup/cpu,cpuacct"
    system.limit(folder + "/system.slice/app.service", "-1")
    assert system.count() == 16
    system.limit(folder + "/system.slice", "150000", 50_000)
    assert system.count() == 3
    system.limit(folder + "/other", "50000")  # not ours
    assert system.count() == 3


def test_version_1_and_2_beside_each_other(tmp_path: Path) -> None:
    unified = V2.replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw")
    system = System(tmp_path, "2:cpu,cpuacct:/app\n0::/app", V1, unified)
    system.limit("/sys/fs/cgroup/cpu,cpuacct/app", "300000")
    assert system.count() == 3


def test_a_container_that_sees_its_part_alone_by_names_of_the_whole(tmp_path: Path) -> None:
    system = System(tmp_path, "2:cpu,cpuacct:/docker/abc/in", V1.replace("0:29 / ", "0:29 /docker/abc "))
    system.limit("/sys/fs/cgroup/cpu,cpuacct", "200000")
    system.limit("/sys/fs/cgroup/cpu,cpuacct/in", "400000")
    assert system.count() == 2


@pytest.mark.parametrize(
    ("own", "top"), [("/", "/"), ("/", "/../.."), ("/../other", "/"), ("/docker/abc", "/docker/x")]
)
def test_a_namespace_in_which_the_names_do_not_fit(tmp_path: Path, own: str, top: str) -> None:
    system = System(tmp_path, f"0::{own}", V2.replace("0:28 / ", f"0:28 {top} "))
    system.limit("/sys/fs/cgroup", "200000")
    system.limit("/sys/fs/other", "100000")
    assert system.count() == 2


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/app", V2.replace("/sys/fs/cgroup", r"/my\040groups"))
    system.limit("/my groups/app", "200000")
    assert system.count() == 2


@pytest.mark.slow
@given(texts=st.lists(st.text(st.sampled_from(" -:/.,\n0189cgroupxma2\\"), max_size=80), min_size=3, max_size=3))
def test_any_text_is_a_number_of_cpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    root = tmp_path_factory.getbasetemp() / "any-cpus"
    system = System(root, texts[0], texts[1], V2)
    system.write("/sys/fs/cgroup/cpu.max", texts[2])
    assert 1 <= system.count() <= 16


@contextlib.contextmanager
def real_group(quota: int) -> Iterator[str]:
    """The file by which processes join a group with a quota, in a group without one."""
    for top, file, text in (
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", str(quota)),
        ("/sys/fs/cgroup", "cpu.max", f"{quota} 100000"),
    ):
        outer = f"{top}/gtcpserver-test-{os.getpid()}"
        try:
            os.mkdir(outer)
        except OSError:
            continue
        try:
            with contextlib.suppress(OSError):
                Path(outer, "cgroup.subtree_control").write_text("+cpu")
            os.mkdir(f"{outer}/inner")
            Path(outer, file).write_text(text)
            yield f"{outer}/inner/cgroup.procs"
            return
        except OSError:
            continue
        finally:
            for folder in (f"{outer}/inner", outer):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
    pytest.skip("no control groups here that may be limited")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_real_group() -> None:
    with real_group(100_000) as procs:
        program = (
            "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
            "os.sched_getaffinity = lambda pid: range(16);"
            "from gtcpserver.supervisor.cpus import count_cpus; print(count_cpus())"
        )
        done = subprocess.run([sys.executable, "-c", program, procs], capture_output=True, text=True, check=False)
        assert done.stdout == "1\n", done.stderr
