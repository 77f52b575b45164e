"""What runs a bundle's graphs."""
