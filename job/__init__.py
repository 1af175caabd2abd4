"""How a job starts, keeps its ranks together, and ends. It knows nothing of what is computed."""
