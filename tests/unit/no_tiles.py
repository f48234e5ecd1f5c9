"""A pytest plugin (``-p no_tiles``) under which the processor's matrix unit is hidden: the kernels without it are tested."""

from axon_llm.fast import native

shown = native.processor_flags
native.processor_flags = lambda: frozenset(flag for flag in shown() if not flag.startswith("amx"))
