"""Sweeps: grids, searches, trials, warm workers."""
