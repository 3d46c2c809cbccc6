"""The machinery of the programs: from flags to a run directory."""
