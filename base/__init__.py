"""The ground floor: errors, configuration, conditions, files, places and images. Knows no feature, teacher or shard."""
