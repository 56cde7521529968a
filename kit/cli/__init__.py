"""The command line: the table of verbs, and what is typed after each."""
