"""What is typed after a verb, and what is printed: arguments in, functions of the kit, words out."""
