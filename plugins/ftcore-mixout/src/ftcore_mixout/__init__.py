"""Mixout (Lee, Cho, Kang, 2020) as an ftcore plugin: `ftcore +plugin=mixout`."""

from ftcore_mixout._plugin import Mixout

__all__ = ["Mixout"]
