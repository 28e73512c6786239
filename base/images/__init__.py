"""Images: sources of encoded bytes, and decoding them to pictures or a one-line reason."""
