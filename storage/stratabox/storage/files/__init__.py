"""Files under the state folder: where they lie, and how they come, are sealed, and go."""
