"""The kernels in ``kernels/``: compiled for this machine's processor when first needed, kept, and loaded.

A few files of C++ and the compiler that ``torch.compile`` needs too; some seconds, once per machine. What was compiled
is kept in ``~/.cache/axon`` (or ``AXON_KERNEL_CACHE``), under a name that changes with anything it depends on.

Where the processor lacks the instructions, or there is no compiler, PyTorch's own kernels serve, and one line on
standard error says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).with_name("kernels")
COMPILE_LIMIT_S = 300
_DIGEST_BYTES = 32
# What the kernels are written for, the best first; and what the best takes besides, all of a set or none.
WIDE = ("fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
NARROW = ("fma", "avx2")
OPTIONAL = (("avx512_bf16",), ("gfni",), ("avx512_vp2intersect",), ("amx_tile", "amx_bf16", "amx_int8"))


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
        if isinstance(error, OSError):
            reason += f" (kernels are kept in {_kept_in()}; AXON_KERNEL_CACHE names another folder)"
        print(f"axon: PyTorch's own kernels are used, which are slower: {reason}", file=sys.stderr)  # noqa: T201
        return False
    return True


def loaded() -> bool:
    """Whether there are kernels behind the operators' names by now; asks for nothing."""
    import torch

    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("axon::bf16_strips", "CPU"))


@cache
def tiles() -> bool:
    """Whether the kernels may use the processor's matrix unit (Intel AMX) in this process."""
    import ctypes

    return load() and bool(ctypes.CDLL(str(built())).axon_tiles())


@cache
def pairs() -> bool:
    """Whether the kernels can multiply bfloat16 as such, by the vector unit."""
    return load() and "avx512_bf16" in _found()[1]


def built() -> Path:
    """The compiled library; compiles it if it is not there.

    Raises:
        Unavailable: the processor or the compiler is missing, or the compiler fails.
    """
    return _found()[0]


def _found() -> tuple[Path, list[str]]:
    """The library, and the instructions it is compiled for: all that are here and that the compiler knows."""
    choices = _choices()
    for used, less in zip(choices, [*choices[1:], None], strict=True):
        flags = _flags(used)
        library = _library(flags)
        if library.exists():
            _check_owner(library)
            if _is_whole(library):
                return library, used
        refusal = None if less is None else _refusal(flags)
        if less is None or refusal is None:
            _compile(library, flags)
            return library, used
        without = ", ".join(name for name in used if name not in less)
        sys.stderr.write(f"axon: the kernels do without {without}: {refusal}\n")
    raise AssertionError("there is no choice")


def _refusal(flags: list[str]) -> str | None:
    """What the compiler says to a flag that it does not know; asking takes milliseconds."""
    done = subprocess.run(
        [*_compiler(), *flags, "-E", "-x", "c++", os.devnull], capture_output=True, check=False, env=_in_english(),
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    unknown = done.returncode and any(flag in done.stderr for flag in flags)
    return done.stderr.strip().splitlines()[0] if unknown else None


def _compiler() -> list[str]:
    try:
        compiler = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"CXX is no command: {error}") from None
    compiler = compiler or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not compiler[0]:
        raise Unavailable("there is no C++ compiler (install g++)")
    return compiler


def _compile(library: Path, flags: list[str]) -> None:
    """Make the library for these flags."""
    compiler = _compiler()
    torch_folder = _torch_folder()
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.environ.get("AXON_KERNEL_CACHE"):
        _check_owner(library.parent)
    sys.stderr.write(f"axon: compiling kernels for this processor into {library.parent}, once: half a minute or so …\n")
    with _lock(library):
        if library.exists() and _is_whole(library):  # another process was quicker
            return
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            target = Path(folder) / library.name
            folders = [f"-I{FOLDER}", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
            # No products fused with sums but where the source says so: a row's result would depend on the function.
            command = [*compiler, "-O3", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC", *flags, *folders]
            command += ["-x", "c++", "-"]
            command += ["-ltorch_cpu", "-ltorch", "-o", str(target)]
            # All at once: PyTorch's headers take the compiler longer than what is ours.
            everything = "".join(f'#include "{path.name}"\n' for path in _sources() if path.suffix == ".cpp")
            try:
                done = subprocess.run(
                    command, input=everything, capture_output=True, check=False, timeout=COMPILE_LIMIT_S,
                    encoding="utf-8", errors="replace", env=_in_english(),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise Unavailable(f"{compiler[0]} was not done after {COMPILE_LIMIT_S} s") from None
            if done.returncode:
                found = re.search(r"error: (.*)", done.stderr)
                said = found[1] if found else done.stderr.strip()[-200:]
                raise Unavailable(f"{compiler[0]} failed: {said}")
            digest = hashlib.sha256(target.read_bytes()).digest()
            with target.open("ab") as file:
                file.write(digest)  # what follows the last section of a library is nobody's
                file.flush()
                os.fsync(file.fileno())  # before it has its name: after a power loss it is whole or not there
            target.replace(library)


def _in_english() -> dict[str, str]:
    """The environment of a compiler whose words are looked at."""
    return {**os.environ, "LC_ALL": "C"}


def _check_owner(path: Path) -> None:
    """What is loaded into this process must not be somebody else's to change; whose a chosen folder is, is decided."""
    status = path.stat()
    open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    chosen = bool(os.environ.get("AXON_KERNEL_CACHE"))
    if open_to_all or (status.st_uid not in (0, os.getuid()) and not chosen):
        raise Unavailable(f"{path} belongs to somebody else, or anybody may change it")


def _is_whole(library: Path) -> bool:
    """Whether a library ends with the digest of what is before: to load one that was cut off ends the process."""
    data = library.read_bytes()
    return hashlib.sha256(data[:-_DIGEST_BYTES]).digest() == data[-_DIGEST_BYTES:]


def processor_flags() -> frozenset[str]:
    """What the processor says it can do (Linux; nothing elsewhere)."""
    return frozenset(processor().get("flags", "").split())


def is_zen4() -> bool:
    """Whether the processor is an AMD Zen 4, whatever a virtual machine hides of it."""
    said = processor()
    if (said.get("vendor_id"), said.get("cpu family")) != ("AuthenticAMD", "25"):
        return False
    model = int(said.get("model", 0))
    return 16 <= model < 32 or model >= 96  # the others of the family are Zen 3


@cache
def processor() -> dict[str, str]:
    """What ``/proc/cpuinfo`` has of the first processor; it takes a while where there are many."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def instructions() -> list[str]:
    """What the kernels are compiled for here, as ``/proc/cpuinfo`` spells it, if the compiler knows all of it.

    Raises:
        Unavailable: this processor lacks something.
    """
    return _choices()[0]


def _choices() -> list[list[str]]:
    """What the kernels can be compiled for here, the best first: a compiler may not know what is newest."""
    present = processor_flags()
    if present.issuperset(WIDE):
        extras = [names for names in OPTIONAL if present.issuperset(names)]
        return [[*WIDE, *(name for names in extras[:kept] for name in names)] for kept in range(len(extras), -1, -1)]
    if missing := [name for name in NARROW if name not in present]:
        raise Unavailable(f"this processor ({platform.machine()}) has no {', '.join(missing)}")
    return [[*NARROW]]


def _flags(used: list[str] | None = None) -> list[str]:
    """Compiler flags for the instructions the kernels use here."""
    used = instructions() if used is None else used
    spelt = (name.replace("_", "-" if name.startswith("amx") else "") for name in used)
    tiles = ["-DAXON_TILES"] if "amx_tile" in used else []  # compilers do not agree on a name for it
    # Half floats tell an Intel whose matrix unit is hidden from a Zen. Not all compilers in use know them.
    intel = ["-DAXON_INTEL"] if "avx512f" in used and "avx512_fp16" in processor_flags() else []
    zen4 = ["-DAXON_ZEN4"] if is_zen4() else []
    return [*(f"-m{name}" for name in spelt), *tiles, *intel, *zen4]


def _library(flags: list[str]) -> Path:
    """Where the library for this source and these flags is kept."""
    release = ".".join(_torch_version().split(".")[:2])
    texts = [path.read_text(encoding="utf-8") for path in _sources()]
    about = [release, *platform.libc_ver(), os.environ.get("CXX", ""), *flags, *texts]
    digest = hashlib.sha256("\n".join(about).encode()).hexdigest()
    return _kept_in() / f"kernels-{digest[:16]}.so"


def _sources() -> list[Path]:
    return sorted(path for path in FOLDER.iterdir() if path.suffix in (".h", ".cpp"))


def _kept_in() -> Path:
    given = os.environ.get("AXON_KERNEL_CACHE")
    return Path(given) if given else user_cache()


def user_cache() -> Path:
    """Where this user's files are kept that may be deleted at any time; it may not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # a user without a home
        return Path(tempfile.gettempdir()) / f"axon-{os.getuid()}"
    return Path(home) / "axon"


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:  # from a source tree, or packed without its metadata
        found = re.search(r"__version__ = '([^']*)'", (_torch_folder() / "version.py").read_text(encoding="utf-8"))
        if found is None:
            raise Unavailable("torch does not say its version") from None
        return found[1]


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise Unavailable("torch is not installed")
    return Path(found.origin).parent


@contextlib.contextmanager
def _lock(library: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where no processor is known to have the instructions

    with open(library.with_suffix(".lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print(built())  # noqa: T201
    except (Unavailable, OSError) as error:
        sys.exit(f"axon: no kernels for this processor: {error}")
