"""Image findings: names, scores and contradictions."""
