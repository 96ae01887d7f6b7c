"""Whether a directory lies on a file system of another machine."""

from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
REMOTE = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "afs", "coda", "ncpfs"),
        *("lustre", "gpfs", "beegfs", "ceph", "glusterfs", "pvfs2", "orangefs", "ocfs2", "gfs", "gfs2", "juicefs"),
        *("sshfs", "s3fs", "gcsfuse", "rclone", "goofys", "davfs", "davfs2", "blobfuse", "blobfuse2", "hdfs"),
    )
)
"""Types of file systems whose files others may change, or whose server may be away; below `fuse.` as well."""


def remote_type(directory: Path, mounts: Path | None = None) -> str | None:
    """The type of the file system that holds `directory`, if it is a remote one; None where that cannot be told."""
    try:
        table = (mounts or MOUNTS).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # no Linux, or no /proc
        return None
    path = directory.resolve()
    found, longest = "", -1
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_unescaped(before.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= longest:  # of two mounts on one point the later is seen
            found, longest = after.split()[0], len(point.parts)
    return found if found.removeprefix("fuse.") in REMOTE else None


def _unescaped(text: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text
