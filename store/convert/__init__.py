"""Other layouts into a store and out of it; each layout has its file."""
