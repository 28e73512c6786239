"""Images: where their encoded bytes lie, and decoding them to pictures or to one line that says why not."""
