"""Meta's own Llama checkpoints, and pickled weights, to safetensors.

Called converting so that no module bears the name of the function.
"""

from __future__ import annotations

from kit.converting.meta import convert

__all__ = ["convert"]
