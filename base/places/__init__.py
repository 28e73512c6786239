"""Places that a user names: folders and files on a disk or behind a URL."""
