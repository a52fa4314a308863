"""``python -m fxpar``: see `fxpar.cli`."""

import sys

from fxpar.cli import main

sys.exit(main())
