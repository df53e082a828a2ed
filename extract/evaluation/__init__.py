"""What probes, heads and robustness share to judge results: held-out predictions, metrics, intervals, paired tests."""
