"""The data that comes with tljax; LICENSES.md says whose it is, and cut.py how it was cut."""
