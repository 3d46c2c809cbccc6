"""tljax: a functional laboratory for transfer learning in JAX."""

from tljax import graft, masks, objective, optimizer, paths, plugins, seeds, types

__version__ = "0.1.0"
__all__ = ["graft", "masks", "objective", "optimizer", "paths", "plugins", "seeds", "types"]
