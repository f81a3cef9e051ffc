"""One episode to watch in a browser."""
