"""Measuring: the machine's limits, the cache on and off, prefill and decode; ratios within one run, medians."""
