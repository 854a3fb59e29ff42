"""`python -m model.native` builds the native kernels, see build.py."""

import sys

from .build import main

sys.exit(main())
