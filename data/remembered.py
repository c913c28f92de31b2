"""Image files that were found good, remembered between runs: decoding all of COCO takes minutes.

The user's cache folder ($XDG_CACHE_HOME or ~/.cache) holds one file per data source, which may be
deleted at any time. After a header line it has 16 bytes per image: a hash of the path, and a hash
of everything that the verdict depends on. A torn or outdated record matches no image, so that
image is checked again.
"""

from __future__ import annotations

import contextlib
import os
from hashlib import blake2b
from pathlib import Path

import PIL

HEADER = b"two-task-detection: checked images 1\n"
HASH = 8  # bytes


def _hash(*values) -> bytes:
    return blake2b(repr(values).encode(), digest_size=HASH).digest()


def memory_of(source: str | Path) -> Path:
    """The cache file for the images of a data source. RuntimeError without a home folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # unset, or to be ignored according to the XDG specification
        cache = Path.home() / ".cache"
    name = _hash(os.path.abspath(source)).hex()
    return cache / "two-task-detection" / f"{name}.checked"


def evidence(file: str | Path, *conditions) -> tuple[bytes, bytes] | None:
    """(hash of the path, hash of all that a verdict on the file depends on); None if unreadable.

    `conditions` are those of the check. Another version of PIL may judge otherwise.
    """
    path = os.path.abspath(str(file))
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _hash(path), _hash(status.st_size, status.st_mtime_ns, PIL.__version__, *conditions)


def read_memory(source: str | Path) -> dict[bytes, bytes]:
    """The good files of a data source, as `evidence`; {} if their cache file cannot be read."""
    try:
        content = memory_of(source).read_bytes()
    except (OSError, RuntimeError):
        return {}
    if not content.startswith(HEADER):
        return {}
    starts = range(len(HEADER), len(content) - 2 * HASH + 1, 2 * HASH)
    return {content[i : i + HASH]: content[i + HASH : i + 2 * HASH] for i in starts}


def remember(source: str | Path, verdicts: dict[bytes, bytes]) -> None:
    """Add good files (b"": forget this one). The file is written whole or not at all.

    A cache folder that cannot be written is no error: the files are checked again next time.
    """
    records = {**read_memory(source), **verdicts}
    content = HEADER + b"".join(path + state for path, state in records.items() if state)
    with contextlib.suppress(OSError, RuntimeError):
        memory = memory_of(source)
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, memory)
        finally:
            temporary.unlink(missing_ok=True)
