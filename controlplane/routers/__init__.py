"""What router replicas report, passed on to the others and summed up; commands to them."""
