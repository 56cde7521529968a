"""What a run is. Imports no torch."""
