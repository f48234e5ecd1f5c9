"""The checkpoint that ships, and the recipe that made it."""
