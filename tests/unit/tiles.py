"""A pytest plugin (``-p tiles``) under which the processor has a matrix unit, emulated: the kernels for it are tested."""

from pathlib import Path
from zlib import crc32

from axon_llm.fast import native

HEADER = Path(__file__).with_name("matrix_unit.h")
VERSION = crc32(HEADER.read_bytes())  # another emulation is another library
flags = native._flags
native._flags = lambda used=None: [*flags(used), f"-DAXON_TILES={VERSION}", "-include", str(HEADER)]
