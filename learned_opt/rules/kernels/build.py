"""C++ sources compiled for this machine's processor, and kept in a cache folder.

The compiler is the environment's CXX, else the first of c++, g++ and clang++ that is found. A library's name holds a
digest of all that it was built from (source, settings, compiler, processor), and one of its own bytes: a file that
was damaged is not loaded but built again. Processes that build at the same time each put a whole file in place.

LEARNED_OPT_CACHE names the cache folder; by default it is `learned_opt` in XDG_CACHE_HOME or ~/.cache. Where it cannot
be written, or nothing in it may be executed, a temporary folder serves, and every process compiles anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# From the fastest to what every compiler takes.
_MACHINE = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
_PATIENCE = 300
"""Seconds after which a compiler is given up."""


class NativeWarning(UserWarning):
    """A C++ compiler was found and failed: plain torch does the work, more slowly."""


def load(source: Path, defines: Sequence[str]) -> ctypes.CDLL | None:
    """The library that the source compiles to, built unless it is there already.

    Args:
        source: the C++ file.
        defines: the compiler's arguments beside those that are always given.

    Returns:
        The library; None without a compiler.

    Warns:
        NativeWarning: there is a compiler, but no library; None is returned.
    """
    try:
        compiler = _compiler()
        return _open(compiler, source, defines) if compiler else None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"{source.stem} could not be built or loaded ({error}); plain torch does its work, more slowly. Set "
            "LEARNED_OPT_NATIVE=0 to leave it out without this warning",
            NativeWarning,
            stacklevel=2,
        )
        return None


def cache_folder() -> Path | None:
    """Where built libraries are kept; None if there is no home to put it in."""
    chosen = os.environ.get("LEARNED_OPT_CACHE")
    if chosen:
        return Path(chosen)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "learned_opt"
    try:
        return Path.home() / ".cache" / "learned_opt"
    except RuntimeError:
        return None


def _compiler() -> list[str] | None:
    """The command that compiles C++."""
    named = os.environ.get("CXX")
    if named:  # may hold arguments, as in "ccache g++"
        program, *arguments = shlex.split(named)
        found = shutil.which(program)
        if found is None:
            raise RuntimeError(f"the environment's CXX names {named!r}, which is not found")
        return [found, *arguments]
    return next(([found] for found in map(shutil.which, ("c++", "g++", "clang++")) if found), None)


def _open(compiler: list[str], source: Path, defines: Sequence[str]) -> ctypes.CDLL:
    key = hashlib.sha256(source.read_bytes())
    for part in (*compiler, _version(compiler), _processor(), *_FLAGS, *defines):
        key.update(part.encode() + b"\0")
    stem, folder = f"{source.stem}-{key.hexdigest()[:24]}", cache_folder()
    if folder is not None:
        try:
            kept = _kept(folder, stem)
            if kept is not None:
                return ctypes.CDLL(str(kept))
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                made = _compile(compiler, source, defines, place)
                target = folder / f"{stem}-{_digest(made)}.so"
                os.replace(made, target)
            return ctypes.CDLL(str(target))
        except OSError:  # the folder cannot be written, or what lies there cannot be executed
            pass
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        return ctypes.CDLL(str(_compile(compiler, source, defines, place)))


def _kept(folder: Path, stem: str) -> Path | None:
    """The library of this stem whose bytes are what its name says; others are removed."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.stem == f"{stem}-{_digest(path)}":
            return path
        path.unlink()
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _compile(compiler: list[str], source: Path, defines: Sequence[str], place: str) -> Path:
    """Compile with the fastest settings that the compiler takes, to a file in this folder."""
    made, reason = Path(place) / "library.so", ""
    for machine in _MACHINE:
        command = [*compiler, *_FLAGS, *machine, *defines, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
        if done.returncode == 0:
            return made
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
    raise RuntimeError(f"{shlex.join(compiler)}: {reason}")


def _version(compiler: list[str]) -> str:
    command = [*compiler, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    return done.stdout.partition("\n")[0]


def _processor() -> str:
    """What tells processors apart: a library built on one must not run on another that shares the cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        import platform

        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
