"""`python -m finery` is `finery`."""

from finery.cli import main

raise SystemExit(main())
