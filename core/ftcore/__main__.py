"""`python -m ftcore` is `ftcore`."""

import sys

from ftcore.cli import main

sys.exit(main())
