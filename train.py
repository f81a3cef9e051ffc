"""Thin entry point; see jaxroute/cli.py and `python train.py --help`."""

import sys

from jaxroute.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
