"""The kernels in ``kernels/``: compiled for this machine's processor when first needed, kept, and loaded.

A few files of C++ and the compiler that ``torch.compile`` needs too; some seconds, once per machine. They are written
against PyTorch's stable interface, so that what was compiled stays valid when PyTorch is replaced by another release.

Where the processor lacks the instructions, or there is no compiler, PyTorch's own kernels serve, and one line on
standard error says so. Only the standard library is imported before the kernels are loaded: the compiler can be at work
while torch is still being imported (``start``).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

SOURCES = sorted(Path(__file__).with_name("kernels").iterdir())
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
OPTIONAL = ("avx512_bf16",)


class Unavailable(Exception):
    """There are no kernels for this machine; the message says why."""


@cache
def load() -> bool:
    """Load the kernels, compiled now if they never were. Says on standard error why not, once, if that is so."""
    try:
        library = built()
        import torch

        from axon_llm.fast import ops  # noqa: F401 - declares the operators that the library implements

        torch.ops.load_library(str(library))
    except (Unavailable, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        print(f"axon: PyTorch's own kernels are used, which are slower: {reason}", file=sys.stderr)  # noqa: T201
        return False
    return True


def start() -> None:
    """Begin to compile in another process, if that is still to be done; ``load`` then waits for it."""
    with contextlib.suppress(Unavailable, OSError):
        if not _library(_flags()).exists():
            subprocess.Popen([sys.executable, "-m", __name__], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def built() -> Path:
    """The compiled library; compiles it if it is not there.

    Raises:
        Unavailable: the processor or the compiler is missing, or the compiler fails.
    """
    flags = _flags()
    library = _library(flags)
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler (install g++)")
    torch_folder = _torch_folder()
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    sys.stderr.write("axon: compiling kernels for this processor, once …\n")
    with _lock(library):
        if library.exists():  # another process was quicker
            return library
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            target = Path(folder) / library.name
            folders = [f"-I{SOURCES[0].parent}", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
            command = [compiler, "-O3", "-std=c++20", "-shared", "-fPIC", *flags, *folders, "-x", "c++", "-"]
            command += ["-ltorch_cpu", "-ltorch", "-o", str(target)]
            # All at once: PyTorch's headers take the compiler longer than what is ours.
            everything = "".join(f'#include "{path.name}"\n' for path in SOURCES if path.suffix == ".cpp")
            done = subprocess.run(command, input=everything, capture_output=True, text=True, check=False)
            if done.returncode:
                found = re.search(r"error: (.*)", done.stderr)
                raise Unavailable(f"{compiler} failed: {found[1] if found else done.stderr.strip()[-200:]}")
            target.replace(library)
    return library


def processor_flags() -> frozenset[str]:
    """What the processor says it can do (Linux; nothing elsewhere)."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()


def _flags() -> list[str]:
    """Compiler flags for the instructions the kernels use here.

    Raises:
        Unavailable: this processor lacks some.
    """
    present = processor_flags()
    if missing := [name for name in NEEDED if name not in present]:
        raise Unavailable(f"this processor ({platform.machine()}) has no {', '.join(missing)}")
    used = [*NEEDED, *(name for name in OPTIONAL if name in present)]
    return ["-mfma", *(f"-m{name.replace('_', '')}" for name in used)]


def _library(flags: list[str]) -> Path:
    """Where the library for this source and these flags is kept."""
    release = ".".join(version("torch").split(".")[:2])
    texts = [path.read_text(encoding="utf-8") for path in SOURCES if path.suffix in (".h", ".cpp")]
    digest = hashlib.sha256("\n".join([release, *flags, *texts]).encode()).hexdigest()
    home = os.environ.get("AXON_KERNEL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "axon"
    )
    return Path(home) / f"kernels-{digest[:16]}.so"


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise Unavailable("torch is not installed")
    return Path(found.origin).parent


@contextlib.contextmanager
def _lock(library: Path):  # type: ignore[no-untyped-def]
    import fcntl

    with open(library.with_suffix(".lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print(built())  # noqa: T201
    except Unavailable as error:
        sys.exit(f"axon: no kernels for this processor: {error}")
