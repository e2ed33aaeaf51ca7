"""Files that are either complete or absent: atomic writes, JSON with digests, folder locks."""

from __future__ import annotations

from kdfast.files.atomic import atomic_path, atomic_write, remove_stale
from kdfast.files.folders import FolderLock, check_unlocked, check_writable, make_subfolder, visible_entries
from kdfast.files.outputs import check_replaceable, delete_own
from kdfast.files.own import is_plain_name, open_own, refuse_links
from kdfast.files.records import (
    has_format,
    matches_seal,
    read_json,
    read_sealed,
    seal,
    sha256_file,
    sha256_json,
    without_seal,
    write_json,
    write_sealed,
)

__all__ = [
    "FolderLock",
    "atomic_path",
    "atomic_write",
    "check_replaceable",
    "check_unlocked",
    "check_writable",
    "delete_own",
    "has_format",
    "is_plain_name",
    "make_subfolder",
    "matches_seal",
    "open_own",
    "read_json",
    "read_sealed",
    "refuse_links",
    "remove_stale",
    "seal",
    "sha256_file",
    "sha256_json",
    "visible_entries",
    "without_seal",
    "write_json",
    "write_sealed",
]
