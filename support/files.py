"""files.py: files appear whole or not at all, and whatever the file system refuses becomes one sentence."""
import contextlib
import os
import shutil
from pathlib import Path


class InputError(Exception):
    """Something that the user gave cannot be used.  The message says what, where and what to type next."""


ELSEWHERE = ("free some disk space or choose another --runs folder, then run the same command again "
             "(finished work is kept)")


@contextlib.contextmanager
def writing(path, advice=ELSEWHERE):
    """Whatever the file system refuses inside becomes one sentence: what, where, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_atomic(path, write, advice=ELSEWHERE):
    """Call write(temporary path), then rename it to path: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    with writing(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def free_space(path):
    """Bytes that are free where `path` is, or will be."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(p for p in [path, *path.parents] if p.is_dir())).free


def replace_folder(temporary, out):
    """Put a finished folder in the place of an old one."""
    with writing(out):
        if out.is_symlink():                                # a variant's link to another run's recording
            out.unlink()
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
