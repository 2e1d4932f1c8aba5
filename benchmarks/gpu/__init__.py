"""The Triton kernels on a GPU: parity, speed, peers, ceilings. See ``__main__``."""
