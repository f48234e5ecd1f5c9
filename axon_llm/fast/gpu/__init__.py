"""Kernels for Nvidia GPUs, in Triton: what a decode step is made of where the weights lie in a GPU's memory.

``one_row.py`` multiplies the one row of a step by the weights, ``few_rows.py`` a row or a few by quantised ones,
``tiles.py`` many by int8 ones; ``widen.py`` makes numbers of int4, for cuBLAS. ``attention.py`` and ``step.py`` have
queries look at the cache, ``around.py`` and ``rounding.py`` are what lies between products. ``linear.py`` chooses a
product, and ``block.py`` puts a block together. All of them are tested against the readable path.

Importing the kernels needs Triton, which is not everywhere that PyTorch is: ``operators.gpu_kernels`` asks.
"""
