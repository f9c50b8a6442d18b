"""The parts of scripts/fuzz.py: what is damaged (goods, subjects, file_table; command_lines of command_skeletons
and option_values), how (the damage modules, odd_values, payloads), how it is read, who watches (trial).
"""
