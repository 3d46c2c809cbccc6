"""Pages, tables and figures: what a run leaves to be read."""
