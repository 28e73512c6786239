"""One self-contained page about a store: opens offline, holds no link to anywhere. Needs the extra `inspect`."""
