"""What makes training fast: `packed_attention: false` switches off packed_attention.py here, and so on for each file."""

from finery.registry import Registry

KERNELS = Registry(__name__)
