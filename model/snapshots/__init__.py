"""Snapshots of a training run: written by many processes onto a shared file system, whole or not at all.

Rank 0 calls `attempt.begin`; every process writes its files with `shard_file.write_shard`; rank 0 calls
`attempt.commit` with what they returned. A run that resumes calls `history.open_newest`, and each process reads the
tensors that it needs with `Snapshot.tensors`, whoever wrote them. `layout` shows what lies where.
"""
