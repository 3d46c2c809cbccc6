"""Programs: flags in, a run directory out. All input and output is here."""
