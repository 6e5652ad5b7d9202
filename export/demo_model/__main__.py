"""Run the demo pair's recipe as ``python -m recallseg.export.demo_model``."""

from recallseg.export.demo_model.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
