"""The checkpoint folder, which every command reads and writes."""
