"""Supervised contrastive fine-tuning (Gunel et al., 2021) for ftcore: `ftcore +plugin=contrastive`."""

from ftcore_contrastive._loss import supervised_contrastive
from ftcore_contrastive._noise import TextNoise
from ftcore_contrastive._plugin import Contrastive

__all__ = ["Contrastive", "TextNoise", "supervised_contrastive"]
