"""``python -m refault``."""

from refault.cli.main import main

raise SystemExit(main())
