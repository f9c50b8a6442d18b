"""The parts of scripts/fuzz.py: what is damaged (goods, subjects, command_lines), how (the damage modules, payloads),
how it is read, who watches (trial).
"""
