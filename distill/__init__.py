"""Store to student: no teacher on the training device, every teacher of a sample in every step."""
