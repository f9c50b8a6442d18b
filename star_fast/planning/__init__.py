"""What a run will need before it starts: memory, arithmetic, time. Everything here is predicted by formulas, nothing is
measured.
"""
