"""`star-fast doctor`: what this machine has, what each stage needs, and how to get what is missing."""
