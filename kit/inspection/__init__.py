"""What can be known of a model, a tokenizer and a data set without torch."""
