"""Where workers come from: the fleet file and leases."""
