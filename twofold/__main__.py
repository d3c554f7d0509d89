"""``python -m twofold``."""

from twofold.cli.main import main

raise SystemExit(main())
