"""routerctl, the admin command line: a thin client of the control plane's ``AdminService``."""
