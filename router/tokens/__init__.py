"""What an engine will make of a prompt: its token ids and block hashes, off the event loop."""
