"""Messages as tables and text for people, and as JSON or YAML for programs. No I/O, no clock."""
