"""Rows of strangers' files, read as they stand and brought into the form that training reads; no torch."""
