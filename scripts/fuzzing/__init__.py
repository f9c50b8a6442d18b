"""The parts of scripts/fuzz.py: what is damaged (goods, subjects, command_lines), how (bytes_damage, text_damage, formats, payloads), and who watches (trial)."""
