"""The table of rules: what kit check refuses or warns of."""
