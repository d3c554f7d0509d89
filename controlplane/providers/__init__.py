"""Makes the fleet be what is desired."""
