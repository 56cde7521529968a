"""What a run may say: the plan, the libraries' own fields, trackers."""
