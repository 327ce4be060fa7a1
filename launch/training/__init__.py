"""What train.py is made of: its options, rows, early checks and results."""
