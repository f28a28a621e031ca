"""`python -m hf_nanogpt` is `hf-nanogpt`."""

import sys

from .cli import main

sys.exit(main())
