"""tljax: a functional laboratory for transfer learning in JAX."""

# No __all__: it would hide the other modules from pdoc.
from tljax import graft, masks, objective, optimizer, paths, plugins, seeds, types  # noqa: F401

__version__ = "0.1.0"
