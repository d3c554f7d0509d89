"""Health, metrics and facts of workers, asked over HTTP."""
