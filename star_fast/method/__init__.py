"""The idea: ST-AR's random choices, objective, student and teacher. Read objective.py first."""
