"""DeepSpeed ZeRO for ftcore: `ftcore trainer=deepspeed`. DeepSpeed itself is imported when a run starts."""

from ftcore_deepspeed._plugin import DeepSpeed

__all__ = ["DeepSpeed"]
