"""Turning a model into a service: sampling, the compiled step, continuous batching, prefix reuse."""
