"""The agent of a router replica: between the control plane and the relays; relays serve without it."""
