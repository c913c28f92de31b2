"""Where results are written: whole files, and a folder for one run at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from common import BadInput
from engine.processes import gather, print_once, rank_and_world

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into. A crash leaves either the whole old file or the whole new one.

    Raises BadInput with the reason if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(e, (OSError, RuntimeError)):
            raise cannot_write(path, e) from e
        raise
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the rename survives a crash
        os.close(folder)


def cannot_write(path: Path, error: BaseException) -> BadInput:
    """The error to raise, with the system's reason, which torch's writer hides."""
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, OSError):
        reason = reason.__context__
    why = getattr(reason, "strerror", None) or str(reason or error).splitlines()[0]
    return BadInput(f"{path}: cannot write it: {why}")


def check_folder(out: Path) -> None:
    """Raise BadInput if results cannot be written there, before hours are spent on them."""
    try:
        if Path.cwd().is_relative_to(out.resolve()):
            raise BadInput(f"--out {out}: the folder that you are in is no place for results")
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
        raise BadInput(f"--out {out}: cannot write there: {getattr(e, 'strerror', e)}") from e


# ------------------------------------------------------------------------------ locks


_locks: list[IO[str]] = []  # the locks that this process holds


def lock(folder: Path) -> IO[str]:
    """Take the folder's lock until `unlock`; raise BadInput if another run holds it.

    The system releases the lock when this process dies, however it dies.
    """
    path = folder / ".lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip()
            file.close()
            raise BadInput(
                f"--out {folder}: another run (process {who}) writes there; wait until it has "
                "ended, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system that has no locks
        with contextlib.suppress(OSError):  # another run may have moved it
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _locks.append(file)
    return file


def unlock(file: IO[str], folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)
    _locks.remove(file)
    file.close()


def leave_locks() -> None:
    """Close the locks in a forked process, which could hold them after its parent's death."""
    for file in _locks:
        file.close()
    _locks.clear()


@contextlib.contextmanager
def sole_writer(out: Path, set_aside_if: str = "") -> Iterator[None]:
    """Lock this folder while the block runs; raise BadInput if another run holds the lock.

    If the folder has a file named `set_aside_if` from an earlier run, the folder is
    renamed first, so that nothing is overwritten.
    """
    problem, file = "", None
    if rank_and_world()[0] == 0:
        try:
            file = lock(out)
            if set_aside_if and (out / set_aside_if).exists():
                names = (out.with_name(f"{out.name}-{i}") for i in itertools.count(1))
                older = next(name for name in names if not name.exists())
                out.rename(older)
                print_once(f"moved the earlier run to {older}")
                unlock(file, older)
                file = lock(out)
        except BadInput as e:
            problem = str(e)
        except OSError as e:
            problem = f"--out {out}: cannot write there: {e.strerror}"
    problem = gather(problem)[0]  # the other processes wait for the first one
    if problem:
        raise BadInput(problem)
    try:
        yield
    finally:
        if file:
            unlock(file, out)
