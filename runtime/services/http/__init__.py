"""The server for people: nnInteractive's protocol, our own API and one page."""
