"""The Hub's cache on this machine, and what kit fetch brings into it."""
