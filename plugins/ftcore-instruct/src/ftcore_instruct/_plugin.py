"""The plugin: which hook does what. Each hook calls functions of the other files."""

from __future__ import annotations

from ftcore import plugin

__all__ = ["Instruct"]


@plugin()
class Instruct:
    """Tune on instructions and chats: formats, mixtures, packing, evaluation (Chung et al., 2022)."""
