"""``python -m router``: one replica."""

from router.launcher import main

if __name__ == "__main__":
    raise SystemExit(main())
