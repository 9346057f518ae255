"""`python -m jaxcache` is the command `jaxcache`."""

import sys

from jaxcache.cli import main

if __name__ == "__main__":
    sys.exit(main())
