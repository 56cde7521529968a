"""A value in words, what differs, what there is to choose from."""
