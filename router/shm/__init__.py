"""Memory that the processes of one router replica share, and the channel between its agent and relays."""
