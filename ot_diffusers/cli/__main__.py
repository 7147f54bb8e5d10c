"""`python -m ot_diffusers.cli`, which is what accelerate launches."""

import sys

from . import main

sys.exit(main())
