"""python -m tinytwinflow: see `cli`."""

from .cli.commands import main

raise SystemExit(main())
