"""Where a run runs. Imports no torch."""
