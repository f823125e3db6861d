"""`python -m greenroom` is the same as `greenroom`."""

import sys

from greenroom.cli import main

sys.exit(main())
