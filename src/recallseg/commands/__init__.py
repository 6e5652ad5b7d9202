"""The runtime's commands. Importing these modules is cheap: each command imports what it needs."""
