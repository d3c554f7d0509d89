"""The agent's subscriber to the engines' KV events, and the index of cached blocks that it keeps for the relays."""
