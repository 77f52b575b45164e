"""What steers a draft: prompt, opening, template, whole words and sentences."""
