"""Train the vision encoder alone, on films of several hospitals: ``python -m training.encoder CONFIG.yaml``."""
