"""mambacompress: compression and quantization of Mamba models."""

__version__ = "0.1.0"
