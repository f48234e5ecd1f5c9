"""Kernels for Nvidia GPUs, in Triton: what a decode step is made of where the weights lie in a GPU's memory.

``one_row.py`` multiplies the one row of a step by the weights, ``few_rows.py`` a few rows by quantised ones,
``attention.py`` and ``step.py`` have queries look at the cache, ``around.py`` and ``rounding.py`` are what lies between
products; ``block.py`` puts a block together. All of them read the same tensors as the readable path, and are tested
against it.

Importing the kernels needs Triton, which is not everywhere that PyTorch is: ``operators.gpu_kernels`` asks.
"""
