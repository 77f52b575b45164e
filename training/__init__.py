"""Staged LoRA training after ClinicalBLIP's recipe: data, base, stages, evaluation. Run as ``python -m training``."""
