"""Evaluation (evaluate.py), the files that it writes (report.py), and the choice of a keep ratio (keep_ratio*.py)."""
