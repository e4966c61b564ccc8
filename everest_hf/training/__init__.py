"""A run: its recipe, what its loop in train_accelerate.py is made of, and what surrounds that loop."""
