"""What every plugin has to hold."""

from typing import ClassVar

from ftcore.testing import Conformance


class TestLoRA(Conformance):
    """LoRA under the suite; its dropout draws by the micro-batch, and is off where splits are compared."""

    name = "lora"
    options: ClassVar = {"dropout": 0.2}
    bad: ClassVar = [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}]
