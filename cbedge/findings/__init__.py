"""Findings: what they are called, how they are scored and what contradicts them."""
