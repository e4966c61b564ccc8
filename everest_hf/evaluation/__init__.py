"""From views to videos to figures (evaluate.py), their files (report.py), and the choice of a keep ratio (keep_ratio.py)."""
