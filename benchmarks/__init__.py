"""Speed, memory and kernel resources; throughput.py is the entry to every measured time."""
