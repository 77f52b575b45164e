"""Staged LoRA training of ClinicalBLIP: data, base weights, stages, evaluation. Run as ``python -m training``."""
