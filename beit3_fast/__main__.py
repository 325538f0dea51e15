"""``python -m beit3_fast`` is ``beit3-fast``."""

import sys

from beit3_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
