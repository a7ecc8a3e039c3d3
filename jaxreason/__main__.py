"""`python -m jaxreason`: the command line.

Reward workers are spawned processes, and a spawned process imports the parent's main module again. So the commands,
and jax with them, are imported only when this is the program that was started.
"""

import sys

if __name__ == "__main__":
    from jaxreason.cli.main import main

    sys.exit(main())
