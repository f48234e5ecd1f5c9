"""A pytest plugin (``-p narrow``) under which the processor has AVX2 and nothing beyond: the narrow kernels are tested."""

from axon_llm.fast import native

native.processor_flags = lambda: frozenset(native.NARROW)
