"""Looking into a store: everything that the commands print, as functions that return dataclasses or Arrow tables. Knows
no model. Each function says what it read: everything, or a sample of stated size and seed."""
