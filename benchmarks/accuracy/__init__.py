"""How well the demo model segments real images that it has never seen."""
