"""Triton kernels, one stage a file; loaded on first use by the triton backend."""
