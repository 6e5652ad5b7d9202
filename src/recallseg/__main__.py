"""``python -m recallseg`` is the ``recallseg`` command."""

from recallseg.cli import main

if __name__ == "__main__":
    main()
