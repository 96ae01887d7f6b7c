"""Run directories on file systems of other machines are told by the table of mounts, and the log says so once."""

from pathlib import Path

import pytest

import jobs.network_disk
from jobs.generate_job import COMMAND
from jobs.launch import launch
from jobs.network_disk import MOUNTS, remote_type

TABLE = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
30 22 0:40 / /data rw,relatime shared:9 master:2 - nfs4 server:/export rw,vers=4.2
31 30 0:41 / /data/local rw - xfs /dev/vdb rw
32 22 0:42 / /data/local/far\040away rw - fuse.sshfs me@host:/ rw
33 22 0:43 /sub /over rw - ext4 /dev/vdc rw
34 33 0:44 / /over rw - cifs //server/share rw
35 22 0:45 / /cluster rw - lustre 10.0.0.1@tcp:/fs rw
36 22 0:46 / /container rw - overlay overlay rw
37 22 0:47 / /home/me/.cache/doc rw - fuse.portal portal rw
""".lstrip()


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("/outputs/run", None),
        ("/data/outputs/run", "nfs4"),
        ("/data", "nfs4"),
        ("/database/run", None),
        ("/data/local/run", None),
        ("/data/local/far away/run", "fuse.sshfs"),
        ("/over/run", "cifs"),
        ("/cluster/run", "lustre"),
        ("/container/run", None),
        ("/home/me/.cache/doc/run", None),
    ],
)
def test_the_longest_mount_point_above_a_directory_decides(tmp_path: Path, directory: str, expected: str | None):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(TABLE)
    assert remote_type(Path(directory), mounts) == expected


def test_a_link_leads_to_where_it_points(tmp_path: Path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / {tmp_path}/far rw - nfs b rw\n")
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    assert remote_type(tmp_path / "link" / "run", mounts) == "nfs"
    assert remote_type(tmp_path / "near", mounts) is None


def test_nothing_is_said_where_there_is_no_table(tmp_path: Path):
    assert remote_type(tmp_path, tmp_path / "missing") is None


def test_this_machine_has_a_table_that_can_be_read(tmp_path: Path):
    assert not MOUNTS.exists() or remote_type(tmp_path) is None or isinstance(remote_type(tmp_path), str)


@pytest.mark.parametrize("kind", ["nfs4", "ext4"])
def test_the_log_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - {kind} a rw\n")
    monkeypatch.setattr(jobs.network_disk, "MOUNTS", mounts)
    words = [f"hydra.run.dir={tmp_path / 'run'}", "reader.limit=2", "progress=off", "sampling.max_tokens=2"]
    assert launch(COMMAND, words) == 0
    warnings = [line for line in (tmp_path / "run/run.log").read_text().splitlines() if "[WARNING]" in line]
    assert len([line for line in warnings if f"{kind}, a network file system" in line]) == (kind == "nfs4")
