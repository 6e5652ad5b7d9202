"""What an engine is, how it runs, and what a bundle holds. Depends on no other room."""
