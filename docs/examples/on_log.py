"""Send records somewhere else."""

import json

from ftcore import hookimpl, plugin


@plugin(api=1)
class Echo:
    """Print each record of metrics.jsonl."""

    @hookimpl
    def on_log(self, record):
        print(json.dumps(record))
