"""The ranks. Imports no Hydra."""
