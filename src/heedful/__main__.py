"""`python -m heedful`, which is also what `torchrun -m heedful` runs."""

import sys

from heedful.cli import main

sys.exit(main())
