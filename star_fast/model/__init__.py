"""What is trained, what tokenizes, and their files."""
