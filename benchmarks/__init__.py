"""What cbedge costs, measured: wall time by stage, cold start, peak memory. Records go to ``results/``."""
