"""Instruction tuning (Chung et al., 2022) as an ftcore plugin: `ftcore +plugin=instruct`."""

from ftcore_instruct._plugin import Instruct

__all__ = ["Instruct"]
