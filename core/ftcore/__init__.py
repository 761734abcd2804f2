"""ftcore: fine-tune language models with techniques that combine.

What a plugin author imports from here is the public interface; every other module is internal.
Importing this package imports neither torch nor Hydra.
"""

from ftcore.contract import Batch, Dropped, Formatted, LossTerm, Sampler, Shard, State, Step
from ftcore.errors import UserError
from ftcore.plugins import hookimpl, plugin

__all__ = [
    "Batch",
    "Dropped",
    "Formatted",
    "LossTerm",
    "Sampler",
    "Shard",
    "State",
    "Step",
    "UserError",
    "__version__",
    "hookimpl",
    "plugin",
]

__version__ = "0.1.0"
