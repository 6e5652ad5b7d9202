"""OpenIGTLink: live frames in, label maps out, for navigation."""
