"""Files that are either complete or absent: atomic writes, JSON with digests, folder locks."""

from __future__ import annotations

from kdfast.files.atomic import atomic_path, atomic_write, remove_stale
from kdfast.files.folders import FolderLock, check_writable, visible_entries
from kdfast.files.records import read_json, read_sealed, sha256_file, sha256_json, write_json, write_sealed

__all__ = [
    "FolderLock",
    "atomic_path",
    "atomic_write",
    "check_writable",
    "read_json",
    "read_sealed",
    "remove_stale",
    "sha256_file",
    "sha256_json",
    "visible_entries",
    "write_json",
    "write_sealed",
]
