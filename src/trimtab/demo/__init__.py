"""The whole path on text that every Python has: the standard library's own source."""
