"""What a snapshot's reader or writer raises.

SnapshotError (a ValueError)
├── SnapshotBroken   it is damaged or incomplete on disk: an older one may do
└── DiskFull         there is no room to write it: earlier ones are intact
"""


class SnapshotError(ValueError):
    """The message names the file or directory, what is wrong and what to do."""


class SnapshotBroken(SnapshotError):
    """What is on disk is not what was written."""


class DiskFull(SnapshotError):
    """The file system, or the quota on it, has no room."""
