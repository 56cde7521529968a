"""This machine: hardware, folders, the terminal, what is secret, what is installed."""
