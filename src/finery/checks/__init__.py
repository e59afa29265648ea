"""What `finery check` looks at before a run: each check is a file here."""

from finery.registry import Registry

CHECKS = Registry(__name__)
