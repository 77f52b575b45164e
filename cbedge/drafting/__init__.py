"""Planning a draft: prompt, opening, template, and constraints on words and sentences."""
