"""The speed and memory of tljax beside its peers."""
