"""python -m fastsimclr."""

import sys

from fastsimclr.cli import main

sys.exit(main())
