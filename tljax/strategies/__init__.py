"""One file, one strategy; its name is the flag's value."""
