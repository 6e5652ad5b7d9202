"""``python -m recallseg`` is the ``recallseg`` command; what is installed calls this too.

The command's modules take a third of a second to import: who stops it then is answered as ever.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from recallseg.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
