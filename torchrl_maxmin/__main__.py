"""``python -m torchrl_maxmin``: the same as the command ``torchrl-maxmin``."""

import sys

from torchrl_maxmin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
