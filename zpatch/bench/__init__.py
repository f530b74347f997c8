"""How fast a store is read, and what would be faster."""
