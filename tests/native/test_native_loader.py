"""Which compiled libraries are ever loaded."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from iterative_sft_cli import native

LIBRARIES = ("decoding", "training")
assert torch.get_num_threads(), "whose threads the libraries share"
BUILT = [name for name in LIBRARIES if native.load(name, 1) is not None]
"""Those that this machine's compiler can make; the training kernels need one that knows OpenMP."""
needs_compiler = pytest.mark.skipif(native.load("decoding", 1) is None, reason="no C compiler here")


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of this user, into which libraries are compiled fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ["-O0", "-fPIC"])
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


@pytest.mark.parametrize("name", BUILT)
def test_a_library_is_compiled_once_and_for_this_user_only(cache_home: Path, name: str) -> None:
    assert native.load(name, 1) is not None
    (made,) = (cache_home / "isft").glob("*.so")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700 and stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    before = made.stat().st_mtime_ns
    native.load.cache_clear()
    again = native.load(name, 1)
    assert again is not None and made.stat().st_mtime_ns == before
    assert native.fingerprint(again) == made.stem and made.stem.startswith(f"{name}-")


@needs_compiler
@pytest.mark.parametrize("how", ["writable", "link"])
def test_a_library_that_others_could_have_made_is_made_again(cache_home: Path, how: str) -> None:
    native.load("decoding", 1)
    (made,) = (cache_home / "isft").glob("*.so")
    inode = made.stat().st_ino
    if how == "writable":
        made.unlink()  # what is loaded from it stays as it is
        made.write_bytes(b"not ours")
        made.chmod(0o777)
    else:
        made.rename(cache_home / "elsewhere.so")
        made.symlink_to(cache_home / "elsewhere.so")
    native.load.cache_clear()
    assert native.load("decoding", 1) is not None
    assert not made.is_symlink() and made.stat().st_ino != inode and stat.S_IMODE(made.stat().st_mode) == 0o700


@needs_compiler
def test_a_folder_that_others_may_write_to_is_not_used(cache_home: Path) -> None:
    (cache_home / "isft").mkdir()
    (cache_home / "isft").chmod(0o777)
    assert native.load("decoding", 1) is not None
    assert not list((cache_home / "isft").iterdir())


@needs_compiler
def test_a_library_is_made_anew_when_its_sources_or_what_they_share_changed(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = cache_home / "sources"
    (sources / "small").mkdir(parents=True)
    (sources / "shared.h").write_text("#define VERSION 1\n")
    (sources / "small" / "one.c").write_text(
        '#include "../shared.h"\nlong isft_small_version(void) { return VERSION; }\n'
    )
    monkeypatch.setattr(native, "SOURCES", sources)
    assert native.load("small", 1) is not None
    (sources / "shared.h").write_text("#define VERSION 2\n")
    assert native.load("small", 2) is not None
    assert native.load("small", 3) is None


@pytest.mark.parametrize("broken", ["exit 1", ":", "false --version"])
def test_without_a_working_compiler_there_is_none(
    cache_home: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = cache_home / "cc"
    compiler.write_text(f"#!/bin/sh\n{broken}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert all(native.fingerprint(native.load(name, 1)) is None for name in LIBRARIES)


@pytest.mark.parametrize("change", [{"ISFT_NATIVE": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}], ids=str)
def test_where_there_are_no_kernels_none_are_loaded(
    cache_home: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert all(native.load(name, 1) is None for name in LIBRARIES)


@needs_compiler
def test_a_compiler_with_arguments(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('cc') or shutil.which('gcc')} -g0")
    assert native.load("decoding", 1) is not None


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_of_another_version_is_not_used(name: str) -> None:
    assert native.load(name, 99) is None


def test_the_wheel_holds_the_sources() -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")
    root = native.SOURCES.parents[1]
    files = {f.distribution_path for f in builder.WheelBuilder(str(root)).recurse_included_files()}
    sources = {str(path.relative_to(root)) for path in native.SOURCES.rglob("*.[ch]")}
    assert "iterative_sft_cli/native/decoding/kernels.c" in sources and sources <= files


@pytest.mark.skipif(sys.platform == "win32" or os.name != "posix", reason="asks the C compiler")
@pytest.mark.parametrize("name", BUILT)
def test_the_sources_have_no_warnings(name: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    command = [str(compiler), "-O2", "-march=native", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fsyntax-only"]
    command += [*native.FLAGS_OF.get(name, []), *map(str, (native.SOURCES / name).glob("*.c"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
